"""Asks two optimisers the same questions, all in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from parity.records.answers import MOST_EPISODES, PATTERNS, STRIDE, Answers, disagreement, questions, response
from parity.sides.jax.ask import run_flax
from parity.sides.torch.ask import TorchFactory, run_torch


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
        torch_runs.append(run_torch(torch_factory, torch_params, serials, gradients, parameters))
        flax_runs.append(run_flax(transform, tree, gradients, parameters))
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
        torch_side = response(torch_runs, columns, few, few, asked)
        found.append(Answers(name, torch_side, response(flax_runs, columns, few, within[few], asked), worst))
    return found
