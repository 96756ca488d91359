"""Flax's side in training, a step at a time. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from parity.records.inputs import Inputs
from parity.records.side import Snapshot, check_loss, nudged
from parity.sides.jax.module import Side, dropout_rate, environment, without_attention_dropout


def flax_cross_entropy(output: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch; classes on the last axis."""
    return optax.softmax_cross_entropy_with_integer_labels(output, labels).mean()


class FlaxRun:
    """Flax's module in training.

    Args:
      variables: flat, to begin with.
      transform: optax's `GradientTransformation`.
      step: from `flax_step`, which several runs share.
      dtype: "float32" or "float64", of variables and inputs.
      fields: of the optimiser's state, which are part of a snapshot: {its name there: optax's name}.
      nudge: before every step, parameters and inputs are moved by a unit in the last place.
    """

    def __init__(
        self,
        variables: Mapping[str, Any],
        transform: optax.GradientTransformation,
        step: Callable,
        *,
        dtype: str,
        fields: Mapping[str, str] | None = None,
        nudge: np.random.Generator | None = None,
    ) -> None:
        every = {n: _as(v, dtype) for n, v in variables.items()}
        trained = {n: v for n, v in every.items() if n.startswith("params/") and jnp.issubdtype(v.dtype, jnp.floating)}
        self.tree = unflatten_dict({n.removeprefix("params/"): v for n, v in trained.items()}, sep="/")
        self.statistics = {n: v for n, v in every.items() if n not in trained}
        self.state, self.take_step = transform.init(self.tree), step
        self.dtype, self.fields, self.nudge = dtype, dict(fields or {}), nudge

    def step(self, inputs: Inputs | Sequence[Any], *target: NDArray) -> float:
        """One step; gives the loss before it."""
        rng, inputs = self.nudge, Inputs.of(inputs)
        if rng is not None:
            self.tree = jax.tree.map(lambda v: jnp.asarray(nudged(np.asarray(v), rng)), self.tree)
            inputs = inputs.mapped(partial(nudged, rng=rng))
        given = inputs.mapped(partial(_as, dtype=self.dtype))
        wanted = [jnp.asarray(a.astype(np.int32) if a.dtype.kind in "iu" else a) for a in target]
        self.tree, self.statistics, self.state, loss = self.take_step(
            self.tree, self.statistics, self.state, given, *wanted
        )
        return float(loss)

    def snapshot(self) -> Snapshot:
        """What the last step left, by Flax's names and in its layout."""
        kinds = {
            "parameters": _named(self.tree),
            "statistics": {n: np.asarray(v) for n, v in self.statistics.items()},
        }
        for key, field in self.fields.items():
            kinds[f"optimizer {key}"] = _named(optax.tree_utils.tree_get(self.state, field))
        return kinds

    def held(self, *, train: bool) -> dict[str, NDArray]:
        """Of the last step the parameters and, in training, the statistics."""
        kinds = self.snapshot()
        return kinds["parameters"] | (kinds["statistics"] if train else {})


def flax_step(
    side: Side, transform: optax.GradientTransformation, loss: Callable, *, train: bool = True, op_by_op: bool = False
) -> Callable:
    """(parameters, statistics, state, inputs, *target) -> the same three after a step, and the loss before; jitted."""

    def intercept(path, call, args, kwargs):
        is_dropout = dropout_rate(call.module, args, kwargs, train=train) is not None
        return args[0] if is_dropout else call(*args, **kwargs)

    def total(tree, statistics, inputs, *target):
        flat = {f"params/{n}": v for n, v in flatten_dict(tree, sep="/").items()}
        with without_attention_dropout():
            output, after = side.apply({**flat, **statistics}, inputs, train=train, intercept=intercept, seed=0)
        value = jnp.asarray(loss(output, *target))
        check_loss(value, "JAX")
        return value.reshape(()), after

    def step(tree, statistics, state, inputs, *target):
        (value, after), gradients = jax.value_and_grad(total, has_aux=True)(tree, statistics, inputs, *target)
        updates, state = transform.update(gradients, state, tree)
        # A rate that a schedule makes in float64 must not lift float32 parameters.
        return optax.apply_updates(tree, updates), {**statistics, **after}, state, value

    return step if op_by_op else jax.jit(step)


def flax_steps(
    side: Side,
    variables: Mapping[str, NDArray],
    inputs: Inputs,
    transform: Any,
    steps: int,
    *,
    train: bool,
    loss: Callable,
    op_by_op: bool = False,
) -> list[dict[str, NDArray]]:
    """As `torch_steps` of the other side; by full name."""
    with environment(float64=True):
        take_step = flax_step(side, transform, loss, train=train, op_by_op=op_by_op)
        run = FlaxRun(variables, transform, take_step, dtype="float64")
        states = [run.held(train=train)]
        for _ in range(steps):
            run.step(inputs)
            states.append(run.held(train=train))
        return states


def _as(value: Any, dtype: str) -> jax.Array:
    value = jnp.asarray(value)
    return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _named(tree: Any) -> dict[str, NDArray]:
    return {f"params/{n}": np.asarray(v) for n, v in flatten_dict(tree, sep="/").items()}
