"""The nearest pair of fits, and what is said of it."""

from typing import NamedTuple

from parity.diagnosis.family import Family, Property, unlike
from parity.diagnosis.finding import Finding


class Fit(NamedTuple):
    epsilon: float
    axes: str = ""


def told(code):
    return lambda torch, flax: [Finding(code, f"{torch} {flax}")]


PROPERTIES = (
    Property("axes", unlike("axes", 3), told("wrong-reduction-axes")),
    Property("epsilon", unlike("epsilon"), told("epsilon")),
)


def test_the_pair_that_differs_in_least():
    family = Family(*PROPERTIES)
    torch, flax = [Fit(1, "rows"), Fit(2)], [Fit(3, "columns"), Fit(4, "rows"), Fit(3)]
    assert family.nearest(torch, flax) == (Fit(1, "rows"), Fit(4, "rows"))  # the first of two that differ in epsilon
    assert family.differences(torch[0], flax[0]) == ["axes", "epsilon"]
    assert family.nearest(torch, []) is None
    assert family.nearest([], flax) is None


def test_a_difference_may_cost_more_than_others():
    dear = Family(Property("epsilon", unlike("epsilon", 5), told("epsilon")), PROPERTIES[0])
    torch, flax = [Fit(1, "rows")], [Fit(2, "rows"), Fit(1, "columns")]
    assert Family(*PROPERTIES).nearest(torch, flax) == (torch[0], flax[0])
    assert dear.nearest(torch, flax) == (torch[0], flax[1])


def test_oddity_counts_with_the_distance_and_preference_behind_it():
    torch, flax = [Fit(1)], [Fit(2), Fit(3), Fit(4, "rows")]
    odd = Family(*PROPERTIES, oddity=lambda a, b: 0.5 * (b.epsilon == 2))
    assert odd.nearest(torch, flax) == (torch[0], flax[1])
    preferred = Family(*PROPERTIES, preference=lambda a, b: -b.epsilon)
    assert preferred.nearest(torch, flax) == (torch[0], flax[1])  # not the last: that differs in the axes as well


def test_every_difference_is_told_in_the_order_of_the_table():
    family = Family(*PROPERTIES)
    assert [f.code for f in family.findings(Fit(1, "rows"), Fit(2))] == ["wrong-reduction-axes", "epsilon"]
    assert family.findings(Fit(1), Fit(1)) == []
