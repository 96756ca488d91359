"""Trains both sides in lockstep: the same weights, the same batches, the same optimiser, and a float64 referee each.

    python -m parity train                                     this project's BLeNet on the Fashion-MNIST sample
    python -m parity train --optimizer sgd --dtype float64 --steps 200 --out runs/lockstep
    python -m parity train --torch nets.torch:net --flax nets.flax:net    a pair that takes the same images

What counts as "the same" is measured and not guessed. The referees, each side's own model in float64, must stay as
close as rounding lets them: a run whose weights and inputs are nudged by one unit in the last place at every step says
how far that is. And in float32 neither side may be farther from its referee than four times the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parity.evidence.guessed import settle
from parity.pairing.pairs import Pairing
from parity.pairing.translation import flat_layout_inputs
from parity.records.inputs import Calls, Inputs, calls
from parity.records.side import Snapshot
from parity.records.structure import UNSEEN
from parity.sides import jax as flax_side
from parity.sides import torch as torch_side
from parity.sides.jax.train import FlaxRun, flax_cross_entropy, flax_step
from parity.sides.optimizers import OPTIMIZERS, PairedOptimizer, paired
from parity.sides.torch import layers as torch_layers
from parity.sides.torch.train import TorchRun, torch_cross_entropy
from parity.training.gauges import Fixed, find
from parity.training.trajectory import Trajectory, Verdict, distances

if TYPE_CHECKING:
    import torch

__all__ = ["OPTIMIZERS", "PairedOptimizer", "Trajectory", "lockstep"]


Batch = tuple[Any, NDArray]
"""(input, tuple of inputs or dict of keywords; target), numpy, in PyTorch's layout."""


def lockstep(
    torch_module: torch.nn.Module,
    flax_module: Any,
    batches: Iterable[Batch],
    *,
    optimizer: str | PairedOptimizer = "adam",
    lr: float = 1e-3,
    steps: int = 50,
    dtype: str = "float32",
    loss: tuple[Callable, Callable] | None = None,
    flax_inputs: Sequence[Sequence[Any] | Mapping[str, Any]] | None = None,
    flax_call: Callable[..., Any] | None = None,
    layer_map: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Trajectory:
    """Trains both from PyTorch's weights, and holds them against each other and against float64 after every step.

    Args:
      torch_module: a PyTorch module; it is copied.
      flax_module: a linen or NNX module that should be the same network.
      batches: (input, target) in PyTorch's layout, over and over if there are fewer than `steps`; for input also a
        tuple of inputs, or a dict of keywords, see `parity.check`. Floating ones of rank 3 and more go to Flax
        channels last.
      optimizer: a name of `OPTIMIZERS`, or a `PairedOptimizer`.
      lr: learning rate, > 0.
      steps: >= 1.
      dtype: "float32" or "float64", of the two sides; a referee is always float64.
      loss: (torch_loss, jax_loss), each of (output, target); None is the mean cross-entropy with integer targets.
      flax_inputs: for each batch, what Flax is called with instead, in its layout.
      flax_call: see `parity.check`.
      layer_map: see `weights.to_flax`.
      progress: called with the number of steps done.

    Returns:
      The trajectory; `ok` says whether they stayed together.

    Raises:
      ValueError: an argument out of range, or a parameter that only one side has.
    """
    _check(steps, lr, dtype)
    rule, given = paired(optimizer), _split(batches, flax_inputs, flax_call)
    losses = loss or (torch_cross_entropy, flax_cross_entropy)
    with flax_side.environment(float64=True):
        called, target = given[0]
        pairing, tables, notes = _pair(torch_module, flax_module, called, layer_map)
        runs = _Runs(torch_module, flax_module, flax_call, pairing, tables, rule, lr, losses, dtype)
        fixed = find(partial(runs.torch, "float64"), _cast(_inputs(called), "float64"), _cast_array(target, "float64"))
        trajectory = Trajectory(
            optimizer if isinstance(optimizer, str) else "custom", lr, dtype, gauges=sorted(fixed.masks), notes=notes
        )
        every = runs.all()
        views = {name: Fixed(fixed) for name in every}
        verdict = Verdict(trajectory)
        initial = {n: p.detach().cpu().numpy() for n, p in torch_module.named_parameters()}
        parameters = dict.fromkeys(every, initial)
        for number, (called, target) in enumerate(itertools.islice(itertools.cycle(given), steps), 1):
            seen, values = {}, {}
            for name, run in every.items():
                views[name].before_step(parameters[name])
                inputs = _inputs(called, is_flax=isinstance(run, FlaxRun))
                # Float64 is given what the side's own dtype holds, so that both see the same images.
                held, own = (_cast(inputs, dtype), _cast_array(target, dtype)), "float64" if "64" in name else dtype
                values[name] = run.step(_cast(held[0], own), _cast_array(held[1], own))
                snapshot = runs.snapshot(run)
                parameters[name] = snapshot["parameters"]
                seen[name] = views[name](snapshot)
            verdict.add(values, {pair: distances(seen[pair[0]], seen[pair[1]], values, pair) for pair in verdict.pairs})
            if progress is not None:
                progress(number)
    return trajectory


def _check(steps: int, lr: float, dtype: str) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; allowed: an integer >= 1")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr is {lr!r}; allowed: > 0")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype is {dtype!r}; allowed: 'float32', 'float64'")


def _split(
    batches: Iterable[Batch], flax_inputs: Sequence[Any] | None, flax_call: Callable | None
) -> list[tuple[Calls, NDArray]]:
    found, others = [*batches], None if flax_inputs is None else [*flax_inputs]
    if not found:
        raise ValueError("batches is empty; allowed: at least one (input, target)")
    if others is not None and len(others) != len(found):
        raise ValueError(f"flax_inputs is {len(others)} batches; allowed: {len(found)}, as many as batches")

    def every(inputs: Any) -> Any:
        return inputs if isinstance(inputs, tuple | list | Mapping) else [inputs]

    return [
        (calls(every(inputs), None, None if others is None else every(others[i]), flax_call), np.asarray(target))
        for i, (inputs, target) in enumerate(found)
    ]


def _inputs(called: Calls, *, is_flax: bool = False) -> Inputs:
    torch = called.torch or Inputs()
    return torch if not is_flax else called.flax or flat_layout_inputs(torch)


def _cast(inputs: Inputs, dtype: str) -> Inputs:
    return inputs.mapped(partial(_cast_array, dtype=dtype))


def _cast_array(a: NDArray, dtype: str) -> NDArray:
    """Floating inputs and targets in that dtype, whole-number targets as PyTorch wants them."""
    return a.astype(dtype) if a.dtype.kind == "f" else a.astype(np.int64) if a.dtype.kind in "iu" else a


def _pair(
    torch_module: torch.nn.Module, flax_module: Any, called: Calls, layer_map
) -> tuple[Pairing, dict[str, Any], list[str]]:
    """The pairing, Flax's variables that are its own, and what could not be seen."""
    module = torch_layers.unwrapped(torch_module)[0]
    torch_ = torch_layers.of_module(module)
    found, flax = settle(module, torch_, flax_module, called, layer_map)
    left = [name for side in found.left() for name in side]
    if left:
        raise ValueError(f"{', '.join(left)} has no counterpart; allowed: modules with the same parameters")
    if found.loses():
        raise ValueError(f"{'; '.join(found.loses())}: two make two steps where one makes one; allowed: one bias")
    told = [f"{UNSEEN} ({side.unseen})" for side in (torch_, flax) if side.unseen]
    return found, flax.tables, [*told, *(found.notes() if found.is_guessed else [])]


class _Runs:
    """Makes the runs of both sides, all from the same weights."""

    def __init__(
        self, torch_module, flax_module, flax_call, pairing: Pairing, tables, rule: PairedOptimizer, lr, losses, dtype
    ) -> None:
        self.module, self.pairing, self.rule, self.lr = torch_layers.unwrapped(torch_module)[0], pairing, rule, lr
        self.losses, self.dtype, self.names = losses, dtype, {name for name, _, _ in pairing.tensors()}
        self.side, self.transform = flax_side.side_of(flax_module, flax_call), rule.optax(lr)
        self.flax_take_step = flax_step(self.side, self.transform, losses[1])
        # Both precisions begin with the weights as `dtype` holds them.
        self.module = torch_side.lifted(self.module, float64=False).cpu()
        torch_side.to_dtype(self.module, dtype)
        state = {n: v.numpy() for n, v in self.module.state_dict().items() if v.is_floating_point()}
        self.variables = tables | pairing.to_flax(state)
        torch_side.check_optimizer(self.module, self._factory)
        shapes = {name: a.shape for name, a in self.variables.items() if name.startswith("params/")}
        flax_side.check_transform(self.transform, shapes)

    def _factory(self, parameters: list) -> Any:
        return self.rule.torch(parameters, self.lr)

    def torch(self, dtype: str, nudge: np.random.Generator | None = None) -> TorchRun:
        return TorchRun(
            self.module, self._factory, self.losses[0], dtype=dtype, buffers=[*self.rule.state], nudge=nudge
        )

    def flax(self, dtype: str, nudge: np.random.Generator | None = None) -> FlaxRun:
        return FlaxRun(
            self.variables,
            self.transform,
            self.flax_take_step,
            dtype=dtype,
            fields=self.rule.state,
            nudge=nudge,
        )

    def snapshot(self, run: TorchRun | FlaxRun) -> Snapshot:
        """What the last step left of the tensors that both sides have, by PyTorch's names and in its layout."""
        if isinstance(run, FlaxRun):
            return {kind: self.pairing.to_torch(named) for kind, named in run.snapshot().items()}
        names = self.names | self.pairing.wholes()
        return {kind: {n: a for n, a in named.items() if n in names} for kind, named in run.snapshot().items()}

    def all(self) -> dict[str, TorchRun | FlaxRun]:
        """By name; "64" in a name says float64, a dash that it is nudged."""
        made: dict[str, TorchRun | FlaxRun] = {}
        for dtype in dict.fromkeys(("float64", self.dtype)):
            end = "64" if dtype == "float64" else ""
            for name, make in (("PyTorch", self.torch), ("Flax", self.flax)):
                made[f"{name}{end}"] = make(dtype)
                made[f"{name}{end}'"] = make(dtype, np.random.default_rng(7))
        return made
