"""Parity as one line of a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parity.report import Report, both_names


def assert_parity(torch_module: Any, flax_module: Any, inputs: Any, *more_inputs: Any, **options: Any) -> Report:
    """Fail the test that calls this, unless the two modules are the same network.

    Args:
      torch_module: any module.
      flax_module: a linen module or an `nnx.Module`.
      inputs: a numpy array in PyTorch's layout, or a sequence of them.
      *more_inputs: further arrays, where the module takes several.
      **options: of `parity.check`: train, variables, flax_inputs, flax_call, layer_map, loss, steps, optimizers.

    Returns:
      The report, whose notes may be of interest.

    Raises:
      AssertionError: they differ; the message says what was recognised, where they differ first, and holds the table.
      TypeError, ValueError: bad arguments, see `parity.check`.
    """
    __tracebackhide__ = True
    from parity.check import check

    first = tuple(inputs) if isinstance(inputs, Sequence) else (inputs,)
    report = check(torch_module, flax_module, *first, *more_inputs, **options)
    if not report.ok:
        raise AssertionError(message(report))
    return report


def message(report: Report) -> str:
    """What was recognised, where they differ first, and the table."""
    found = [f"{d.code} at {both_names(d.layer, d.flax_layer)}: {d.evidence}" for d in report.diagnoses]
    return "\n".join(["the two modules are not the same network", *found, report.summary, "", str(report)])
