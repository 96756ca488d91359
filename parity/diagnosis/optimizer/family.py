"""Are a torch optimiser and an optax transformation the same update rule, and if not, which mistake is it?

Both were asked the same questions (`records/answers.py`), each side alone is fitted to a family of rules
(`rules`, `fit`), and the two descriptions are compared here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.finding import Finding
from parity.diagnosis.mistakes import rank
from parity.diagnosis.optimizer.clipping import Clipping, Fit, clipping_findings, fits, unlike
from parity.diagnosis.optimizer.descriptions import Description, choose, describe_in_words, readings, series, text
from parity.diagnosis.optimizer.fit import adopt
from parity.diagnosis.optimizer.rules import LOOSER, Rule
from parity.records.answers import Answers, Response

LARGEST = 1e100
"""No update is as large: its square is a number, too."""


def findings(answers: Sequence[Answers], *, tolerance: float = 1e-9) -> list[Finding]:
    """Compares two optimisers as update rules, from what they answered to designed gradients.

    Args:
      answers: of both sides to the same questions, a tensor each, see `records.answers.matched`.
      tolerance: up to which the updates of an element, relative to its largest so far, count as equal.

    Returns:
      [] for the same rule; otherwise what differs, each mistake once, with the names of the parameters if it is not
      all of them.
    """
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
    for code in sorted(per_code, key=rank):
        evidence, names = per_code[code]
        found.append(Finding(code, evidence + _where(names, len(answers))))
    return found


def _where(names: list[str], total: int) -> str:
    if len(names) == total:
        return ""
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f" (for {len(names)} of {total} parameters: {listed})"


class _Side:
    """What the tensors so far have shown of a side: what fitted, and whether nothing did."""

    def __init__(self) -> None:
        self.known: list[tuple[Clipping, Rule]] = []
        self.failed = False

    def fits(self, response: Response, tolerance: float, decays: Sequence[float]) -> list[Fit]:
        found = fits(response, tolerance, self.known, self.failed, decays)
        self.failed |= not found
        for fit in found:
            others = [rule for clipping, rule in self.known if clipping == fit.clipping]
            new = [rule for rule in fit.rules if not any(rule[:2] == other[:2] for other in others)]
            self.known += [(fit.clipping, rule) for rule in new]
        return found

    @property
    def decays(self) -> list[float]:
        """Weight decays that this side adds to its gradients."""
        return [rule.numbers.l2 for _, rule in self.known if rule.numbers.l2]


def _explain(answer: Answers, tolerance: float, known: tuple[_Side, _Side]) -> list[Finding]:
    for response, side, other in ((answer.torch, "PyTorch", "Flax"), (answer.flax, "Flax", "PyTorch")):
        if not np.all(np.abs(response.updates) < LARGEST):
            said = f"{side}'s optimiser makes NaN, infinity or more than {LARGEST:g} of gradients from 1e-9 to 100"
            return [Finding("unexplained", f"{said}; {other}'s updates differ")]
        if not response.updates.any():
            return [Finding("unexplained", f"{side}'s optimiser leaves the parameters as they are, {other}'s does not")]
    fitted = [known[0].fits(answer.torch, tolerance, []), known[1].fits(answer.flax, tolerance, known[0].decays)]
    if not fitted[0] and known[1].decays:
        fitted[0] = fits(answer.torch, tolerance, decays=known[1].decays)
    if not all(fitted):
        return _unfitted(answer, [[rule for fit in side for rule in fit.rules] for side in fitted], tolerance)
    mine, theirs = min(product(*fitted), key=lambda pair: unlike(pair[0].clipping, pair[1].clipping))
    rules = [adopt(theirs.response, rule, mine.rules[0], tolerance) for rule in theirs.rules]
    a, b = choose(_readings(mine, mine.rules), _readings(theirs, rules), answer.torch.rates)
    a, b = _at_steps(a, b, mine, theirs)
    clipped = list(clipping_findings(mine.clipping, theirs.clipping))
    if a.algorithm != b.algorithm:
        return [*clipped, _other_algorithm(a, b)]
    found = [*clipped, *_compare(a, b)]
    rounding = max(LOOSER[0], *(100 * rule.error for fit in (mine, theirs) for rule in fit.rules[:1]))
    if not found and answer.worst > rounding:
        evidence = f"both optimisers are {describe_in_words(a)}, yet their updates differ by up to"
        return [Finding("unexplained", f"{evidence} {text(answer.worst)} relative")]
    return found


def _readings(fit: Fit, rules: list[Rule]) -> list[Description]:
    """The descriptions of a rule; weight decay that is added before the clipping is weight decay all the same."""
    added = fit.clipping.decay
    if added:
        rules = [rule._replace(numbers=rule.numbers._replace(l2=rule.numbers.l2 + added)) for rule in rules]
    return readings(rules, fit.response)


def _at_steps(a: Description, b: Description, mine: Fit, theirs: Fit) -> tuple[Description, Description]:
    """With the learning rates of the steps at which both show; where none does, they count as equal."""
    if mine.steps is None and theirs.steps is None:
        return a, b
    seen = np.logical_and(*(np.ones(len(a.lr), bool) if fit.steps is None else fit.steps for fit in (mine, theirs)))
    if not seen.any():
        return a, b._replace(lr=a.lr, decay=a.decay)
    return a._replace(lr=a.lr[seen], decay=a.decay[seen]), b._replace(lr=b.lr[seen], decay=b.decay[seen])


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
            return [Finding("learning-rate", f"every update of PyTorch is {text(factor)} times Flax's")]
    sides = [name for name, rules in zip(("PyTorch", "Flax"), fitted, strict=True) if not rules]
    known = [describe_in_words(readings(rules, None)[0]) for rules in fitted if rules]
    also = f", the other side's is {known[0]}" if known else ""
    which = f"neither {sides[0]}'s nor {sides[1]}'s" if len(sides) == 2 else f"{sides[0]}'s"
    negated = "is" if len(sides) == 2 else "is not"
    evidence = (
        f"the updates differ by up to {text(answer.worst)} relative, and {which} optimiser {negated} a known one "
        f"(SGD, Adam, RMSprop, Adagrad and their variants){also}"
    )
    return [Finding("unexplained", evidence)]


def _compare(a: Description, b: Description) -> list[Finding]:
    found = [*_epsilons(a, b), *_corrections(a, b), *_decays(a, b), *_momenta(a, b), *_rates(a, b)]
    close = max(a.precision, b.precision)
    others = []
    for name in {**a.values, **b.values}:
        x, y = a.values.get(name, 0.0), b.values.get(name, 0.0)
        if abs(x - y) > close * (1 if name.startswith("beta") else max(abs(x), abs(y))) and abs(x - y) > 1e-9:
            digits = 4 if text(x) != text(y) else 10
            others.append(f"{name} is {x:.{digits}g} in PyTorch and {y:.{digits}g} in Flax")
    if others and found:
        also = "; besides, " + ", ".join(others)
        return [replace(found[0], evidence=found[0].evidence + also), *found[1:]]
    return found or [Finding("unexplained", f"{a.algorithm}: " + ", ".join(others))] if others else found


def _epsilons(a: Description, b: Description) -> Iterator[Finding]:
    (where, x), (there, y) = a.epsilon, b.epsilon
    if not (x or y) or _uncorrected_alike(a, b):
        return
    both = x and y
    if abs(x - y) > 1e-4 * max(x, y) + max(a.precision, b.precision) * max(x, y) or (both and where != there):
        evidence = f"epsilon is {text(x)}, {where}, in PyTorch and {text(y)}, {there}, in Flax"
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
        yield Finding("bias-correction", f"{evidence}; after one step 1/(1 - beta^t) is {text(1 / (1 - beta))}")


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
        said = [words[way].format(series(v[seen])) for way, v in zip(ways, (x, y), strict=True)]
        evidence = f"PyTorch {said[0]}, Flax {said[1]}"
        if ways[0] == ways[1] or plain:
            evidence = f"weight decay is {series(x[seen])} in PyTorch and {series(y[seen])} in Flax"
        yield Finding("weight-decay-coupling", evidence)


def _momenta(a: Description, b: Description) -> Iterator[Finding]:
    if a.algorithm == "SGD" and not a.values["momentum"] * b.values["momentum"]:
        return  # without momentum there is nothing to dampen, and nowhere to look ahead
    if abs(a.dampening[0] - b.dampening[0]) > 1e-4 or (a.dampening[0] and a.dampening[1] != b.dampening[1]):
        said = [
            f"{text(d.dampening[0])}" + (", from the first step on" if d.dampening[0] and d.dampening[1] else "")
            for d in (a, b)
        ]
        evidence = f"dampening is {said[0]} in PyTorch and {said[1]} in Flax: a gradient enters the momentum times "
        yield Finding("momentum-dampening", evidence + f"{text(1 - a.dampening[0])} and {text(1 - b.dampening[0])}")
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
        same = f", a factor of {text(ratio[0])}"
    else:
        same = ": another schedule"
    yield Finding("learning-rate", f"the learning rate is {series(a.lr)} in PyTorch and {series(b.lr)} in Flax{same}")


def _other_algorithm(a: Description, b: Description) -> Finding:
    return Finding("unexplained", f"PyTorch's optimiser is {describe_in_words(a)}, Flax's {describe_in_words(b)}")
