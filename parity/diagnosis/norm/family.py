"""Batch norm and its relatives, explained from their numbers: forward pass, moving statistics, derivative.

Each side is fitted alone to a family of behaviours; the findings are what the two behaviours differ in.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from parity.diagnosis.family import SIDES, Family, Property, of_each, unlike
from parity.diagnosis.finding import Finding, told_apart
from parity.diagnosis.mistakes import rank
from parity.diagnosis.norm.affine import affine_findings
from parity.diagnosis.norm.forward import (
    NormBehaviour,
    candidates,
    likeliest,
    pair_oddity,
    rounding,
    unbiased_factor,
)
from parity.diagnosis.norm.gradient import gradient_findings, gradients_agree
from parity.diagnosis.norm.sources import (
    Array,
    NormSide,
    Source,
    batch,
    channel_groups,
    chunks,
    moving,
    other_axes,
    reduced_over,
)
from parity.diagnosis.norm.statistics import initial_findings, statistics_agree, still_findings, update_findings

# How each side normalises; None: it fits nothing.
Pair = tuple[NormBehaviour | None, NormBehaviour | None]


class _Search:
    """The sources that one kind of layer is fitted to: the likely ones, the proper one first, and all others."""

    def __init__(self, side: NormSide, kind: str, *, train: bool) -> None:
        self.side, self.kind = side, kind
        self.likely, proper = _likely(side, kind, train=train)
        self.order = {source.name: max(0, number - proper) for number, source in enumerate(self.likely)}

    def fits(self, tolerance: float) -> list[NormBehaviour]:
        return candidates(self.side, tolerance, self.likely, self.others)

    def others(self) -> Iterator[Source]:
        x = self.side.x
        known = {source.name for source in self.likely}
        found: Iterable[Source] = other_axes(x)
        if self.kind == "batch":
            found = itertools.chain(found, chunks(x))
        else:
            found = itertools.chain([batch(x)], found, channel_groups(x), other_axes(x, centred=False))
        return (source for source in found if source.name not in known)


def describe(side: NormSide, tolerance: float, *, train: bool = True) -> NormBehaviour | None:
    """How a batch norm's forward pass works, from its numbers.

    Args:
      side: what the layer did in one call.
      tolerance: how far y may be off, relative to its largest value.
      train: which statistics to prefer where the batch's and the moving ones both fit.

    Returns:
      The most usual behaviour that gives y; None if none does.
    """
    with np.errstate(all="ignore"):
        search = _Search(_checked(side, "the side"), "batch", train=train)
        return likeliest(search.fits(tolerance), search.order)


def batch_norm_findings(torch: NormSide, flax: NormSide, *, train: bool, tolerance: float = 1e-9) -> list[Finding]:
    """Why two batch norms differ that were given the same input.

    Args:
      torch: what PyTorch's layer did, channels last.
      flax: what Flax's layer did.
      train: the mode that both were called in.
      tolerance: how far the sides may be off by rounding, relative to the largest value of each array.

    Returns:
      The mistakes, the most fundamental first; "unexplained" where a side fits nothing; none where the sides agree.

    Raises:
      ValueError: arrays of one side, or of the two, have different shapes.
    """
    return _findings(torch, flax, "batch", tolerance, train=train)


def layer_norm_findings(torch: NormSide, flax: NormSide, *, tolerance: float = 1e-9) -> list[Finding]:
    """Why two layer norms (or RMS norms) differ that were given the same input; as `batch_norm_findings`.

    gamma and beta have the shape of the axes that are normalised, [C] for the channels alone.
    """
    return _findings(torch, flax, "layer", tolerance)


def group_norm_findings(torch: NormSide, flax: NormSide, *, tolerance: float = 1e-9) -> list[Finding]:
    """Why two group norms (or instance norms) differ that were given the same input; as `batch_norm_findings`."""
    return _findings(torch, flax, "group", tolerance)


def _findings(torch: NormSide, flax: NormSide, kind: str, tolerance: float, *, train: bool = True) -> list[Finding]:
    # Hypotheses that do not fit may divide by zero; they fail by what comes out of it.
    with np.errstate(all="ignore"):
        return _ordered(_Comparison(torch, flax, kind, train=train, tolerance=tolerance).findings())


class _Comparison:
    """The two sides, and step by step what they differ in."""

    def __init__(self, torch: NormSide, flax: NormSide, kind: str, *, train: bool, tolerance: float) -> None:
        self.torch, self.flax = (_checked(side, name) for side, name in zip((torch, flax), SIDES, strict=True))
        if torch.x.shape != flax.x.shape:
            raise ValueError(f"the shape of Flax's x is {flax.x.shape}; allowed: PyTorch's, {torch.x.shape}")
        self.kind, self.train, self.tolerance = kind, train, tolerance

    def findings(self) -> list[Finding]:
        found = list(_presence_findings(self.torch, self.flax))
        outputs_agree = self._outputs_agree()
        statistics = statistics_agree(self.torch, self.flax, self.tolerance)
        initial = initial_findings(self.torch, self.flax, self.tolerance)
        gradients = gradients_agree(self.torch, self.flax, self._own_sources(self.torch), self.tolerance)
        if outputs_agree and statistics and not initial and gradients:
            return found
        if broken := [n for n, side in zip(SIDES, (self.torch, self.flax), strict=True) if not _finite(side)]:
            return [*found, Finding("unexplained", f"input or output of {' and '.join(broken)} is not finite")]
        fitted, pair = self._behaviours()
        forward: list[Finding] = []
        if not outputs_agree:
            forward = self._forward_findings(fitted, pair)
        found += forward + initial
        if not statistics:
            found += self._statistics_findings(pair)
        if not (outputs_agree and gradients):
            found += gradient_findings(self.torch, self.flax, pair, self.tolerance, agree=outputs_agree)
        return found if found or outputs_agree else list(_unequal_findings(self.torch, self.flax, self.tolerance))

    def _outputs_agree(self) -> bool:
        largest = max(np.abs(self.torch.y).max(), np.abs(self.flax.y).max())
        axes = tuple(range(self.torch.x.ndim - 1))
        slack = np.zeros(())
        for side in (self.torch, self.flax):
            scale = np.ones(()) if side.gamma is None else side.gamma
            for source in self._own_sources(side):
                slack = np.maximum(slack, rounding(side.x, source, scale, axes))
        y, other = self.torch.y, self.flax.y
        return bool((np.isclose(y, other, rtol=0, atol=self.tolerance * largest + slack, equal_nan=True)).all())

    def _own_sources(self, side: NormSide) -> list[Source]:
        """What says how large rounding may be: the statistics that a batch norm should use in this mode."""
        return _likely(side, "batch", train=self.train)[0][:1] if self.kind == "batch" else []

    @functools.cached_property
    def _searches(self) -> tuple[_Search, _Search]:
        return _Search(self.torch, self.kind, train=self.train), _Search(self.flax, self.kind, train=self.train)

    @functools.cached_property
    def _order(self) -> dict[str, int]:
        return {**self._searches[1].order, **self._searches[0].order}

    @functools.cached_property
    def _family(self) -> Family[NormBehaviour]:
        return Family(
            Property("source", lambda a, b: a.source.name != b.source.name, of_each(self._source_findings)),
            Property("affine", unlike("affine"), of_each(lambda name, fit, _: affine_findings(name, fit.affine))),
            Property("outside", unlike("outside"), of_each(_outside_findings)),
            Property("unbiased", unlike("unbiased"), of_each(_unbiased_findings)),
            Property("epsilon", lambda a, b: a.epsilon.meet(b.epsilon).empty, _epsilon_findings),
            oddity=lambda a, b: pair_oddity(a, b, self._order),
        )

    def _behaviours(self) -> tuple[list[list[NormBehaviour]], Pair]:
        fitted = [search.fits(self.tolerance) for search in self._searches]
        pair = self._family.nearest(*fitted)
        if pair is None:
            return fitted, (likeliest(fitted[0], self._order), likeliest(fitted[1], self._order))
        # An epsilon that fits both sides is narrowed to what both share.
        shared = pair[0].epsilon.meet(pair[1].epsilon)
        return fitted, pair if shared.empty else (pair[0]._replace(epsilon=shared), pair[1]._replace(epsilon=shared))

    def _forward_findings(self, fitted: Sequence[Sequence[NormBehaviour]], pair: Pair) -> list[Finding]:
        torch, flax = pair
        found = list(_parameter_findings(self.torch, self.flax, self.tolerance))
        if torch is None or flax is None:
            unknown = [name for name, options in zip(SIDES, fitted, strict=True) if not options]
            what = "is that of no known norm: no source of mean and variance, epsilon or affine map gives it"
            return [*found, Finding("unexplained", f"the output of {' and '.join(unknown)} {what}")]
        return found + self._family.findings(torch, flax)

    def _source_findings(self, name: str, fit: NormBehaviour, other: NormBehaviour) -> Iterator[Finding]:
        kind, evidence = fit.source.kind, f"{name} normalises with {fit.source.name}"
        if self.kind != "batch":
            # What is proper is known for layer norm only; of two group norms, Flax's is told against PyTorch's.
            proper = _likely(self.torch, "layer", train=True)[0][0].name if self.kind == "layer" else ""
            if fit.source.name != proper and (proper or name == "Flax"):
                alike = fit.source.centred == other.source.centred
                evidence = f"{evidence}, {_other(name)} with {other.source.name}"
                yield Finding("wrong-reduction-axes" if alike else "unexplained", evidence)
        elif kind == "axes":
            yield Finding("wrong-reduction-axes", evidence)
        elif kind in ("moving", "updated"):
            if self.train:
                yield Finding("train-uses-moving-statistics", f"{evidence} in training")
        else:
            if not self.train:
                yield Finding("eval-uses-batch-statistics", f"{evidence} in prediction")
            if kind in ("chunks", "part"):
                yield Finding("per-device-statistics", evidence)

    def _statistics_findings(self, pair: Pair) -> list[Finding]:
        if self.kind != "batch":
            return []
        if self.train:
            return update_findings(self.torch, self.flax, pair, self.tolerance)
        by_batch = [fit is not None and fit.source.kind not in ("moving", "updated") for fit in pair]
        return still_findings(self.torch, self.flax, by_batch, self.tolerance)


def _likely(side: NormSide, kind: str, *, train: bool) -> tuple[list[Source], int]:
    """The likely sources, best first, and the place of the last one that is proper."""
    x = side.x
    if kind == "batch":
        return ([batch(x), *moving(side)] if train else [*moving(side), batch(x)]), 0
    if kind == "group":
        groups = list(channel_groups(x))
        return groups, sum("interleaved" not in source.name for source in groups) - 1
    trailing = max([1, *(p.ndim for p in (side.gamma, side.beta) if p is not None)])
    axes = tuple(range(x.ndim - trailing, x.ndim))
    return [reduced_over(x, axes), reduced_over(x, axes, centred=False)], 1


def _other(name: str) -> str:
    return SIDES[1 - SIDES.index(name)]


def _presence_findings(torch: NormSide, flax: NormSide) -> Iterator[Finding]:
    """Parameters that one side has and the other has not."""
    missing = [{name for name in ("gamma", "beta") if getattr(side, name) is None} for side in (torch, flax)]
    for name, lacks in zip(SIDES, (missing[0] - missing[1], missing[1] - missing[0]), strict=True):
        if "gamma" in lacks:
            words = "neither scale nor bias" if "beta" in lacks else "no scale"
            yield Finding("affine-missing", f"{name} has {words}, {_other(name)} has")
        elif lacks:
            yield Finding("bias-missing", f"{name} has no bias, {_other(name)} has")


def _parameter_findings(torch: NormSide, flax: NormSide, tolerance: float) -> Iterator[Finding]:
    """Parameters that both sides have with other values, where the values say what happened to them."""
    if torch.gamma is None or torch.beta is None or flax.gamma is None or flax.beta is None:
        return
    scales, biases = (torch.gamma, flax.gamma), (torch.beta, flax.beta)

    def same(one: Array, other: Array) -> bool:
        return bool(np.abs(one - other).max() <= tolerance * max(np.abs(one).max(), np.abs(other).max()))

    if same(*scales) and same(*biases):
        return
    if same(torch.gamma, flax.beta) and same(torch.beta, flax.gamma):
        yield Finding("affine-swapped", "the gamma of PyTorch is the beta of Flax, and the other way round")
        return
    for number, name in enumerate(SIDES):
        if not same(*scales) and (scales[number] == 1).all():
            both = not same(*biases) and (biases[number] == 0).all()
            yield Finding("affine-missing", f"gamma is 1{' and beta 0' if both else ''} everywhere in {name} only")
        elif not same(*biases) and (biases[number] == 0).all():
            yield Finding("bias-missing", f"beta is 0 everywhere in {name} only")


def _outside_findings(name: str, fit: NormBehaviour, other: NormBehaviour) -> Iterator[Finding]:
    if fit.outside:
        evidence = f"{name} divides by sqrt(var) + {fit.round_epsilon:.4g}, {_other(name)} by sqrt(var + epsilon)"
        yield Finding("epsilon-outside-sqrt", evidence)


def _unbiased_findings(name: str, fit: NormBehaviour, other: NormBehaviour) -> Iterator[Finding]:
    if fit.unbiased:
        m = fit.source.values or 0
        factor = f"{m}/{m - 1} = m/(m-1) = {unbiased_factor(m):.6g} times the biased one"
        yield Finding("variance-ddof", f"{name} normalises with the unbiased variance, {factor}")


def _epsilon_findings(torch: NormBehaviour, flax: NormBehaviour) -> Iterator[Finding]:
    a, b = told_apart(torch.round_epsilon, flax.round_epsilon, 4)
    yield Finding("epsilon", f"epsilon is {a} in PyTorch, {b} in Flax")


def _unequal_findings(torch: NormSide, flax: NormSide, tolerance: float) -> Iterator[Finding]:
    """The last resort: both sides behave alike, so that what goes in must differ (or nothing does, but rounding)."""
    for name in ("gamma", "beta", "mean", "var", "x"):
        a, b = getattr(torch, name), getattr(flax, name)
        if a is not None and b is not None and np.abs(a - b).max() > tolerance * np.abs(a).max():
            evidence = f"both sides normalise in the same way, but {name} differs by up to {np.abs(a - b).max():.3g}"
            yield Finding("unexplained", evidence)
            return


def _checked(side: NormSide, name: str) -> NormSide:
    side = side._replace(
        **{what: np.asarray(value, np.float64) for what, value in side._asdict().items() if value is not None}
    )
    for what, value in (("y", side.y), ("dy", side.dy), ("dx", side.dx)):
        if value is not None and value.shape != side.x.shape:
            raise ValueError(f"the shape of {name}'s {what} is {value.shape}; allowed: that of x, {side.x.shape}")
    if side.x.ndim < 2 or side.x.size == 0:
        raise ValueError(f"the shape of {name}'s x is {side.x.shape}; allowed: [..., C], not empty")
    return side


def _finite(side: NormSide) -> bool:
    return bool(np.isfinite(side.x).all() and np.isfinite(side.y).all())


def _ordered(found: list[Finding]) -> list[Finding]:
    """Each code once, the most fundamental first; evidence of the same mistake is put together."""
    by_code: dict[str, list[str]] = {}
    for finding in found:
        evidence = by_code.setdefault(finding.code, [])
        if finding.evidence not in evidence:
            evidence.append(finding.evidence)
    return [Finding(code, "; ".join(by_code[code])) for code in sorted(by_code, key=rank)]
