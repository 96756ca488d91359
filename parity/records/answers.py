"""What two optimisers are asked, and what they answer: designed parameters and gradients in, updates out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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


class Run(NamedTuple):
    """One side's answers in one episode."""

    updates: NDArray  # [T, all elements of the Flax tree]
    first_state: list[NDArray]  # the state's arrays after the first step, flat
    rates: NDArray | None  # [T, all elements]


def response(runs: list[Run], columns: list[NDArray], here: NDArray, places: NDArray, asked: Questions) -> Response:
    """What the elements `here` answered, all episodes beside each other."""
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
