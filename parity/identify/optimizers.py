"""Are a torch optimiser and an optax transformation the same update rule, and if not, which mistake is it?

Both are asked the same questions (`optimizer_probe`), each side alone is fitted to a family of rules
(`optimizer_rules`, `optimizer_fit`), and the two descriptions are compared here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.identify.finding import Finding
from parity.identify.optimizer_fit import LOOSER, Rule, adopt, fit
from parity.identify.optimizer_probe import Answers, ProbeError, Response, TorchFactory, ask

__all__ = ["Description", "ProbeError", "probe_findings"]

FEWEST_STEPS = 6
# An epsilon below these is smaller than rounding at the smallest gradient asked, 1e-9.
# In Adagrad an epsilon inside the root and the accumulator's initial value are one number: this small, an epsilon.
SMALL_ACCUMULATOR = 1e-5
NO_EPSILON, NO_EPSILON_ROOT = 1e-17, 1e-26
CODES = (
    "adam-epsilon",
    "bias-correction",
    "weight-decay-coupling",
    "momentum-dampening",
    "nesterov",
    "learning-rate",
    "unexplained",
)


class Description(NamedTuple):
    """An update rule in words and numbers.

    Attributes:
      algorithm: "SGD", "Adam", "RMSprop", "Adagrad", "AMSGrad".
      lr: learning rate of every step, [T].
      values: its other hyperparameters by name, as far as they have a meaning for it.
      epsilon: (where, value): "outside" the root; "inside"; "before the bias correction"; "both".
      first_corrected, second_corrected: whether the averages are corrected for their bias; None: it has none.
      l2: decay added to the gradient.
      decay: decoupled decay, of every step, [T], in multiples of lr.
      dampening: (1 - weight of a new gradient in the momentum, whether the first one is damped too).
      nesterov: "" or the kind of look-ahead.
      tolerance: up to which learning rates count as equal, relative; optax makes float32 rates from a step's number.
      precision: the same for the other numbers.
    """

    algorithm: str
    lr: NDArray
    values: dict[str, float]
    epsilon: tuple[str, float]
    first_corrected: bool | None
    second_corrected: bool | None
    l2: float
    decay: NDArray
    dampening: tuple[float, bool]
    nesterov: str
    tolerance: float
    precision: float


def probe_findings(
    torch_factory: TorchFactory,
    transform: Any,
    *,
    torch_params: Mapping[str, NDArray],
    flax_params: Any,
    to_torch: Callable[[Any], Mapping[str, Any]],
    steps: int = FEWEST_STEPS,
    tolerance: float = 1e-9,
) -> list[Finding]:
    """Compares two optimisers as update rules, from what they answer to designed gradients; in float64.

    Args:
      torch_factory: parameters (a list, in the order of `torch_params`) -> torch Optimizer, or (Optimizer, scheduler),
        the scheduler making a step after each of the optimiser's.
      transform: optax `GradientTransformation`.
      torch_params: PyTorch's name -> array of the parameter's shape, in the module's order; values do not matter.
      flax_params: the tree of parameters for which `transform` is meant (masks and labels see its names and shapes).
      to_torch: such a tree of numpy float64 arrays -> {PyTorch's name: array in PyTorch's layout}; it may only reorder.
      steps: to ask; at least 6 are. A schedule is seen as far as these go.
      tolerance: up to which the updates of an element, relative to its largest so far, count as equal.

    Returns:
      [] for the same rule; otherwise what differs, each mistake once, with the names of the parameters if it is not
      all of them.

    Raises:
      ProbeError: an optimiser that does not make its update from gradients and parameters alone (L-BFGS and others
        that want a closure or a loss), or that holds other parameters than it was given.
    """
    answers = ask(
        torch_factory,
        transform,
        torch_params=torch_params,
        flax_params=flax_params,
        to_torch=to_torch,
        steps=max(steps, FEWEST_STEPS),
    )
    known: dict[bytes, list[Finding]] = {}
    sides = _Side(), _Side()
    per_code: dict[str, tuple[str, list[str]]] = {}
    for answer in sorted(answers, key=lambda answer: -answer.torch.updates.size):  # the largest tell most
        if answer.worst <= tolerance:
            continue
        # Most tensors answer alike: each kind of answer is explained once.
        key = b"".join(np.ascontiguousarray(side.updates).tobytes() for side in (answer.torch, answer.flax))
        if key not in known:
            known[key] = _explain(answer, tolerance, sides)
        for finding in known[key]:
            per_code.setdefault(finding.code, (finding.evidence, []))[1].append(answer.name)
    found = []
    for code in sorted(per_code, key=CODES.index):
        evidence, names = per_code[code]
        found.append(Finding(code, evidence + _where(names, len(answers))))
    return found


def _where(names: list[str], total: int) -> str:
    if len(names) == total:
        return ""
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f" (for {len(names)} of {total} parameters: {listed})"


class _Side:
    """What the tensors so far have shown of a side: the rules that fitted, and whether one fitted none."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []
        self.failed = False

    def fit(self, response: Response, tolerance: float) -> list[Rule]:
        fitting = fit(response, tolerance, self.rules, only_known=self.failed)
        self.failed |= not fitting
        self.rules += [rule for rule in fitting if not any(rule[:2] == known[:2] for known in self.rules)]
        return fitting


def _explain(answer: Answers, tolerance: float, known: tuple[_Side, _Side]) -> list[Finding]:
    for mine, side, other in ((answer.torch, "PyTorch", "Flax"), (answer.flax, "Flax", "PyTorch")):
        if not mine.updates.any():
            return [Finding("unexplained", f"{side}'s optimiser leaves the parameters as they are, {other}'s does not")]
    sides = (answer.torch, answer.flax)
    fitted = [side.fit(response, tolerance) for side, response in zip(known, sides, strict=True)]
    if not all(fitted):
        return _unfitted(answer, fitted, tolerance)
    fitted[1] = [adopt(answer.flax, rule, fitted[0][0], tolerance) for rule in fitted[1]]
    first, second = (_readings(rules, side) for rules, side in zip(fitted, sides, strict=True))
    a, b = _choose(first, second, answer.torch.rates)
    if a.algorithm != b.algorithm:
        return [_other_algorithm(a, b)]
    found = _compare(a, b)
    rounding = max(LOOSER[0], *(100 * rule.error for rules in fitted for rule in rules[:1]))
    if not found and answer.worst > rounding:
        evidence = f"both optimisers are {_name(a)}, yet their updates differ by up to {_text(answer.worst)} relative"
        return [Finding("unexplained", evidence)]
    return found


def _unfitted(answer: Answers, fitted: list[list[Rule]], tolerance: float) -> list[Finding]:
    """A rule that is not known may still be the same on both sides but for a factor."""
    a, b = answer.torch.updates, answer.flax.updates
    if answer.worst <= LOOSER[0]:  # a side that rounds
        return []
    usable = np.isfinite(a) & np.isfinite(b) & (answer.torch.parameters == 0) & (b != 0)
    ratio = np.divide(a, b, out=np.ones_like(a), where=usable)[usable]
    if ratio.size and np.isfinite(ratio).all() and np.allclose(ratio, np.median(ratio), rtol=1e3 * tolerance, atol=0):
        factor = float(np.median(ratio))
        if abs(factor - 1) > LOOSER[0]:
            return [Finding("learning-rate", f"every update of PyTorch is {_text(factor)} times Flax's")]
    sides = [name for name, rules in zip(("PyTorch", "Flax"), fitted, strict=True) if not rules]
    known = [_name(_readings(rules, None)[0]) for rules in fitted if rules]
    also = f", the other side's is {known[0]}" if known else ""
    which = f"neither {sides[0]}'s nor {sides[1]}'s" if len(sides) == 2 else f"{sides[0]}'s"
    negated = "is" if len(sides) == 2 else "is not"
    evidence = (
        f"the updates differ by up to {_text(answer.worst)} relative, and {which} optimiser {negated} a known one "
        f"(SGD, Adam, RMSprop, Adagrad and their variants){also}"
    )
    return [Finding("unexplained", evidence)]


# From a fitted rule to a description: what the rate of a step is made of.


def _readings(rules: list[Rule], response: Response | None) -> list[Description]:
    """All descriptions that give the same numbers, the usual one first."""
    return [reading for rule in rules for reading in _readings_of(rule, response)]


def _readings_of(rule: Rule, response: Response | None) -> Iterator[Description]:
    shape, n = rule.shape, rule.numbers
    t = np.arange(1, len(rule.rate) + 1)
    tolerance = max(LOOSER[0], 10 * rule.error)
    if not shape.second:
        yield from _linear_readings(rule, response, tolerance)
        return
    has_first, has_second = abs(n.b1) > 1e-3, shape.second == "ema"
    first = 1 / (1 - n.b1**t) if has_first else np.ones(len(t))
    second = np.sqrt(1 - n.b2**t) if has_second and not shape.corrected else np.ones(len(t))
    firsts: tuple[bool | None, ...] = (True, False) if has_first else (None,)
    seconds: tuple[bool | None, ...] = (True,) if shape.corrected else (False, True) if has_second else (None,)
    for second_corrected in seconds:
        for first_corrected in firsts:
            factor = (first if first_corrected else 1.0) * (second if second_corrected else 1.0)
            algorithm = _algorithm(rule, has_first, bool(second_corrected))
            yield _describe(rule, algorithm, factor, first_corrected, second_corrected, tolerance)


def _precision(rule: Rule) -> float:
    return max(1e-8, 300 * rule.error)


def _algorithm(rule: Rule, has_first: bool, second_corrected: bool) -> str:
    if rule.shape.second == "sum":
        return "Adagrad"
    if rule.shape.maximum:
        return "AMSGrad"
    return "Adam" if has_first or second_corrected else "RMSprop"


def _describe(rule: Rule, algorithm: str, factor, first, second, tolerance: float) -> Description:
    shape, n = rule.shape, rule.numbers
    lr = rule.rate / factor
    values = {
        "Adam": {"beta1": n.b1, "beta2": n.b2},
        "AMSGrad": {"beta1": n.b1, "beta2": n.b2, "maximum before correction": float(shape.maximum == "before")},
        "RMSprop": {"decay": n.b2, "initial": n.initial, "centred": float(shape.centred)},
        "Adagrad": {"initial accumulator": n.initial if n.initial > SMALL_ACCUMULATOR else 0.0},
    }[algorithm]
    if shape.trace:
        values |= {"momentum": n.beta}
    epsilon = _epsilon(rule, bool(second))
    nesterov = shape.nesterov or ("momentum" if shape.trace == "nesterov" else "")
    decay = _per_rate(rule.decay, lr, max(1e-9, 0.1 * rule.error))
    return Description(
        algorithm, lr, values, epsilon, first, second, n.l2, decay, (0.0, False), nesterov, tolerance, _precision(rule)
    )


def _epsilon(rule: Rule, second_corrected: bool) -> tuple[str, float]:
    outside, inside = rule.numbers.epsilon, rule.numbers.epsilon_root
    if rule.shape.second == "sum" and rule.numbers.initial <= SMALL_ACCUMULATOR:
        inside = rule.numbers.initial
    outside, inside = (outside if outside > NO_EPSILON else 0.0), (inside if inside > NO_EPSILON_ROOT else 0.0)
    if outside and inside:
        return f"{_text(inside)} inside the root and outside", outside
    late = rule.shape.second == "ema" and second_corrected and not rule.shape.corrected
    if inside:
        return "inside the root" + (", before the bias correction" if late else ""), inside
    return ("outside, before the bias correction" if late and outside else "outside the root"), outside


def _per_rate(decay: NDArray, lr: NDArray, least: float) -> NDArray:
    """Decoupled decay in multiples of the learning rate; 0 below rounding."""
    ratio = np.divide(decay, lr, out=np.zeros_like(decay), where=np.abs(lr) > 1e-6 * np.abs(lr).max(initial=0.0))
    return np.where(np.abs(ratio) > least, ratio, 0.0)


def _linear_readings(rule: Rule, response: Response | None, tolerance: float) -> Iterator[Description]:
    n = rule.numbers
    values = {"momentum": n.beta if abs(n.beta) > 1e-6 else 0.0}
    least = max(1e-10, rule.error)
    l2, beta = (n.l2 if abs(n.l2) > least else 0.0), values["momentum"]
    look = "momentum" if rule.shape.nesterov and beta else ""
    dampening = (n.dampening, n.first_damped) if beta and abs(n.dampening) > 1e-6 else (0.0, False)

    def describe(lr: NDArray, dampening: tuple[float, bool], corrected: bool | None = None) -> Description:
        decay = _per_rate(rule.decay, lr, least)
        return Description(
            "SGD", lr, values, ("", 0.0), corrected, None, l2, decay, dampening, look, tolerance, _precision(rule)
        )

    if not beta or dampening[0]:
        yield describe(rule.rate, dampening)
        return
    # All gradients damped alike is a factor: only the buffer itself tells it from a learning rate.
    damped = 1 - beta
    buffer = None if response is None else response.buffer
    if buffer is not None and abs(buffer - damped) < 1e-6:
        yield describe(rule.rate / damped, (beta, True))
        corrected = rule.rate / damped * (1 - beta ** np.arange(1, len(rule.rate) + 1))
        yield describe(corrected, (beta, True), True)
    else:
        yield describe(rule.rate, dampening)


def _choose(
    first: list[Description], second: list[Description], rates: NDArray | None
) -> tuple[Description, Description]:
    """Of equal readings the simplest: PyTorch's own learning rate, then a constant one, then the other side's way."""

    def constant(d: Description) -> bool:
        return bool(np.allclose(d.lr, d.lr[0], rtol=d.tolerance, atol=0))

    def alike(a: Description, b: Description) -> int:
        return sum(
            (
                a.algorithm == b.algorithm,
                a.first_corrected == b.first_corrected,
                a.second_corrected == b.second_corrected,
                a.epsilon[0] == b.epsilon[0],
            )
        )

    def proportional(a: Description, b: Description) -> bool:
        used = np.abs(a.lr) > 1e-9 * np.abs(a.lr).max()
        ratio = np.divide(b.lr, a.lr, out=np.ones_like(a.lr), where=used)[used]
        still = np.abs(b.lr[~used]) <= 1e-9 * np.abs(b.lr).max()
        return bool(np.allclose(ratio, ratio[:1], rtol=max(a.tolerance, b.tolerance), atol=0) and still.all())

    def named(d: Description) -> bool:
        return rates is not None and bool(np.allclose(d.lr, rates, rtol=d.tolerance, atol=0))

    pairs = [(a, b) for a in first for b in second]

    def merit(pair: tuple[Description, Description]) -> tuple[int, ...]:
        a, b = pair
        return named(a), constant(a) + constant(b), proportional(a, b), alike(a, b)

    return max(pairs, key=merit)  # the first of the best


# Two descriptions, side by side.


def _compare(a: Description, b: Description) -> list[Finding]:
    found = [*_epsilons(a, b), *_corrections(a, b), *_decays(a, b), *_momenta(a, b), *_rates(a, b)]
    close = max(a.precision, b.precision)
    others = []
    for name in {**a.values, **b.values}:
        x, y = a.values.get(name, 0.0), b.values.get(name, 0.0)
        if abs(x - y) > close * (1 if name.startswith("beta") else max(abs(x), abs(y))) and abs(x - y) > 1e-9:
            digits = 4 if _text(x) != _text(y) else 10
            others.append(f"{name} is {x:.{digits}g} in PyTorch and {y:.{digits}g} in Flax")
    if others and found:
        also = "; besides, " + ", ".join(others)
        return [found[0]._replace(evidence=found[0].evidence + also), *found[1:]]
    return found or [Finding("unexplained", f"{a.algorithm}: " + ", ".join(others))] if others else found


def _epsilons(a: Description, b: Description) -> Iterator[Finding]:
    (where, x), (there, y) = a.epsilon, b.epsilon
    if not (x or y) or _uncorrected_alike(a, b):
        return
    both = x and y
    if abs(x - y) > 1e-4 * max(x, y) + max(a.precision, b.precision) * max(x, y) or (both and where != there):
        evidence = f"epsilon is {_text(x)}, {where}, in PyTorch and {_text(y)}, {there}, in Flax"
        yield Finding("adam-epsilon", evidence.replace(", outside the root,", "") if where == there else evidence)


def _uncorrected_alike(a: Description, b: Description) -> bool:
    """One side corrects v, the other not: epsilon "before the correction" of the one is the other's plain epsilon."""
    if a.second_corrected == b.second_corrected:
        return False
    places = {where.split(",")[0].removesuffix(" the root") for where, _ in (a.epsilon, b.epsilon)}
    values = a.epsilon[1], b.epsilon[1]
    return len(places) == 1 and abs(values[0] - values[1]) <= 1e-3 * max(values)


def _corrections(a: Description, b: Description) -> Iterator[Finding]:
    def words(d: Description) -> str:
        chosen = [name for name, on in (("first", d.first_corrected), ("second", d.second_corrected)) if on]
        return "both moments" if len(chosen) == 2 else f"the {chosen[0]} moment" if chosen else "none"

    first = a.first_corrected is not None and b.first_corrected is not None and a.first_corrected != b.first_corrected
    if a.algorithm == "SGD":
        first = bool(a.first_corrected) != bool(b.first_corrected)
    if first or bool(a.second_corrected) != bool(b.second_corrected):
        evidence = f"bias correction: {words(a)} in PyTorch, {words(b)} in Flax"
        beta = b.values.get("beta2", b.values.get("momentum", 0.0))
        yield Finding("bias-correction", f"{evidence}; after one step 1/(1 - beta^t) is {_text(1 / (1 - beta))}")


def _decays(a: Description, b: Description) -> Iterator[Finding]:
    def coupling(d: Description) -> str:
        return "none" if not d.l2 and not d.decay.any() else "L2" if not d.decay.any() else "decoupled"

    def value(d: Description) -> NDArray:
        return d.l2 + d.decay

    ways = coupling(a), coupling(b)
    # For plain SGD both are the same.
    plain = a.algorithm == "SGD" and not a.values["momentum"] * b.values["momentum"]
    x, y = value(a), value(b)
    words = {
        "none": "has no weight decay",
        "L2": "adds weight decay {} to the gradient (L2)",
        "decoupled": "decays the weights by {} beside the update (decoupled)",
    }
    close = 10 * max(a.tolerance, b.tolerance, a.precision, b.precision)
    # At a step without a learning rate the decay is not seen.
    seen = (np.abs(a.lr) > 1e-6 * np.abs(a.lr).max()) & (np.abs(b.lr) > 1e-6 * np.abs(b.lr).max())
    differ = np.abs(x - y)[seen] > close * np.maximum(np.abs(x), np.abs(y))[seen]
    if (ways[0] != ways[1] and not plain) or differ.any():
        said = [words[way].format(_series(v[seen])) for way, v in zip(ways, (x, y), strict=True)]
        evidence = f"PyTorch {said[0]}, Flax {said[1]}"
        if ways[0] == ways[1] or plain:
            evidence = f"weight decay is {_series(x[seen])} in PyTorch and {_series(y[seen])} in Flax"
        yield Finding("weight-decay-coupling", evidence)


def _momenta(a: Description, b: Description) -> Iterator[Finding]:
    if a.algorithm == "SGD" and not a.values["momentum"] * b.values["momentum"]:
        return  # without momentum there is nothing to dampen, and nowhere to look ahead
    if abs(a.dampening[0] - b.dampening[0]) > 1e-4 or (a.dampening[0] and a.dampening[1] != b.dampening[1]):
        said = [
            f"{_text(d.dampening[0])}" + (", from the first step on" if d.dampening[0] and d.dampening[1] else "")
            for d in (a, b)
        ]
        evidence = f"dampening is {said[0]} in PyTorch and {said[1]} in Flax: a gradient enters the momentum times "
        yield Finding("momentum-dampening", evidence + f"{_text(1 - a.dampening[0])} and {_text(1 - b.dampening[0])}")
    if a.nesterov != b.nesterov:
        if a.nesterov and b.nesterov:
            kinds = {"torch": "with PyTorch's schedule for beta1", "optax": "as optax.nadam", "plain": "uncorrected"}
            said = [f"{side} {kinds.get(d.nesterov, d.nesterov)}" for side, d in (("PyTorch", a), ("Flax", b))]
            yield Finding("nesterov", "both look ahead, " + ", ".join(said))
        else:
            side = "PyTorch" if a.nesterov else "Flax"
            yield Finding("nesterov", f"only {side} looks ahead (Nesterov)")


def _rates(a: Description, b: Description) -> Iterator[Finding]:
    close = max(a.tolerance, b.tolerance)
    if np.allclose(a.lr, b.lr, rtol=close, atol=close * np.abs(a.lr).max() * 1e-3):
        return
    used = (np.abs(a.lr) > 0) & (np.abs(b.lr) > 0)
    ratio = a.lr[used] / b.lr[used]
    if ratio.size and np.allclose(ratio, ratio[0], rtol=close, atol=0) and used.all():
        same = f", a factor of {_text(ratio[0])}"
    else:
        same = ": another schedule"
    yield Finding("learning-rate", f"the learning rate is {_series(a.lr)} in PyTorch and {_series(b.lr)} in Flax{same}")


def _other_algorithm(a: Description, b: Description) -> Finding:
    return Finding("unexplained", f"PyTorch's optimiser is {_name(a)}, Flax's {_name(b)}")


def _name(d: Description) -> str:
    values = {"lr": d.lr[0], **d.values}
    if d.epsilon[1]:
        values["epsilon"] = d.epsilon[1]
    return f"{d.algorithm}({', '.join(f'{k}={_text(v)}' for k, v in values.items())})"


def _series(values: NDArray) -> str:
    if len(values) and np.allclose(values, values[0], rtol=1e-5, atol=0):
        return _text(values[0])
    return ", ".join(_text(v) for v in values[:4]) + (", ..." if len(values) > 4 else "")


def _text(value: float) -> str:
    return f"{float(value):.4g}"
