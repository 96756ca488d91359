"""Asks two optimisers the same questions: designed parameters and gradients in, updates out, all in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

TorchFactory = Callable[[list[nn.Parameter]], Any]
"""Parameters, in order -> a torch Optimizer, or (Optimizer, scheduler), whose scheduler makes a step after each."""

PATTERNS = 24
# A tensor with fewer elements than patterns is asked again, from a fresh state; one element sees eight patterns.
MOST_EPISODES, STRIDE = 8, 5


class ProbeError(ValueError):
    """The optimiser cannot be asked: it wants a closure or a loss, or holds parameters of its own."""


class Questions(NamedTuple):
    """What an episode gives: each [T, PATTERNS], element i of every tensor gets column (i + STRIDE * episode)."""

    gradients: NDArray
    parameters: NDArray


class Response(NamedTuple):
    """What one tensor's rule answered.

    Attributes:
      gradients, parameters: as given, [T, K]: K elements of all episodes, each from a fresh state.
      updates: new - old parameter, [T, K].
      buffer: after the first step, a buffer in the state is this many times the gradient; None if there is none.
      rates: the learning rate that the optimiser itself names at each step, [T]; None if it names none.
    """

    gradients: NDArray
    parameters: NDArray
    updates: NDArray
    buffer: float | None = None
    rates: NDArray | None = None


class Answers(NamedTuple):
    """Both sides' responses for one tensor of the Flax side, and PyTorch's name for it; `worst` as `disagreement`."""

    name: str
    torch: Response
    flax: Response
    worst: float


def questions(steps: int) -> Questions:
    """Gradients from 1e-9 to 1e2, so that every epsilon shows; parameters 0, then 30 to 100, so that decay does.

    Over the steps sign and size change, once to a hundredth, and parameters are set anew before every step: a rule is
    then a function of what it is given, and what it kept from before can be told from what it sees.
    """
    rng = np.random.default_rng(20)
    magnitude = np.tile(np.logspace(-9, 2, PATTERNS // 2), 2)
    profile = rng.uniform(0.3, 1.7, (steps, PATTERNS)) * rng.choice([-1.0, 1.0], (steps, PATTERNS))
    profile[np.arange(PATTERNS) % (steps - 1) + 1, np.arange(PATTERNS)] *= 0.01
    parameters = rng.uniform(30, 100, (steps, PATTERNS)) * rng.choice([-1.0, 1.0], (steps, PATTERNS))
    parameters[:, : PATTERNS // 2] = 0
    return Questions(magnitude * profile, parameters)


def ask(
    torch_factory: TorchFactory,
    transform: Any,
    *,
    torch_params: Mapping[str, NDArray],
    flax_params: Any,
    to_torch: Callable[[Any], Mapping[str, Any]],
    steps: int,
) -> list[Answers]:
    """Runs both optimisers on the same questions.

    Args:
      torch_factory: makes the optimiser from the parameters, in the order of `torch_params`; called once an episode.
      transform: optax's `GradientTransformation`, of which every episode has a fresh state.
      torch_params: PyTorch's name -> an array of the parameter's shape (its values do not matter).
      flax_params: the tree that `transform` is made for; leaves are arrays, whose values do not matter.
      to_torch: a tree like `flax_params` of numpy float64 arrays -> PyTorch's names -> arrays in PyTorch's layout. It
        may reorder, split and join tensors, but not compute.
      steps: of an episode.

    Returns:
      One entry for every leaf of the Flax tree that PyTorch has too.

    Raises:
      ProbeError: a side cannot be asked.
    """
    leaves, treedef = jax.tree.flatten(flax_params)
    shapes = [np.shape(leaf) for leaf in leaves]
    sizes = [int(np.prod(shape)) for shape in shapes]
    offsets = np.cumsum([0, *sizes])
    total = int(offsets[-1])

    def tree(flat: NDArray) -> Any:
        parts = [flat[a:b].reshape(s) for a, b, s in zip(offsets[:-1], offsets[1:], shapes, strict=True)]
        return jax.tree.unflatten(treedef, parts)

    # Which element of the tree is which of PyTorch's: the map is asked with serial numbers.
    serials = {
        name: np.asarray(v).astype(np.int64)
        for name, v in to_torch(tree(np.arange(total, dtype=np.float64))).items()
        if name in torch_params
    }
    for name, serial in serials.items():
        if serial.shape != np.shape(torch_params[name]):
            raise ValueError(f"{name} from to_torch has shape {serial.shape}; allowed: {np.shape(torch_params[name])}")
    within = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.arange(0)
    asked = questions(steps)
    episodes = min(MOST_EPISODES, max(1, *(-(-PATTERNS // max(size, 1)) for size in sizes))) if sizes else 0
    torch_runs, flax_runs, columns = [], [], []
    for episode in range(episodes):
        column = (within + STRIDE * episode) % PATTERNS
        gradients, parameters = asked.gradients[:, column], asked.parameters[:, column]
        torch_runs.append(_run_torch(torch_factory, torch_params, serials, gradients, parameters))
        flax_runs.append(_run_flax(transform, tree, gradients, parameters))
        columns.append(column)

    found = []
    covered = np.zeros(total, bool)
    for serial in serials.values():
        covered[serial.ravel()] = True
    for start, end in pairwise(offsets):
        here = np.arange(start, end)[covered[start:end]]
        if len(here) == 0:
            continue
        name = next(name for name, serial in serials.items() if np.isin(here[0], serial))
        worst = max(
            disagreement(a.updates[:, here], b.updates[:, here], asked.parameters[:, c[here]])
            for a, b, c in zip(torch_runs, flax_runs, columns, strict=True)
        )
        few = here[:PATTERNS]
        # PyTorch's state is laid out as the whole tree; Flax's comes tensor by tensor, each beginning with pattern 0.
        torch_side = _response(torch_runs, columns, few, few, asked)
        found.append(Answers(name, torch_side, _response(flax_runs, columns, few, within[few], asked), worst))
    return found


def disagreement(a: NDArray, b: NDArray, parameters: NDArray) -> float:
    """The largest difference of two sides' updates [T, K], each element relative to the largest that it has seen.

    A parameter's own rounding, which PyTorch's updates carry, does not count.
    """
    both_bad = ~np.isfinite(a) & ~np.isfinite(b)
    if (np.isfinite(a) != np.isfinite(b)).any():
        return float("inf")
    a, b = np.where(both_bad, 0, a), np.where(both_bad, 0, b)
    size = np.maximum.accumulate(np.maximum(np.abs(a), np.abs(b)), axis=0)
    difference = np.maximum(np.abs(a - b) - rounding(parameters, size), 0)
    return float(np.divide(difference, size, out=np.zeros_like(size), where=size > 0).max(initial=0.0))


def rounding(parameters: NDArray, updates: NDArray) -> NDArray:
    """What is lost when an update is taken as the difference of two parameters."""
    return 4 * np.finfo(np.float64).eps * (np.abs(parameters) + np.abs(updates))


class _Run(NamedTuple):
    updates: NDArray  # [T, all elements of the Flax tree]
    first_state: list[NDArray]  # the state's arrays after the first step, flat
    rates: NDArray | None  # [T, all elements]


def _run_torch(factory, shapes, serials, gradients: NDArray, parameters: NDArray) -> _Run:
    tensors = {name: nn.Parameter(torch.zeros(np.shape(v), dtype=torch.float64)) for name, v in shapes.items()}
    made = factory(list(tensors.values()))
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in tensors.values()}:
        raise ProbeError("PyTorch's optimiser holds none of the parameters that its factory was given")
    updates, rates = np.zeros_like(gradients), np.full(gradients.shape, np.nan)
    first_state = []
    for t, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
        before = {}
        for name, serial in serials.items():
            before[name] = torch.from_numpy(parameter[serial])
            tensors[name].data.copy_(before[name])
            tensors[name].grad = torch.from_numpy(gradient[serial])
        for group in optimizer.param_groups:
            of_group = {id(p) for p in group["params"]}
            for name, serial in serials.items():
                if id(tensors[name]) in of_group and "lr" in group:
                    rates[t, serial.ravel()] = float(group["lr"])
        _torch_step(optimizer)
        if scheduler is not None:
            scheduler.step()
        for name, serial in serials.items():
            updates[t, serial.ravel()] = (tensors[name].detach() - before[name]).numpy().ravel()
        if t == 0:
            first_state = _torch_state(optimizer, tensors, serials, gradient.shape)
    return _Run(updates, first_state, None if np.isnan(rates).all() else rates)


def _torch_step(optimizer) -> None:
    try:
        optimizer.step()
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ProbeError(f"PyTorch's {type(optimizer).__name__} makes no step from gradients alone: {error}") from error


def _torch_state(optimizer, tensors, serials, shape) -> list[NDArray]:
    """Every kind of buffer that is as large as its parameter, laid out as the Flax tree."""
    kinds: dict[Any, NDArray] = {}
    for name, serial in serials.items():
        for key, value in optimizer.state.get(tensors[name], {}).items():
            if isinstance(value, torch.Tensor) and value.shape == tensors[name].shape and value.numel():
                kind = kinds.setdefault(key, np.full(shape, np.nan))
                kind[serial.ravel()] = value.detach().double().numpy().ravel()
    return list(kinds.values())


def _run_flax(transform, tree, gradients: NDArray, parameters: NDArray) -> _Run:
    updates, first_state = np.zeros_like(gradients), []
    # Optax itself relies on implicit promotion.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):

        def on_device(flat: NDArray):
            return jax.tree.map(jnp.asarray, tree(flat))

        try:
            state = transform.init(on_device(parameters[0]))
            for t, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
                update, state = transform.update(on_device(gradient), state, on_device(parameter))
                updates[t] = np.concatenate([np.ravel(np.asarray(u, np.float64)) for u in jax.tree.leaves(update)])
                if t == 0:
                    arrays = (np.ravel(np.asarray(v)) for v in jax.tree.leaves(state))
                    first_state = [a.astype(np.float64) for a in arrays if np.issubdtype(a.dtype, np.floating)]
        except TypeError as error:
            raise ProbeError(f"Flax's optimiser makes no update from gradients alone: {error}") from error
    return _Run(updates, first_state, None)


def _response(runs: list[_Run], columns: list[NDArray], here: NDArray, places: NDArray, asked: Questions) -> Response:
    chosen = [c[here] for c in columns]
    rates = runs[0].rates
    return Response(
        np.concatenate([asked.gradients[:, c] for c in chosen], axis=1),
        np.concatenate([asked.parameters[:, c] for c in chosen], axis=1),
        np.concatenate([run.updates[:, here] for run in runs], axis=1),
        _buffer(runs[0].first_state, places, asked.gradients[0, chosen[0]], asked.parameters[0, chosen[0]]),
        None if rates is None or np.isnan(rates[:, here[0]]).any() else rates[:, here[0]],
    )


def _buffer(states: list[NDArray], places: NDArray, gradient: NDArray, parameter: NDArray) -> float | None:
    plain = parameter == 0  # weight decay, if any, is silent there
    for state in states:
        if len(state) <= places.max() or not plain.any():
            continue
        ratio = state[places][plain] / gradient[plain]
        if np.isfinite(ratio).all() and ratio[0] != 0 and np.allclose(ratio, ratio[0], rtol=1e-6, atol=0):
            return float(ratio[0])
    return None
