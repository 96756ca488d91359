"""PyTorch's half of `parity dump`. Never imports jax."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import nn

from parity.comparison.nudging import NOISE_STEP, noise_of, nudged
from parity.pairing.layers import pairing_of
from parity.pairing.translation import translated
from parity.records.dump_file import Dump
from parity.records.recording import Recording
from parity.records.weight_files import read_weights
from parity.sides import torch as torch_side
from parity.sides.torch.module import default_loss, load_state

MOST_FLATTENS = 3


def dump_torch(
    module: nn.Module,
    inputs: Sequence[NDArray],
    *,
    train: bool,
    weights: str | Path | None = None,
    other: Dump | None = None,
    loss: Callable | None = None,
    layer_map: Mapping[str, str] | None = None,
) -> Dump:
    """Record the module on these inputs, see `parity.offline.dump`."""

    def run(inputs: Sequence[NDArray] = inputs) -> Recording:
        return torch_side.record(module, inputs, train=train, loss=loss or default_loss)

    if other is not None or weights is not None:
        module = copy.deepcopy(module).double()
    if other is not None:
        _carry(module, run, other.free, layer_map)
    elif weights is not None:
        load_state(module, read_weights(Path(weights)), str(weights))
    free = run()
    noise = noise_of(free, run(nudged(inputs, NOISE_STEP)), run(nudged(inputs, -NOISE_STEP)))
    return Dump(free, noise=noise, details={"torch": torch.__version__})


def _carry(
    module: nn.Module, run: Callable[[], Recording], other: Recording, layer_map: Mapping[str, str] | None
) -> None:
    """Give the module the weights of a dump.

    What stands behind a flatten shows in which order its inputs come once the layers before it have their weights; so
    it takes a run more than there are flattens one behind the other.
    """
    if other.framework == "torch":
        load_state(module, other.tensors, "of the dump")
        return
    known: dict[str, tuple[int, ...]] | None = None
    for _ in range(MOST_FLATTENS + 1):
        mine = run()
        pairing = pairing_of(mine, other, layer_map)
        flattens = dict(translated(mine, other, pairing).flattens())
        carried = {name: torch.from_numpy(a) for name, a in pairing.to_torch(other.tensors).items()}
        with torch.no_grad():
            state = module.state_dict()
            for name, value in carried.items():
                if value.shape == state[name].shape:
                    state[name].copy_(value)
        if flattens == known:
            return
        known = flattens
