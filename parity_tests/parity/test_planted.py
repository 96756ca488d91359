"""Every known mistake, planted: `parity.check` sees it, names it first, charges the right layer and the right phase.

A way to plant each in either wing, alone, deep and in NNX is tried, and one mistake in each of the other networks (a
ResNet, a transformer); all ways with PLANTED=all, and by
`python -m parity_tests.parity.planted_table`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from parity.diagnosis.finding import Finding
from parity.diagnosis.mistakes import COULD_NOT_RUN, MISTAKES, NOT_COMPARED, TABLE, UNEXPLAINED
from parity.records.recording import PHASES
from parity_tests.parity.planted import CASES, Case, Planted
from parity_tests.parity.planted.networks import two_mistakes, unexplained

ROOT = Path(__file__).parents[2]
CODES = list(MISTAKES)


def selected(cases: Iterable[Case]) -> list[Case]:
    """The first of each kind; deep ones in one wing, which changes from code to code. PLANTED=all: all of them."""
    if os.environ.get("PLANTED") == "all":
        return list(cases)
    first: dict[tuple, Case] = {}
    for case in cases:
        deep_wing = ("torch", "flax")[CODES.index(case.code) % 2]
        kind = case.code, case.wing, case.depth, "nnx" in case.variant
        if case.depth not in ("alone", "deep"):
            first.setdefault((case.depth,), case)  # they cost the most, and the deep chain shows the same
        elif case.depth == "alone" or case.wing == deep_wing:
            first.setdefault(kind, case)
    return list(first.values())


def check(planted: Planted):
    return planted.check(planted.torch_module, planted.flax_module, *planted.inputs, **planted.options)


def test_every_code_is_planted_in_either_wing_alone_and_deep():
    planted = {(case.code, case.wing, case.depth) for case in CASES}
    wanted = {(code, wing, depth) for code in CODES for wing in ("torch", "flax") for depth in ("alone", "deep")}
    assert wanted <= planted


def test_nothing_else_is_planted():
    assert {case.code for case in CASES} == set(CODES)


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_table_of_mistakes():
    assert len(MISTAKES) == len(TABLE)
    assert not {UNEXPLAINED, NOT_COMPARED, COULD_NOT_RUN} & set(MISTAKES)
    for mistake in TABLE:
        assert mistake.phase in PHASES
        assert mistake.charges in ("", "activation", "pool", "dropout", "flatten")
        assert mistake.sentence


@pytest.mark.parametrize("code", ["", "Epsilon", NOT_COMPARED, COULD_NOT_RUN])
def test_a_finding_is_of_the_table(code):
    with pytest.raises(ValueError, match=f"code is '{code}'; allowed: '{TABLE[0].code}', "):
        Finding(code, "")


def test_a_finding_charges_what_the_table_says():
    assert {code: Finding(code, "").charges for code in CODES} == {m.code: m.charges for m in TABLE}
    assert Finding(UNEXPLAINED, "").charges == ""
    assert Finding(UNEXPLAINED, "", charges="pool").charges == "pool"


def test_the_readme_counts_what_is_planted():
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"all (\d+) mistakes", readme) == [str(len(CASES))]
    assert re.findall(r"\[(\d+) of them\]", readme) == [str(len(TABLE))]


def test_the_page_of_mistakes_is_of_this_table():
    """docs/parity_mistakes.md: the mistakes in their order, and how often each is planted."""
    page = (ROOT / "docs/parity_mistakes.md").read_text()
    assert re.findall(r"^(\d+) mistakes are planted", page, re.MULTILINE) == [str(len(CASES))]
    rows = re.findall(r"^\| `([a-z-]+)` \| (.*?) \| (\d+/\d+ \| \d+/\d+ \| \d+/\d+ \| \d+/\d+) \|", page, re.MULTILINE)
    wanted = []
    for mistake in TABLE:
        planted = [(c.wing, c.depth == "alone") for c in CASES if c.code == mistake.code]
        counts = [planted.count((wing, alone)) for wing in ("torch", "flax") for alone in (True, False)]
        wanted.append((mistake.code, mistake.sentence, counts))
    assert [(code, text, [int(n) for n in re.findall(r"/(\d+)", cells)]) for code, text, cells in rows] == wanted


def is_thorough(case: Case) -> bool:
    """The large networks cost the most, and the deep chain shows the same; so do three quarters of the deep chains.

    Of eight mistakes in a row, the deep chain has one in PyTorch's wing and one in Flax's; all are planted alone.
    """
    if case.depth == "deep" and case.code in CODES:
        return CODES.index(case.code) % 8 not in (0, 5)
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
