"""Every known mistake, planted: `parity.check` sees it, names it first, charges the right layer and the right phase.

A way to plant each in either wing, alone, deep and in NNX is tried, and one mistake in each of the other networks (a
ResNet, a transformer); all ways with PLANTED=all, and by
`python -m parity_tests.parity.planted_table`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

import parity
from parity_tests.parity.planted import CASES, Case, Planted
from parity_tests.parity.planted.networks import two_mistakes, unexplained

CODES = [
    "momentum-inverted",
    "unbiased-variance",
    "initial-variance",
    "statistics-frozen",
    "epsilon",
    "epsilon-outside-sqrt",
    "eval-uses-batch-statistics",
    "train-uses-moving-statistics",
    "wrong-reduction-axes",
    "affine-swapped",
    "affine-missing",
    "bias-missing",
    "kernel-transposed",
    "kernel-layout",
    "kernel-flipped",
    "kernel-hw-swapped",
    "flatten-order",
    "padding",
    "stride",
    "dilation",
    "pool-kind",
    "pool-count-padding",
    "activation",
    "norm-after-activation",
    "dropout-active",
    "stopped-statistics-gradient",
    "loss-reduction",
    "label-offset",
    "input-scale",
    "input-layout",
    "adam-epsilon",
    "bias-correction",
    "weight-decay-coupling",
    "momentum-dampening",
    "nesterov",
    "learning-rate",
    "per-device-statistics",
    "matmul-precision",
]


def selected(cases: Iterable[Case]) -> list[Case]:
    """The first of each kind; deep ones in one wing, which changes from code to code. PLANTED=all: all of them."""
    if os.environ.get("PLANTED") == "all":
        return list(cases)
    first: dict[tuple, Case] = {}
    for case in cases:
        deep_wing = ("torch", "flax")[CODES.index(case.code) % 2] if case.code in CODES else case.wing
        kind = case.code, case.wing, case.depth, "nnx" in case.variant
        if case.depth not in ("alone", "deep"):
            first.setdefault((case.depth,), case)  # they cost the most, and the deep chain shows the same
        elif case.depth == "alone" or case.wing == deep_wing:
            first.setdefault(kind, case)
    return list(first.values())


def check(planted: Planted):
    return parity.check(planted.torch_module, planted.flax_module, *planted.inputs, **planted.options)


def test_every_code_is_planted_in_either_wing_alone_and_deep():
    planted = {(case.code, case.wing, case.depth) for case in CASES}
    wanted = {(code, wing, depth) for code in CODES for wing in ("torch", "flax") for depth in ("alone", "deep")}
    assert wanted <= planted


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def is_thorough(case: Case) -> bool:
    """The large networks cost the most, and the deep chain shows the same; so do half of the deep chains.

    Of four mistakes in a row, the deep chain has one in PyTorch's wing and one in Flax's; all are planted alone.
    """
    if case.depth == "deep" and case.code in CODES:
        return CODES.index(case.code) % 4 in (1, 2)
    return case.depth not in ("alone", "deep")


SELECTED = [
    pytest.param(case, id=case.name, marks=[pytest.mark.thorough] * is_thorough(case)) for case in selected(CASES)
]


@pytest.mark.parametrize("case", SELECTED)
def test_planted(case: Case):
    report = check(case.make())
    assert not report.ok
    codes = [d.code for d in report.diagnoses]
    assert codes[0] == case.code, report.diagnoses
    assert set(codes) <= {case.code, *case.also}, report.diagnoses
    if case.layers:
        assert report.diagnoses[0].layer in case.layers, report.diagnoses
    if case.phase is not None:
        assert report.first_divergence.phase == case.phase
    assert report.diagnoses[0].evidence


@pytest.mark.parametrize(
    ("make", "expected"), [pytest.param(two.make, two.expected, id=two.name) for two in two_mistakes()]
)
def test_two_mistakes_are_both_named(make, expected):
    report = check(make())
    assert not report.ok
    assert {d.code: d.layer for d in report.diagnoses} == expected, report.diagnoses


@pytest.mark.parametrize(
    ("make", "layers"), [pytest.param(make, layers, id=name) for name, make, layers in unexplained()]
)
def test_what_fits_nothing_is_unexplained(make, layers):
    report = check(make())
    assert not report.ok
    assert [d.code for d in report.diagnoses] == ["unexplained"], report.diagnoses
    if layers:
        assert report.diagnoses[0].layer in layers, report.diagnoses
    assert report.first_divergence is not None
