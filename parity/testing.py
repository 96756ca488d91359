"""Parity as one line of a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from parity.report import Report

if TYPE_CHECKING:  # `parity.testing` is imported before it is known that a test needs either framework
    from collections.abc import Callable, Mapping

    import torch
    from flax import linen, nnx


class CheckOptions(TypedDict, total=False):
    """The named arguments of `parity.check`, which documents them; all may be left out."""

    keywords: Mapping[str, Any] | None
    train: bool
    variables: Any
    flax_inputs: Sequence[Any] | Mapping[str, Any] | None
    flax_call: Callable[..., Any] | None
    layer_map: Mapping[str, str] | None
    loss: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None
    steps: int
    optimizers: tuple[Callable[[Any], torch.optim.Optimizer], Any] | None
    depth: int | None


def assert_parity(
    torch_module: torch.nn.Module,
    flax_module: linen.Module | nnx.Module,
    inputs: Any = (),
    *more_inputs: Any,
    **options: Unpack[CheckOptions],
) -> Report:
    """Fail the test that calls this, unless the two modules are the same network.

    Args:
      torch_module: any module.
      flax_module: a linen module or an `nnx.Module`.
      inputs: a numpy array in PyTorch's layout, or a sequence of inputs, see `parity.check`.
      *more_inputs: further ones, where the module takes several.
      **options: of `parity.check`: keywords, train, variables, flax_inputs, flax_call, layer_map, loss, steps,
        optimizers, depth.

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
    """The whole report."""
    return f"the two modules are not the same network\n{report}"
