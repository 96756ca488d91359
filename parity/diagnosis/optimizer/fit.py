"""Fits the update rules of `rules` to one side's response, and solves their hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence

from parity.diagnosis.optimizer.adaptive import fit_adaptive
from parity.diagnosis.optimizer.linear import fit_linear, with_linear_decay
from parity.diagnosis.optimizer.rules import LOOSER, Data, Numbers, Rule, data_of, fitted_rule
from parity.records.answers import Response


def fit(response: Response, tolerance: float, known: Sequence[Rule] = (), only_known: bool = False) -> list[Rule]:
    """All rules that give the response, the simplest first; [] if none does.

    Two rules may give the same: where epsilon is too small to show, so is whether v was corrected before it was added.

    Args:
      response: of one side.
      tolerance: largest error that counts as rounding.
      known: rules that other tensors follow, tried first.
      only_known: no others.
    """
    data = data_of(response)
    again = [_again(data, rule) for rule in known]
    if any(rule.error <= tolerance for rule in again):
        return [rule for rule in again if rule.error <= tolerance]
    if only_known:
        return []
    rules = fit_linear(data)
    if not rules or rules[0].error > tolerance:
        rules += fit_adaptive(data, tolerance)
    for allowed in (tolerance, *LOOSER):
        fitting = [rule for rule in rules if rule.error <= allowed]
        if fitting:
            return fitting
    return []


def adopt(response: Response, rule: Rule, other: Rule, tolerance: float) -> Rule:
    """The same rule with the other side's numbers where the response does not show a difference."""
    data = data_of(response)
    for name in Numbers._fields:
        value = getattr(other.numbers, name)
        if value != getattr(rule.numbers, name):
            tried = _again(data, rule._replace(numbers=rule.numbers._replace(**{name: value})))
            rule = tried if tried.error <= max(10 * tolerance, 2 * rule.error) else rule
    return rule


def _again(data: Data, rule: Rule) -> Rule:
    if rule.shape.second:
        return fitted_rule(data, rule.shape, rule.numbers)
    return with_linear_decay(data, rule.shape, rule.numbers)
