"""Steps of training on the same inputs, and the two optimisers' rules by themselves."""

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
from parity.identify.optimizers import ProbeError, probe_findings
from parity.located import Located
from parity.pairing import Pairing
from parity.recording import Recording
from parity.trace import Difference, error_of

# Of the way that a parameter has gone: a step of float64 rounds at 1e-15, and training carries that along.
BOUND = 1e-8


def rule_findings(
    pairing: Pairing, recording: Recording, optimizers: tuple[Callable, Any]
) -> tuple[list[Located], list[str]]:
    """Whether the two optimisers are the same update rule: (findings, notes)."""
    parameters = _parameters(pairing, recording)
    moved = pairing.to_flax(parameters)
    tree = unflatten_dict({name.removeprefix("params/"): a for name, a in moved.items()}, sep="/")

    def to_torch(tree: Any) -> dict[str, NDArray]:
        arrays = {f"params/{name}": np.asarray(a) for name, a in flatten_dict(tree, sep="/").items()}
        return pairing.to_torch(arrays)

    try:
        with flax_side.environment(float64=True):
            found = probe_findings(*optimizers, torch_params=parameters, flax_params=tree, to_torch=to_torch)
    except ProbeError as error:
        return [], [f"the optimisers' rules were not compared by themselves: {error}"]
    return [Located("optimizer", i, "", "", finding) for i, finding in enumerate(found)], []


def _parameters(pairing: Pairing, recording: Recording) -> dict[str, NDArray]:
    """PyTorch's parameters that both sides have, in the module's order."""
    both = {t for t, _, _ in pairing.tensors()}
    return {name: a for name, a in recording.tensors.items() if name in recording.gradients and name in both}


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
    module = torch_side.lifted(module, float64=True).train(train)
    made = factory(list(module.parameters()))
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    given = [torch.tensor(a).double() if np.asarray(a).dtype.kind == "f" else torch.tensor(a) for a in inputs]
    states = [_snapshot(module)]
    with torch_side.default_dtype(torch.float64), torch_side.without_dropout(module, train=train):
        for _ in range(steps):
            optimizer.zero_grad()
            output = module(*given)
            torch_side.loss_of(output, loss).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            states.append(_snapshot(module))
    return states


def _snapshot(module: torch.nn.Module) -> dict[str, NDArray]:
    return {name: torch_side.numpy(p) for name, p in module.named_parameters()}


def flax_steps(
    side: flax_side.Side,
    variables: Mapping[str, NDArray],
    inputs: Sequence[NDArray],
    transform: Any,
    steps: int,
    *,
    train: bool,
    loss: Callable | None,
    projections: Callable,
) -> list[dict[str, NDArray]]:
    """Flax's parameters before the first step and after each, in float64, by full name."""

    def intercept(path, call, args, kwargs):
        return args[0] if train and flax_side.is_dropout(call.module) else call(*args, **kwargs)

    with flax_side.environment(float64=True):
        every = {name: flax_side.lifted(v, float64=True) for name, v in variables.items()}
        parameters = {n: v for n, v in every.items() if n.startswith("params/")}
        statistics = {n: v for n, v in every.items() if n not in parameters}
        given = [flax_side.lifted(a, float64=True) for a in inputs]

        def total(tree, statistics):
            flat = {f"params/{n}": v for n, v in flatten_dict(tree, sep="/").items()}
            output, after = side.apply({**flat, **statistics}, given, train=train, intercept=intercept, seed=0)
            if loss is not None:
                return loss(output), after
            results = [v for v in jax.tree.leaves(output) if jnp.issubdtype(v.dtype, jnp.floating)]
            return sum(jnp.sum(v * w) for v, w in zip(results, projections(results), strict=True)), after

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


def step_differences(
    pairing: Pairing, recording: Recording, torch_states: Sequence[Mapping], flax_states: Sequence[Mapping]
) -> list[Difference]:
    """How far the parameters are apart after each step, relative to the way that they have gone.

    A bias before a batch norm is left out: its gradient is rounding alone, which Adam turns into steps.
    """
    found = []
    flax_path = {pair.torch.path: pair.flax.path for pair in pairing.layers}
    largest = max((np.abs(g).max(initial=0) for g in recording.gradients.values()), default=0.0)
    for number in range(1, len(torch_states)):
        way = {n: np.abs(torch_states[number][n] - torch_states[0][n]).max(initial=0) for n in torch_states[0]}
        floor = 1e-6 * max(way.values(), default=0.0)
        for torch_name, flax_name, t in pairing.tensors():
            if torch_name not in way or flax_name not in flax_states[number]:
                continue
            if np.abs(recording.gradients.get(torch_name, 0)).max() < 1e-11 * largest:
                continue
            truth, given = t.to_flax(torch_states[number][torch_name]), flax_states[number][flax_name]
            start = t.to_flax(torch_states[0][torch_name])
            path, _, local = torch_name.rpartition(".")
            if given.shape == truth.shape:
                error = error_of(given - start, truth - start, floor)
                found.append(
                    Difference("optimizer", (path, 0), flax_path.get(path, ""), f"{local} after step {number}", error)
                )
    return found
