"""Flax's side in training, a step at a time, seen by PyTorch's names and in PyTorch's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from parity.pairing.layers import Pairing
from parity.pairing.translation import flat_layout_inputs
from parity.records.side import Snapshot, nudged
from parity.sides.jax.module import Side, environment, is_dropout, lifted
from parity.sides.optimizers import PairedOptimizer, optax_field


def flax_cross_entropy(output: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch; classes on the last axis."""
    return optax.softmax_cross_entropy_with_integer_labels(output, labels).mean()


class FlaxRun:
    """Flax's module in training mode."""

    def __init__(
        self,
        side: Side,
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


def flax_step(side: Side, transform: optax.GradientTransformation, loss: Callable) -> Callable:
    """(parameters, statistics, state, inputs, target) -> the same three after a step, and the loss before; jitted."""

    def intercept(path, call, args, kwargs):
        return args[0] if is_dropout(call.module) else call(*args, **kwargs)

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


def flax_steps(
    side: Side,
    variables: Mapping[str, NDArray],
    inputs: Sequence[NDArray],
    transform: Any,
    steps: int,
    *,
    train: bool,
    loss: Callable,
) -> list[dict[str, NDArray]]:
    """Flax's parameters before the first step and after each, in float64, by full name."""

    def intercept(path, call, args, kwargs):
        return args[0] if train and is_dropout(call.module) else call(*args, **kwargs)

    with environment(float64=True):
        every = {name: lifted(v, float64=True) for name, v in variables.items()}
        parameters = {n: v for n, v in every.items() if n.startswith("params/")}
        statistics = {n: v for n, v in every.items() if n not in parameters}
        given = [lifted(a, float64=True) for a in inputs]

        def total(tree, statistics):
            flat = {f"params/{n}": v for n, v in flatten_dict(tree, sep="/").items()}
            output, after = side.apply({**flat, **statistics}, given, train=train, intercept=intercept, seed=0)
            return loss(output), after

        @jax.jit
        def step(tree, statistics, state):
            gradients, after = jax.grad(total, has_aux=True)(tree, statistics)
            updates, state = transform.update(gradients, state, tree)
            return optax.apply_updates(tree, updates), {**statistics, **after}, state

        tree = unflatten_dict({n.removeprefix("params/"): v for n, v in parameters.items()}, sep="/")
        state, states = transform.init(tree), [tree]
        for _ in range(steps):
            tree, statistics, state = step(tree, statistics, state)
            states.append(tree)
        return [{f"params/{n}": np.asarray(v) for n, v in flatten_dict(t, sep="/").items()} for t in states]
