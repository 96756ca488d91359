"""PyTorch's half of `parity dump`. Never imports jax."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from parity import torch_side
from parity.dumping import NOISE_STEP, loss_weights, noise_of, nudged, pairing_of, read_weights, translated
from parity.recording import Recording
from parity.recording_file import Dump

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


def default_loss(output: Any) -> Tensor:
    """See `parity.offline.loss_weights`."""
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for y in torch_side._floating(output):
        rows = y.reshape(len(y) if y.ndim else 1, -1)
        total = total + (torch.from_numpy(loss_weights(len(rows))).to(y) * (rows + 1).sin().sum(1)).sum()
    return total


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


def load_state(module: nn.Module, arrays: Mapping[str, NDArray], name: str) -> None:
    """Load a state_dict, strictly.

    Raises:
      ValueError: names or shapes that are not the module's.
    """
    state = module.state_dict()
    missing = [n for n in state if n not in arrays and n.rpartition(".")[2] != torch_side.COUNTER]
    unknown = [n for n in arrays if n not in state]
    wrong = [n for n, a in arrays.items() if n in state and tuple(a.shape) != tuple(state[n].shape)]
    if missing or unknown or wrong:
        problems = [
            *(f"lacks {n}" for n in missing),
            *(f"has {n}, too" for n in unknown),
            *(f"has {n} of another shape" for n in wrong),
        ]
        raise ValueError(f"--weights {name} {', '.join(problems)}; allowed: those of this module")
    given = {n: a.astype("float32") if a.dtype.name == "bfloat16" else a for n, a in arrays.items()}  # exactly
    module.load_state_dict({n: torch.as_tensor(a).to(state[n].dtype) for n, a in given.items()}, strict=False)
