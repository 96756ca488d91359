"""PyTorch's side in training, a step at a time. Never imports jax."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parity.records.inputs import Inputs
from parity.records.side import Snapshot, check_loss, nudged
from parity.sides.torch.module import lifted, loss_of, numpy, to_dtype, without_dropout
from parity.sides.torch.precision import default_dtype


def torch_cross_entropy(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the batch; classes on axis 1."""
    return torch.nn.functional.cross_entropy(output, labels)


class TorchRun:
    """PyTorch's module in training; a copy, so that the given one stays as it is.

    Args:
      module: any module.
      factory: parameters -> torch optimizer, or (optimizer, scheduler), whose scheduler makes a step after each.
      loss: of (output, *target).
      dtype: "float32" or "float64", of parameters and state.
      train: train or eval mode.
      buffers: of the optimiser, which are part of a snapshot.
      nudge: before every step, parameters and inputs are moved by a unit in the last place.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        factory: Callable,
        loss: Callable,
        *,
        dtype: str,
        train: bool = True,
        buffers: Collection[str] = (),
        nudge: np.random.Generator | None = None,
    ) -> None:
        self.dtype = getattr(torch, dtype)
        self.module = lifted(module, float64=False).cpu().train(train)
        to_dtype(self.module, dtype)
        made = factory(list(self.module.parameters()))
        self.optimizer, self.scheduler = made if isinstance(made, tuple) else (made, None)
        self.loss, self.train, self.buffers, self.nudge = loss, train, buffers, nudge

    def step(self, inputs: Inputs | Sequence[Any], *target: NDArray) -> float:
        """One step; gives the loss before it."""
        if self.nudge is not None:
            with torch.no_grad():
                for p in self.module.parameters():
                    p.copy_(torch.from_numpy(nudged(p.numpy(), self.nudge)))
            inputs = Inputs.of(inputs).mapped(partial(nudged, rng=self.nudge))
        given = Inputs.of(inputs).mapped(self._tensor)
        self.optimizer.zero_grad()
        with default_dtype(self.dtype), without_dropout(self.module, train=self.train):
            loss = self.loss(self.module(*given.args, **given.keywords), *(torch.tensor(a) for a in target))
            check_loss(loss, "PyTorch")
            loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return float(loss.detach())

    def _tensor(self, a: NDArray) -> torch.Tensor:
        v = torch.tensor(a)
        return v.to(self.dtype) if v.is_floating_point() else v

    def gradients(self) -> dict[str, NDArray]:
        """Of the last step."""
        return {n: numpy(p.grad) for n, p in self.module.named_parameters() if p.grad is not None}

    def snapshot(self) -> Snapshot:
        """What the last step left."""
        parameters = dict(self.module.named_parameters())
        statistics = {n: b for n, b in self.module.named_buffers() if b.is_floating_point()}
        kinds: dict[str, dict[str, torch.Tensor]] = {"parameters": {**parameters}, "statistics": statistics}
        for key in self.buffers:
            state = {n: self.optimizer.state[p].get(key) for n, p in parameters.items() if p in self.optimizer.state}
            kinds[f"optimizer {key}"] = {n: v for n, v in state.items() if v is not None}
        return {kind: {n: numpy(v) for n, v in named.items()} for kind, named in kinds.items()}

    def held(self) -> dict[str, NDArray]:
        """Of the last step the parameters and, in training, the statistics."""
        kinds = self.snapshot()
        return kinds["parameters"] | (kinds["statistics"] if self.train else {})

    def statistics_after(
        self, inputs: Inputs | Sequence[Any], name: str | None = None, shift: NDArray | float = 0.0
    ) -> dict[str, NDArray]:
        """The statistics that a run leaves, with one parameter shifted; this run's own stay as they are."""
        copy = lifted(self.module, float64=True).train()
        with torch.no_grad(), without_dropout(copy, train=True):
            if name is not None:
                copy.get_parameter(name).add_(torch.as_tensor(shift))
            given = Inputs.of(inputs).mapped(torch.tensor)
            copy(*given.args, **given.keywords)
        return {n: numpy(b) for n, b in copy.named_buffers() if b.is_floating_point()}


def check_optimizer(module: torch.nn.Module, factory: Callable) -> None:
    """ValueError for an optimiser that makes no step from gradients alone, as one that wants a closure."""
    copied = lifted(module, float64=False).cpu()
    made = factory(list(copied.parameters()))
    optimizer = made[0] if isinstance(made, tuple) else made
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    try:
        optimizer.step()
    except (TypeError, RuntimeError, AttributeError, AssertionError) as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        allowed = "an optimiser that makes a step from gradients alone"
        raise ValueError(
            f"optimizers has PyTorch's {type(optimizer).__name__}, which says {told}; allowed: {allowed}"
        ) from error


def torch_steps(
    module: torch.nn.Module,
    inputs: Inputs,
    factory: Callable,
    steps: int,
    *,
    train: bool,
    loss: Callable | None,
) -> list[dict[str, NDArray]]:
    """PyTorch's parameters before the first step and after each, in float64; in training the kept statistics, too."""
    run = TorchRun(module, factory, lambda output: loss_of(output, loss), dtype="float64", train=train)
    states = [run.held()]
    for _ in range(steps):
        run.step(inputs)
        states.append(run.held())
    return states
