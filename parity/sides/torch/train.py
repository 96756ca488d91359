"""PyTorch's side in training, a step at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from parity.pairing.layers import Pairing
from parity.records.side import Snapshot, nudged
from parity.sides.optimizers import PairedOptimizer
from parity.sides.torch.module import lifted, loss_of, numpy, without_dropout
from parity.sides.torch.record import default_dtype


def torch_steps(
    module: torch.nn.Module,
    inputs: Sequence[NDArray],
    factory: Callable,
    steps: int,
    *,
    train: bool,
    loss: Callable | None,
) -> list[dict[str, NDArray]]:
    """PyTorch's parameters before the first step and after each, in float64."""
    module = lifted(module, float64=True).train(train)
    made = factory(list(module.parameters()))
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    given = [torch.tensor(a).double() if np.asarray(a).dtype.kind == "f" else torch.tensor(a) for a in inputs]
    states = [_snapshot(module)]
    with default_dtype(torch.float64), without_dropout(module, train=train):
        for _ in range(steps):
            optimizer.zero_grad()
            output = module(*given)
            loss_of(output, loss).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            states.append(_snapshot(module))
    return states


def _snapshot(module: torch.nn.Module) -> dict[str, NDArray]:
    return {name: numpy(p) for name, p in module.named_parameters()}


def torch_cross_entropy(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the batch; classes on axis 1."""
    return torch.nn.functional.cross_entropy(output, labels)


class TorchRun:
    """PyTorch's module in training mode; a copy, so that the given one stays as it is."""

    def __init__(
        self,
        module: torch.nn.Module,
        pairing: Pairing,
        optimizer: PairedOptimizer,
        lr: float,
        loss: Callable,
        *,
        dtype: str,
        nudge: np.random.Generator | None = None,
    ) -> None:
        self.dtype = getattr(torch, dtype)
        self.module = lifted(module, float64=False).cpu().to(self.dtype).train()
        self.optimizer = optimizer.torch(list(self.module.parameters()), lr)
        self.buffers, self.loss, self.nudge = list(optimizer.state), loss, nudge
        self.names = {name for name, _, _ in pairing.tensors()}

    def step(self, inputs: Sequence[NDArray], target: NDArray) -> float:
        """One step; gives the loss before it."""
        if self.nudge is not None:
            with torch.no_grad():
                for p in self.module.parameters():
                    p.copy_(torch.from_numpy(nudged(p.numpy(), self.nudge)))
            inputs = [nudged(a, self.nudge) for a in inputs]
        given = [torch.tensor(a) for a in inputs]
        self.optimizer.zero_grad()
        with default_dtype(self.dtype), without_dropout(self.module, train=True):
            loss = self.loss(self.module(*given), torch.tensor(target))
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def gradients(self) -> dict[str, NDArray]:
        """Of the last step."""
        return {n: numpy(p.grad) for n, p in self.module.named_parameters() if p.grad is not None}

    def snapshot(self) -> Snapshot:
        """What the last step left."""
        parameters = {n: p for n, p in self.module.named_parameters() if n in self.names}
        statistics = {n: b for n, b in self.module.named_buffers() if n in self.names and b.is_floating_point()}
        kinds: dict[str, dict[str, torch.Tensor]] = {"parameters": {**parameters}, "statistics": statistics}
        for key in self.buffers:
            state = {n: self.optimizer.state[p].get(key) for n, p in parameters.items() if p in self.optimizer.state}
            kinds[f"optimizer {key}"] = {n: v for n, v in state.items() if v is not None}
        return {kind: {n: numpy(v) for n, v in named.items()} for kind, named in kinds.items()}
