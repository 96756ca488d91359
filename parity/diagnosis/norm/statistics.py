"""The update of a batch norm's moving statistics, fitted: the weight of the old value, and which variance is kept.

new_mean = a * mean + (1 - a) * mu,   new_var = a * var + (1 - a) * k * sigma^2,   k = 1 or m/(m-1)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from parity.diagnosis.family import SIDES, Family, Property, of_each, unlike
from parity.diagnosis.finding import Finding, told_apart
from parity.diagnosis.intervals import MOMENTA, Interval, intersection
from parity.diagnosis.norm.forward import EPS, NormBehaviour, unbiased_factor
from parity.diagnosis.norm.sources import Array, NormSide, Source, batch, chunks, other_axes

ONE = Interval(1.0, 1.0, 1.0)


class Update(NamedTuple):
    """How one side updates its moving statistics, as fitted.

    Attributes:
      source: which batch statistics go in.
      unbiased: whether the variance goes in as the unbiased one.
      mean: weight of the old value in moving_mean, all that fit.
      var: the same in moving_var.
      unusual: whether the source is neither the batch nor what this side normalises with.
    """

    source: Source
    unbiased: bool
    mean: Interval
    var: Interval
    unusual: bool

    @property
    def weight(self) -> Interval:
        """Weight of the old value, where mean and variance have the same; empty where they have not."""
        return self.mean.meet(self.var)


def statistics_agree(torch: NormSide, flax: NormSide, tolerance: float) -> bool:
    """Whether both sides have the same moving statistics after the call (or neither has any)."""
    pairs = ((torch.new_mean, flax.new_mean, 1), (torch.new_var, flax.new_var, 2))
    return all(_agree(a, b, torch.x, power, tolerance) for a, b, power in pairs)


def initial_findings(torch: NormSide, flax: NormSide, tolerance: float) -> list[Finding]:
    """What the moving statistics before the call show: initial-variance, or unexplained where others differ."""
    if torch.mean is None or torch.var is None or flax.mean is None or flax.var is None:
        return []
    means, variances = (torch.mean, flax.mean), (torch.var, flax.var)
    means_agree = _close(*means, tolerance)
    if means_agree and _close(*variances, tolerance):
        return []
    words = [_constant(var) for var in variances]
    if not _close(*variances, tolerance) and any(words):
        held = [f"{word or 'not constant'} in {name}" for word, name in zip(words, SIDES, strict=True)]
        evidence = f"moving_var before the call is {held[0]}, {held[1]}"
        return [Finding("initial-variance", evidence if means_agree else f"{evidence}; moving_mean differs as well")]
    if _close(torch.mean, flax.var, tolerance) and _close(torch.var, flax.mean, tolerance):
        return [Finding("unexplained", "moving_mean and moving_var are exchanged on one side before the call")]
    which = "moving_var" if means_agree else "moving_mean"
    largest = max(float(np.abs(a - b).max()) for a, b in (means, variances))
    return [Finding("unexplained", f"{which} differs before the call already, by up to {largest:.3g}")]


def update_findings(
    torch: NormSide,
    flax: NormSide,
    forward: tuple[NormBehaviour | None, NormBehaviour | None],
    tolerance: float,
) -> list[Finding]:
    """Compares the two updates in training; what follows from the forward pass alone is left out.

    Args:
      torch: PyTorch's side.
      flax: Flax's side.
      forward: how each side normalises; None: unknown.
      tolerance: relative to the largest value of each statistic.

    Returns:
      statistics-frozen, momentum-inverted, momentum, unbiased-variance, per-device-statistics, wrong-reduction-axes or
      unexplained; none where the new statistics agree.
    """
    keeps = [side.new_mean is not None and side.new_var is not None for side in (torch, flax)]
    if not any(keeps):
        return []
    if not all(keeps):
        return [Finding("statistics-frozen", f"{SIDES[keeps.index(False)]} keeps no moving statistics")]
    broken = [name for name, side in zip(SIDES, (torch, flax), strict=True) if not _finite(side)]
    if broken:
        return [Finding("unexplained", f"the new moving statistics of {' and '.join(broken)} are not finite")]
    sources = [fit.source if fit is not None and fit.source.values is not None else None for fit in forward]
    fitted = [_updates(side, source, tolerance) for side, source in zip((torch, flax), sources, strict=True)]
    strange = forward[0] is None or forward[1] is None or forward[0].source.name != forward[1].source.name
    family = _family(forward)
    pair = family.nearest(*fitted)
    if pair is not None:
        return family.findings(*pair)
    found = []
    for name, side, options in zip(SIDES, (torch, flax), fitted, strict=True):
        if not options and (evidence := _two_weights(side, tolerance)):
            found.append(Finding("momentum", f"{name}: {evidence}"))
        elif not options and not strange:
            found.append(Finding("unexplained", f"no known update gives the new moving statistics of {name}"))
    return found


def still_findings(torch: NormSide, flax: NormSide, explained: Sequence[bool], tolerance: float) -> list[Finding]:
    """In prediction no statistics may move; one that does is unexplained, unless its side normalises by the batch."""
    if statistics_agree(torch, flax, tolerance):
        return []
    found = []
    for name, side, known in zip(SIDES, (torch, flax), explained, strict=True):
        pairs = ((side.mean, side.new_mean, "moving_mean"), (side.var, side.new_var, "moving_var"))
        moved = [(a, b, which) for a, b, which in pairs if a is not None and b is not None]
        moved = [(a, b, which) for a, b, which in moved if not _close(a, b, tolerance)]
        if moved and not known:
            largest = max(float(np.abs(a - b).max()) for a, b, _ in moved)
            which = " and ".join(which for *_, which in moved)
            found.append(Finding("unexplained", f"{name} moves {which} in prediction, by up to {largest:.3g}"))
    return found


def _finite(side: NormSide) -> bool:
    return all(np.isfinite(value).all() for value in (side.new_mean, side.new_var) if value is not None)


def _constant(var: Array) -> str:
    return next((f"{value} everywhere" for value in (0, 1) if (var == value).all()), "")


def _close(one: Array, other: Array, tolerance: float) -> bool:
    # As the caller's numbers go: a NaN is close to nothing.
    return bool(np.abs(one - other).max() <= tolerance * max(np.abs(one).max(), np.abs(other).max()))


def _slack(values: Iterable[Array], x: Array, power: int, tolerance: float) -> Array:
    """Per channel: the tolerance, and what rounding a large mean costs (of the variance: its square)."""
    largest = np.abs(x).max(axis=tuple(range(x.ndim - 1)))
    return tolerance * max(float(np.nanmax(np.abs(value), initial=0.0)) for value in values) + 16 * EPS * largest**power


def _agree(one: Array | None, other: Array | None, x: Array, power: int, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    return bool(np.isclose(one, other, rtol=0, atol=_slack((one, other), x, power, tolerance), equal_nan=True).all())


def _updates(side: NormSide, source: Source | None, tolerance: float) -> list[Update]:
    """Every update that gives the side's new statistics: from what it normalises with, else from anything."""
    likely = [batch(side.x)] if source is None or source.kind == "batch" else [source, batch(side.x)]
    found = [update for one in likely for update in _fits(side, one, tolerance, unusual=False)]
    if any(not update.weight.empty for update in found):
        return found
    others = itertools.chain(other_axes(side.x), chunks(side.x))
    more = [update for one in others for update in _fits(side, one, tolerance, unusual=True)]
    return found + [update for update in more if not update.weight.empty]


def _fits(side: NormSide, source: Source, tolerance: float, *, unusual: bool) -> list[Update]:
    mean, var = _per_channel(source.mean, side.x), _per_channel(source.var, side.x)
    found = []
    for unbiased in (False, True):
        factor = unbiased_factor(source.values) if unbiased else 1.0
        if not math.isfinite(factor):
            continue
        weights = (
            _weight(side.mean, side.new_mean, mean, side.x, 1, tolerance),
            _weight(side.var, side.new_var, factor * var, side.x, 2, tolerance),
        )
        if not any(weight.empty for weight in weights):
            found.append(Update(source, unbiased, *weights, unusual))
    return found


def _per_channel(statistic: Array, x: Array) -> Array:
    """One number a channel: the average where the source has several."""
    average = statistic.mean(axis=tuple(range(statistic.ndim - 1))) if statistic.ndim > 1 else statistic
    return np.broadcast_to(average, x.shape[-1:])


def _weight(old: Array | None, new: Array | None, now: Array, x: Array, power: int, tolerance: float) -> Interval:
    """All a with new = a * old + (1 - a) * now."""
    assert new is not None
    old = new if old is None else old
    slack = _slack((old, new), x, power, tolerance)
    move, share = new - now, old - now
    says = np.abs(share) > slack
    if (np.abs(move)[~says] > 2 * slack[~says]).any():
        return Interval(math.inf, -math.inf, math.nan)
    a = move[says] / share[says]
    error = slack[says] / np.abs(share[says])
    return intersection(a - error, a + error, a).meet(Interval(0.0, 1.0, 0.5))


def _family(forward: Sequence[NormBehaviour | None]) -> Family[Update]:
    """What two updates may differ in, of sides that normalise like `forward`."""
    return Family(
        Property("source", _other_source, of_each(_source_finding)),
        Property(
            "weight",
            lambda torch, flax: sum(a.meet(b).empty for a, b, _ in _weights(torch, flax)),
            lambda torch, flax: [f for w in _weights(torch, flax) for f in _weight_findings(*w, forward)],
        ),
        Property("unbiased", unlike("unbiased"), of_each(_unbiased_finding)),
        oddity=_pair_oddity,
    )


def _weights(torch: Update, flax: Update) -> list[tuple[Interval, Interval, str]]:
    """The weights to be compared: one momentum serves both statistics, nearly always; but one may be forgotten."""
    if torch.weight.empty or flax.weight.empty:
        return [(torch.mean, flax.mean, "moving_mean"), (torch.var, flax.var, "moving_var")]
    return [(torch.weight, flax.weight, "moving_mean and moving_var")]


def _pair_oddity(torch: Update, flax: Update) -> float:
    """How unusual two updates are, one weight counted once where it fits both."""
    odd = (torch.unusual + flax.unusual) / 2 + 0.05 * (torch.unbiased + flax.unbiased)
    odd += 1.25 * (torch.weight.empty + flax.weight.empty)
    for a, b, _ in _weights(torch, flax):
        shared = a.meet(b)
        odd += sum(_oddity(weight) for weight in ((a, b) if shared.empty else (shared,)))
    return odd


def _oddity(weight: Interval) -> float:
    """0 for a usual momentum, up to 0.5 for an odd one."""
    value, oddity = weight.round(MOMENTA)
    _, of_complement = Interval(1 - weight.high, 1 - weight.low, 1 - weight.best).round(MOMENTA)
    of_four_digits = 0.4 if weight.holds(round(value, 4)) else 1.5
    return min(oddity, of_complement, of_four_digits) / 3


def _other_source(torch: Update, flax: Update) -> bool:
    return torch.source.name != flax.source.name and (torch.unusual or flax.unusual)


def _source_finding(name: str, update: Update, other: Update) -> Iterator[Finding]:
    if update.unusual:
        code = "per-device-statistics" if update.source.kind in ("chunks", "part") else "wrong-reduction-axes"
        yield Finding(code, f"{name} updates its moving statistics from {update.source.name}")


def _unbiased_finding(name: str, update: Update, other: Update) -> Iterator[Finding]:
    if update.unbiased:
        # Without the number, which is another in each layer: it is one mistake.
        evidence = "moving_var differs by the factor m/(m-1) in the batch's share, of m values each"
        yield Finding("unbiased-variance", f"{evidence}: {name} keeps the unbiased variance")


def _weight_findings(
    torch: Interval, flax: Interval, which: str, forward: Sequence[NormBehaviour | None]
) -> list[Finding]:
    """Two weights of the old value that no number serves: frozen, inverted, or just different."""
    if not torch.meet(flax).empty:
        return []
    a, b = torch.round(MOMENTA)[0], flax.round(MOMENTA)[0]
    for name, other, weight, number, fit in ((*SIDES, torch, b, forward[0]), (*SIDES[::-1], flax, a, forward[1])):
        if not weight.meet(ONE).empty:
            if fit is not None and fit.source.kind in ("moving", "updated"):
                return []
            evidence = f"{name} leaves {which} unchanged; in {other} the old value keeps the weight {number:.6g}"
            return [Finding("statistics-frozen", evidence)]
    texts = told_apart(a, b)
    evidence = f"the weight of the old value in {which} is {texts[0]} in PyTorch, {texts[1]} in Flax"
    complement = Interval(1 - flax.high, 1 - flax.low, 1 - flax.best)
    if not torch.meet(complement).empty:
        return [Finding("momentum-inverted", f"{evidence}: one is 1 minus the other")]
    return [Finding("momentum", evidence)]


def _two_weights(side: NormSide, tolerance: float) -> str:
    """Weights of old and new that do not sum to 1; "" if that is not it either."""
    if side.mean is None or side.var is None or side.new_mean is None or side.new_var is None or side.x.shape[-1] < 2:
        return ""
    source = batch(side.x)
    new = np.concatenate([side.new_mean, side.new_var])
    old = np.concatenate([side.mean, side.var])
    slack = np.concatenate([_slack((new[: side.mean.size],), side.x, 1, tolerance),
                            _slack((new[side.mean.size :],), side.x, 2, tolerance)])  # fmt: skip
    for factor, what in ((1.0, ""), (unbiased_factor(source.values), " (unbiased variance)")):
        if not math.isfinite(factor):
            continue
        now = np.concatenate([_per_channel(source.mean, side.x), factor * _per_channel(source.var, side.x)])
        columns = np.stack([old, now], axis=1)
        weights, _, rank, _ = np.linalg.lstsq(columns / slack[:, None], new / slack, rcond=None)
        if rank == 2 and (np.abs(columns @ weights - new) <= 2 * slack).all():
            sums = f"which do not sum to 1{what}"
            return f"the old statistics have the weight {weights[0]:.6g}, the batch's {weights[1]:.6g}, {sums}"
    return ""
