"""What an optimiser is asked, and what it answers: designed parameters and gradients in, updates out.

Each side is asked alone, in float64, so that its answers can be written down; `matched` holds two sides' side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PATTERNS = 24
STEPS = 6
# A tensor with fewer elements than patterns is asked again, from a fresh state; one element sees eight patterns.
MOST_EPISODES, STRIDE = 8, 5
RAMP = MOST_EPISODES
"""The number of one more episode, whose gradients grow from step to step: there it shows where they are clipped."""


class ProbeError(ValueError):
    """The optimiser cannot be asked: it wants a closure or a loss, or holds parameters of its own."""


class Questions(NamedTuple):
    """What an episode gives: each [T, PATTERNS], an element of serial number i gets column (i + STRIDE * episode)."""

    gradients: NDArray
    parameters: NDArray


class Response(NamedTuple):
    """What one tensor's rule answered.

    Attributes:
      gradients, parameters: as given, [T, K]: K elements of all episodes, each from a fresh state.
      updates: new - old parameter, [T, K].
      buffer: after the first step, a buffer in the state is this many times the gradient; None if there is none.
      rates: the learning rate that the optimiser itself names at each step, [T]; None if it names none.
      asked: which question each of the K elements was given, episode * PATTERNS + column, ascending; None: all of one
        episode.
      sums: of gradient^2, gradient * parameter, parameter^2 and update^2, over all tensors and over this one, at each
        step of each episode, [4, 2, T, RAMP + 1]; None in older dumps.
    """

    gradients: NDArray
    parameters: NDArray
    updates: NDArray
    buffer: float | None = None
    rates: NDArray | None = None
    asked: NDArray | None = None
    sums: NDArray | None = None


class Answers(NamedTuple):
    """Both sides' responses to the same questions for one tensor, by PyTorch's name; `worst` as `disagreement`."""

    name: str
    torch: Response
    flax: Response
    worst: float


class Run(NamedTuple):
    """One side's answers in one episode."""

    updates: NDArray  # [T, all elements]
    first_state: list[NDArray]  # the state's arrays after the first step, flat
    rates: NDArray | None  # [T, all elements]


Episode = Callable[[NDArray, NDArray], Run]
"""(gradients, parameters), each [T, all elements] -> what the optimiser makes of them, from a fresh state."""


def ask(serials: Mapping[str, NDArray], episode: Episode, *, whole_state: bool) -> dict[str, Response]:
    """Asks one side's optimiser, tensor by tensor.

    Two sides are given the same where elements that correspond have the same serial numbers. Which element of a tensor
    has which matters to none but a rule that looks at rows, columns or norms; every tensor of its own, in its own
    order, is right for all others.

    Args:
      serials: a tensor's name -> the serial numbers of its elements, in the order in which `episode` has the tensors.
      episode: runs the optimiser.
      whole_state: the arrays of a state are as long as all tensors together, and not as one of them.
    """
    flat = {name: np.asarray(serial).ravel() for name, serial in serials.items() if np.size(serial)}
    within = np.concatenate([*flat.values(), np.arange(0)])
    count = min(MOST_EPISODES, max(1, *(-(-PATTERNS // len(s)) for s in flat.values()))) if flat else 0
    asked = {number: questions(STEPS) for number in range(count)} | ({RAMP: ramp(STEPS)} if flat else {})
    starts = np.cumsum([0, *(len(serial) for serial in flat.values())])
    parts = {name: slice(a, b) for name, a, b in zip(flat, starts, starts[1:], strict=False)}
    few = {name: _few(serial) for name, serial in flat.items()}
    heard: dict[str, list[_Heard]] = {name: [] for name in flat}
    buffers = {}
    for number, given in asked.items():
        columns = (within + STRIDE * number) % PATTERNS
        run = episode(given.gradients[:, columns], given.parameters[:, columns])
        every = _sums(given, columns, run.updates)
        for name, part in parts.items():
            here = few[name] + part.start
            of_part = _sums(given, columns[part], run.updates[:, part])
            rates = None if run.rates is None else run.rates[:, here]
            sums = np.stack([every, of_part], 1)
            heard[name].append(_Heard(number, given, columns[here], run.updates[:, here], rates, sums))
            if number == 0:
                places = here if whole_state else few[name]
                buffers[name] = _buffer(run.first_state, places, *(a[0, columns[here]] for a in given))
    return {name: _response(of_name, buffers[name]) for name, of_name in heard.items()}


def _few(serial: NDArray) -> NDArray:
    """Of each column the element that comes first: enough of them to tell a rule."""
    order = np.argsort(serial)
    return order[np.unique(serial[order] % PATTERNS, return_index=True)[1]]


def matched(
    torch: Mapping[str, Response], flax: Mapping[str, Response], names: Iterable[tuple[str, str]]
) -> list[Answers]:
    """What both sides answered to the same questions, for each (PyTorch's name, Flax's name) that both were asked."""
    found = []
    for t, f in names:
        if t in torch and f in flax:
            _, *both = np.intersect1d(_asked(torch[t]), _asked(flax[f]), return_indices=True)
            a, b = (_only(side, which) for side, which in zip((torch[t], flax[f]), both, strict=True))
            found.append(Answers(t, a, b, disagreement(a.updates, b.updates, a.parameters)))
    return found


def _asked(response: Response) -> NDArray:
    return np.arange(response.updates.shape[1]) if response.asked is None else response.asked


def _only(response: Response, which: NDArray) -> Response:
    return response._replace(
        gradients=response.gradients[:, which],
        parameters=response.parameters[:, which],
        updates=response.updates[:, which],
        asked=_asked(response)[which],
    )


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


def ramp(steps: int) -> Questions:
    """Gradients of one size in all elements, from 1e-6 to 10 over the steps; small parameters, for their decay."""
    rng = np.random.default_rng(21)
    profile = rng.uniform(0.3, 1.7, (steps, PATTERNS)) * rng.choice([-1.0, 1.0], (steps, PATTERNS))
    size = 10.0 ** np.concatenate([[-6, -4], np.linspace(-2, 1, steps - 2)])
    return Questions(size[:, None] * profile, 1e-4 * questions(steps).parameters)


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


class _Heard(NamedTuple):
    """Of one tensor in one episode: what was given, and what some elements answered."""

    number: int
    given: Questions
    columns: NDArray  # of these elements
    updates: NDArray
    rates: NDArray | None
    sums: NDArray  # [4, 2, T]


def _sums(given: Questions, columns: NDArray, updates: NDArray) -> NDArray:
    """Of gradient^2, gradient * parameter, parameter^2 and update^2 over elements with these questions, [4, T]."""
    (g, p), often = given, np.bincount(columns, minlength=PATTERNS)
    return np.stack([*(a @ often for a in (g * g, g * p, p * p)), np.einsum("tk,tk->t", updates, updates)])


def _response(heard: Sequence[_Heard], buffer: float | None) -> Response:
    """What one tensor answered, all episodes beside each other."""
    asked = np.concatenate([PATTERNS * of.number + of.columns for of in heard])
    every, rates = np.argsort(asked), heard[0].rates
    sums = np.full((4, 2, len(heard[0].updates), RAMP + 1), np.nan)
    for of in heard:
        sums[..., of.number] = of.sums
    return Response(
        np.concatenate([of.given.gradients[:, of.columns] for of in heard], axis=1)[:, every],
        np.concatenate([of.given.parameters[:, of.columns] for of in heard], axis=1)[:, every],
        np.concatenate([of.updates for of in heard], axis=1)[:, every],
        buffer,
        None if rates is None or np.isnan(rates[:, 0]).any() else rates[:, 0],
        asked[every],
        sums,
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
