"""Which elementwise function makes v of u: a table of the usual ones, and families with one parameter solved for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
After = Callable[[Array], Array]

_erf = np.vectorize(math.erf, otypes=[np.float64])
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
# Below this many elements that depend on a solved parameter, one element solves it and too few confirm it.
FEWEST = 4


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def _exp(x: Array) -> Array:
    return np.exp(np.minimum(x, 700.0))


def _elu(x: Array, alpha: float = 1.0) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


def _leaky(x: Array, slope: float = 0.01) -> Array:
    return np.where(x > 0, x, slope * x)


def _soft_shrink(x: Array, bound: float = 0.5) -> Array:
    return np.sign(x) * np.maximum(np.abs(x) - bound, 0.0)


def _squareplus(x: Array, b: float = 4.0) -> Array:
    return 0.5 * (x + np.sqrt(x * x + b))


def _relu6(x: Array) -> Array:
    return np.clip(x, 0.0, 6.0)


def _log_softmax(x: Array) -> Array:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# In the order of preference where several fit. Each takes any shape, channels last; only the softmaxes look beyond one
# element.
FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "ReLU": lambda x: np.maximum(x, 0.0),
    "exact GELU": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "tanh approximation of GELU": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "SiLU": lambda x: x * _sigmoid(x),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "leaky ReLU with slope 0.01": _leaky,
    "ReLU6": _relu6,
    "ELU": _elu,
    "SELU": lambda x: SELU_SCALE * _elu(x, SELU_ALPHA),
    "softplus": _softplus,
    "hard swish": lambda x: x * _relu6(x + 3) / 6,
    "hard sigmoid": lambda x: _relu6(x + 3) / 6,
    "hard tanh": lambda x: np.clip(x, -1.0, 1.0),
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "quick GELU x*sigmoid(1.702 x)": lambda x: x * _sigmoid(1.702 * x),
    "log-sigmoid": lambda x: -_softplus(-x),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "softmax": lambda x: np.exp(_log_softmax(x)),
    "log-softmax": _log_softmax,
    "softmin": lambda x: np.exp(_log_softmax(-x)),
    "squared ReLU": lambda x: np.maximum(x, 0.0) ** 2,
    "square": lambda x: x * x,
    "absolute value": np.abs,
    "exponential": _exp,
    "sine": np.sin,
    "cosine": np.cos,
    "hard sigmoid clip(0.2 x + 0.5, 0, 1)": lambda x: np.clip(0.2 * x + 0.5, 0.0, 1.0),
    "tanh shrink": lambda x: x - np.tanh(x),
    "soft shrink": _soft_shrink,
    "hard shrink": lambda x: np.where(np.abs(x) > 0.5, x, 0.0),
    "squareplus": _squareplus,
    "sparse plus": lambda x: np.where(x >= 1, x, np.where(x <= -1, 0.0, 0.25 * (x + 1) ** 2)),
    "sparse sigmoid": lambda x: np.clip(0.5 * (x + 1), 0.0, 1.0),
    "LeCun's 1.7159 tanh(2 x / 3)": lambda x: 1.7159 * np.tanh(2 / 3 * x),
}
ACROSS_CHANNELS = frozenset({"softmax", "log-softmax", "softmin"})
NAMES = tuple(FUNCTIONS)
ELEMENTWISE = tuple(name for name in NAMES if name not in ACROSS_CHANNELS)


class _Family(NamedTuple):
    name: str  # with a place for the parameter
    function: Callable[[Array, float], Array]  # monotone in the parameter, at every element
    lowest: float
    highest: float


_FAMILIES = (
    _Family("leaky ReLU with slope {}", _leaky, 1e-8, 10.0),
    _Family("ELU with alpha {}", _elu, 1e-8, 100.0),
    _Family("CELU with alpha {}", lambda x, a: np.where(x > 0, x, a * np.expm1(np.minimum(x, 0.0) / a)), 0.02, 50.0),
    _Family("softplus with beta {}", lambda x, b: _softplus(b * x) / b, 0.02, 50.0),
    _Family("SiLU x*sigmoid({} x)", lambda x, b: x * _sigmoid(b * x), 0.02, 50.0),
    _Family("sigmoid of {} x", lambda x, b: _sigmoid(b * x), 0.02, 50.0),
    _Family("tanh of {} x", lambda x, b: np.tanh(b * x), 0.02, 50.0),
    _Family("soft cap {0} tanh(x / {0})", lambda x, c: c * np.tanh(x / c), 0.02, 1e3),
    _Family("soft shrink with lambda {}", _soft_shrink, 1e-8, 100.0),
    _Family("squareplus with b {}", _squareplus, 1e-8, 1e4),
)

# These of them are a known activation of a number times x: a factor, and no other activation.
OF_A_MULTIPLE = ("sigmoid of ", "tanh of ")


class Solved(NamedTuple):
    """A function with its parameter found: `name` says both."""

    name: str
    function: Callable[[Array], Array]


def limit_of(values: Array, tolerance: float) -> float:
    """How far off a fit of `values` may be: relative to the largest, and an absolute trifle for a tensor of zeros."""
    return tolerance * float(np.abs(values).max(initial=0.0)) + 1e-300


def error_of(given: Array, fit: Array) -> float:
    """max|given - fit|; infinity if that is no number."""
    error = float(np.abs(given - fit).max(initial=0.0))
    return error if math.isfinite(error) else math.inf


def probe_rows(u: Array, size: int = 768) -> Array:
    """A few rows (all channels of a place) to try hypotheses on: evenly spaced, with the two of the largest values."""
    rows = u.reshape(-1, u.shape[-1]) if u.ndim else u.reshape(1, 1)
    count = max(4, size // max(1, rows.shape[1]))
    if len(rows) <= count:
        return np.arange(len(rows))
    peaks = [int(rows.max(axis=1).argmax()), int(rows.min(axis=1).argmin())]
    return np.unique(np.r_[np.linspace(0, len(rows) - 1, count).astype(int), peaks])


def stack(x: Array, names: Sequence[str] = NAMES) -> Array:
    """All functions of x, [len(names), *x.shape]."""
    with np.errstate(all="ignore"):
        return np.stack([np.broadcast_to(FUNCTIONS[name](x), x.shape) for name in names])


def known(u: Array, v: Array, limit: float) -> list[str]:
    """The names in the table that make v of u, the preferred first.

    Args:
      u: any shape, channels last.
      v: the same shape.
      limit: the largest absolute difference that counts as none.

    Returns:
      Names out of `FUNCTIONS`; several where they agree on the values of u.
    """
    rows = probe_rows(u)
    few_u, few_v = u.reshape(-1, u.shape[-1])[rows], v.reshape(-1, u.shape[-1])[rows]
    with np.errstate(all="ignore"):
        survivors = np.abs(stack(few_u) - few_v).max(axis=(1, 2), initial=0.0) <= limit
        return [name for name, alive in zip(NAMES, survivors, strict=True) if alive and _fits(name, u, v, limit)]


def _fits(name: str, u: Array, v: Array, limit: float) -> bool:
    return error_of(v, FUNCTIONS[name](u)) <= limit


def solved(u: Array, v: Array, limit: float, tolerance: float = 1e-9, after: After | None = None) -> list[Solved]:
    """Functions with a parameter (slope, alpha, beta, bounds, slopes per channel) that make v of u.

    Args:
      u: any shape, channels last.
      v: the same shape, or that of after(u).
      limit: the largest absolute difference that counts as none.
      tolerance: relative rounding of v, which says how many digits of the parameter are known.
      after: an average that comes behind the function.

    Returns:
      What fits, the preferred first.
    """
    with np.errstate(all="ignore"):
        found = [one for family in _FAMILIES if (one := _solve(family, u, v, limit, tolerance, after))]
        if after:
            return [one for one in found if error_of(v, after(one.function(u))) <= limit]
        found += [one for one in (_clip(u, v, tolerance), _slopes(u, v), _threshold(u, v, limit)) if one]
        return [one for one in found if error_of(v, one.function(u)) <= limit]


def possible(u: Array, v: Array, limit: float) -> NDArray[np.bool_]:
    """Of which of the arrays u[0], u[1], ... `solved` may make v, judged quickly from a few elements.

    Args:
      u: [K, *v.shape].
      v: any shape.
      limit: the largest absolute difference that counts as none.

    Returns:
      [K].
    """
    axes = tuple(range(1, u.ndim))
    with np.errstate(all="ignore"):
        low, high = v.min(initial=math.inf), v.max(initial=-math.inf)
        at_low, at_high = (v - low <= limit) & (u <= low + limit), (high - v <= limit) & (u >= high - limit)
        same = np.abs(u - v) <= limit
        fits: NDArray[np.bool_] = ((u <= 0) | same).all(axis=axes) | (same | at_low | at_high).all(axis=axes)
        for family in _FAMILIES:
            fits |= _between(*_ends(family, u), v, limit)
        return fits


def ends(u: Array) -> Array:
    """What each family with a parameter gives at its lowest and at its highest, [2, families, *u.shape]."""
    with np.errstate(all="ignore"):
        return np.stack([_ends(family, u) for family in _FAMILIES], axis=1)


def solvable(ends: Array, v: Array, limit: float) -> bool:
    """Whether one of the families whose `ends` these are may make v with some parameter."""
    with np.errstate(all="ignore"):
        return bool(_between(ends[0], ends[1], v, limit).any())


def _ends(family: _Family, u: Array) -> tuple[Array, Array]:
    return family.function(u, family.lowest), family.function(u, family.highest)


def _between(lowest: Array, highest: Array, v: Array, limit: float) -> NDArray[np.bool_]:
    """Whether all of v lies between what a family's two ends give: one answer for each index before v's axes."""
    inside = (v >= np.minimum(lowest, highest) - limit) & (v <= np.maximum(lowest, highest) + limit)
    return np.asarray(inside.all(axis=tuple(range(inside.ndim - v.ndim, inside.ndim))))


def number(value: float, tolerance: float = 1e-9) -> str:
    """A parameter as text, with as many digits as are sure."""
    return f"{value:.6g}" if tolerance <= 1e-8 else f"{value:.4g}"


def _solve(family: _Family, u: Array, v: Array, limit: float, tolerance: float, after: After | None) -> Solved | None:
    """Bisection at the element that depends most on the parameter; the caller checks all the others."""
    if after is None and len(rows := probe_rows(u)) * u.shape[-1] < u.size:
        few_u, few_v = u.reshape(-1, u.shape[-1]), v.reshape(-1, u.shape[-1])
        # Few elements may depend on the parameter (a slope below 0, behind a maximum): those that do are taken too.
        depends = np.abs(family.function(few_u, family.lowest) - family.function(few_u, family.highest)).sum(axis=1)
        rows = np.unique(np.r_[rows, depends.argsort()[-8:]])
        u, v = few_u[rows], few_v[rows]
    then = after or np.asarray
    at_lowest, at_highest = map(then, _ends(family, u))
    # An element says something only between the two ends: softplus at a large x is x for every beta.
    room = np.minimum(np.abs(v - at_lowest), np.abs(v - at_highest))
    room = np.where((v - at_lowest) * (v - at_highest) < 0, room, 0.0)
    if not _between(at_lowest, at_highest, v, limit) or np.count_nonzero(room > 4 * limit) < FEWEST:
        return None
    place = np.unravel_index(room.argmax(), room.shape)
    rising, wanted = at_highest[place] > at_lowest[place], v[place]
    low, high = math.log(family.lowest), math.log(family.highest)
    x = u if after else u[place]
    for _ in range(56):
        middle = 0.5 * (low + high)
        value = family.function(x, math.exp(middle))
        above = (then(value)[place] if after else value) > wanted
        low, high = (low, middle) if above == rising else (middle, high)
    parameter = math.exp(0.5 * (low + high))
    return Solved(family.name.format(number(parameter, tolerance)), lambda x: family.function(x, parameter))


def _clip(u: Array, v: Array, tolerance: float) -> Solved | None:
    low, high = float(v.min(initial=math.inf)), float(v.max(initial=-math.inf))
    within = np.count_nonzero((u > low) & (u < high))
    if within < FEWEST or np.count_nonzero((u < low) | (u > high)) < 2:
        return None
    low_text = number(low, tolerance) if np.any(u < low) else "-infinity"
    high_text = number(high, tolerance) if np.any(u > high) else "infinity"
    return Solved(f"clipping to [{low_text}, {high_text}]", lambda x: np.clip(x, low, high))


def _slopes(u: Array, v: Array) -> Solved | None:
    """PReLU: a slope for each channel."""
    channels = u.shape[-1]
    negative = np.where(u < 0, u, 0.0).reshape(-1, channels)
    if np.count_nonzero(negative) < FEWEST * channels:
        return None
    square = (negative**2).sum(axis=0)
    slopes = (negative * v.reshape(-1, channels)).sum(axis=0) / np.where(square > 0, square, 1.0)
    span = f"{slopes.min():.4g} to {slopes.max():.4g}"
    return Solved(f"leaky ReLU with a slope per channel, {span}", lambda x: np.where(x > 0, x, slopes * x))


def _threshold(u: Array, v: Array, limit: float) -> Solved | None:
    """u above a threshold, one value below; or, by magnitude, 0 below: a hard shrink."""
    kept = np.abs(u - v) <= limit
    if min(np.count_nonzero(kept), np.count_nonzero(~kept)) < FEWEST:
        return None
    value = float(v[~kept][0])
    below = np.abs(v - value) <= limit
    if bound := _between_both(u, below):
        return Solved(f"threshold near {bound:.2g}, {value:.4g} below", lambda x: np.where(x > bound, x, value))
    if value == 0 and (bound := _between_both(np.abs(u), below)):
        return Solved(f"hard shrink with lambda near {bound:.2g}", lambda x: np.where(np.abs(x) > bound, x, 0.0))
    return None


def _between_both(x: Array, below: NDArray[np.bool_]) -> float | None:
    """A number above all these of x and below all the others, or None."""
    low, high = float(x[below].max(initial=-math.inf)), float(x[~below].min(initial=math.inf))
    return 0.5 * (low + high) if -math.inf < low < high < math.inf else None


def activation_of(u: Array, v: Array, tolerance: float) -> str | None:
    """Which activation makes v of u.

    Args:
      u: any shape, channels last (which only the softmaxes look at).
      v: the same shape.
      tolerance: max|f(u) - v| / max|v| that counts as none.

    Returns:
      "identity", "ReLU", "exact GELU", "leaky ReLU with slope 0.2", ...; None if nothing known fits or the shapes
      differ. Where several agree on the values of u, the most usual.
    """
    u, v = np.asarray(u, np.float64), np.asarray(v, np.float64)
    if u.shape != v.shape or u.ndim == 0 or u.size == 0:
        return None
    limit = limit_of(v, tolerance)
    if names := known(u, v, limit):
        return names[0]
    found = solved(u, v, limit, tolerance)
    return found[0].name if found else None


def is_function(u: Array, v: Array, difference: Array) -> bool:
    """Whether v is some smooth function of u, element by element.

    Args:
      u: any shape; fewer than 64 elements tell nothing.
      v: the same shape.
      difference: what the function is to explain, any shape: v must follow its neighbours (in the order of u) far more
        closely than this. Rounding, which is a function too, does not.

    Returns:
      True or False.
    """
    if u.shape != v.shape:
        return False
    x, first, places = np.unique(u.ravel(), return_index=True, return_inverse=True)
    y, span = v.ravel()[first], float(np.ptp(v)) if v.size else 0.0
    if len(x) < 64 or not 0 < span < math.inf or error_of(v.ravel(), y[places.ravel()]) > 1e-6 * span:
        return False
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    off = np.abs(y[1:-1] - (y[:-2] + share * (y[2:] - y[:-2])))
    return bool(np.quantile(off, 0.8) < 0.05 * np.median(np.abs(difference)) and np.abs(np.diff(y)).sum() < 6 * span)
