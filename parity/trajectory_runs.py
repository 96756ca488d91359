"""One side in training, a step at a time, seen by PyTorch's names and in PyTorch's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from parity import flax_side, torch_side
from parity.pairing import Pairing
from parity.trace import flat_layout_inputs
from parity.trajectory_optimizers import PairedOptimizer, optax_field

Snapshot = dict[str, dict[str, NDArray]]
"""{"parameters" | "statistics" | "optimizer <buffer>": {PyTorch's name: array}}."""


def nudged(a: NDArray, rng: np.random.Generator) -> NDArray:
    """Every element of a floating array one unit in the last place up or down, or where it is; 0 stays."""
    if a.dtype.kind != "f":
        return a
    towards = a * rng.choice(np.array([0, 1, 2], a.dtype), a.shape)
    return np.nextafter(a, towards)


def torch_cross_entropy(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the batch; classes on axis 1."""
    return torch.nn.functional.cross_entropy(output, labels)


def flax_cross_entropy(output: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch; classes on the last axis."""
    return optax.softmax_cross_entropy_with_integer_labels(output, labels).mean()


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
        self.module = torch_side.lifted(module, float64=False).cpu().to(self.dtype).train()
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
        with torch_side.default_dtype(self.dtype), torch_side.without_dropout(self.module, train=True):
            loss = self.loss(self.module(*given), torch.tensor(target))
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def gradients(self) -> dict[str, NDArray]:
        """Of the last step."""
        return {n: torch_side.numpy(p.grad) for n, p in self.module.named_parameters() if p.grad is not None}

    def snapshot(self) -> Snapshot:
        """What the last step left."""
        parameters = {n: p for n, p in self.module.named_parameters() if n in self.names}
        statistics = {n: b for n, b in self.module.named_buffers() if n in self.names and b.is_floating_point()}
        kinds: dict[str, dict[str, torch.Tensor]] = {"parameters": {**parameters}, "statistics": statistics}
        for key in self.buffers:
            state = {n: self.optimizer.state[p].get(key) for n, p in parameters.items() if p in self.optimizer.state}
            kinds[f"optimizer {key}"] = {n: v for n, v in state.items() if v is not None}
        return {kind: {n: torch_side.numpy(v) for n, v in named.items()} for kind, named in kinds.items()}


class FlaxRun:
    """Flax's module in training mode."""

    def __init__(
        self,
        side: flax_side.Side,
        pairing: Pairing,
        variables: Mapping[str, NDArray],
        optimizer: PairedOptimizer,
        step: Callable,
        transform: optax.GradientTransformation,
        *,
        dtype: str,
        nudge: np.random.Generator | None = None,
    ) -> None:
        every = {n: _as(v, dtype) for n, v in variables.items()}
        self.tree = unflatten_dict(
            {n[len("params/") :]: v for n, v in every.items() if n.startswith("params/")}, sep="/"
        )
        self.statistics = {n: v for n, v in every.items() if not n.startswith("params/")}
        self.state, self.take_step = transform.init(self.tree), step
        self.pairing, self.fields, self.nudge = pairing, dict(optimizer.state), nudge

    def step(self, inputs: Sequence[NDArray], target: NDArray) -> float:
        """One step; gives the loss before it."""
        rng = self.nudge
        if rng is not None:
            self.tree = jax.tree.map(lambda v: jnp.asarray(nudged(np.asarray(v), rng)), self.tree)
            inputs = [nudged(a, rng) for a in inputs]
        given = [jnp.asarray(a) for a in flat_layout_inputs(inputs)]
        wanted = jnp.asarray(target.astype(np.int32) if target.dtype.kind in "iu" else target)
        self.tree, self.statistics, self.state, loss = self.take_step(
            self.tree, self.statistics, self.state, given, wanted
        )
        return float(loss)

    def snapshot(self) -> Snapshot:
        """What the last step left, by PyTorch's names."""
        statistics = self.pairing.to_torch({n: np.asarray(v) for n, v in self.statistics.items()})
        kinds = {"parameters": self._moved(self.tree), "statistics": statistics}
        for key, field in self.fields.items():
            kinds[f"optimizer {key}"] = self._moved(optax_field(self.state, field))
        return kinds

    def _moved(self, tree: Any) -> dict[str, NDArray]:
        return self.pairing.to_torch({f"params/{n}": np.asarray(v) for n, v in flatten_dict(tree, sep="/").items()})


def flax_step(side: flax_side.Side, transform: optax.GradientTransformation, loss: Callable) -> Callable:
    """(parameters, statistics, state, inputs, target) -> the same three after a step, and the loss before; jitted."""

    def intercept(path, call, args, kwargs):
        return args[0] if flax_side.is_dropout(call.module) else call(*args, **kwargs)

    def total(tree, statistics, inputs, target):
        flat = {f"params/{n}": v for n, v in flatten_dict(tree, sep="/").items()}
        output, after = side.apply({**flat, **statistics}, inputs, train=True, intercept=intercept, seed=0)
        return loss(output, target), after

    @jax.jit
    def step(tree, statistics, state, inputs, target):
        (value, after), gradients = jax.value_and_grad(total, has_aux=True)(tree, statistics, inputs, target)
        updates, state = transform.update(gradients, state, tree)
        # A rate that a schedule makes in float64 must not lift float32 parameters.
        return optax.apply_updates(tree, updates), {**statistics, **after}, state, value

    return step


def _as(value: Any, dtype: str) -> jax.Array:
    value = jnp.asarray(value)
    return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value
