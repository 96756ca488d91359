"""`python -m parity check` without a pair: this project's own two wings against the truth, and against each other.

Layer, mode, dtype, convention, shape, and how it is run. Batch norm's truth is its definition in numpy's longdouble;
BLeNet's is float64. Bounds and their reasons: `comparison/bounds.py`, and for batch norm DESIGN.md's in units of eps.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from parity.comparison import bounds as compare
from parity.records import distance
from parity.wings import subjects
from parity.wings.subjects import CONVENTIONS, Arrays

# In eps of the dtype and of the channel's largest true value, or of what cancels in it: x enters y once, and the
# gradients with respect to x and gamma a second time.
EPS_BOUNDS = {"y": 8, "moving_mean": 8, "moving_var": 8, "dx": 32, "dgamma": 32, "dbeta": 32}
HALF = "float16", "bfloat16"


class Case(NamedTuple):
    """One line of the matrix, before it is run."""

    layer: str
    mode: str
    dtype: str
    convention: str
    shape: tuple[int, ...]
    how: str
    hard: bool = False


class Row(NamedTuple):
    """What came out: the result that is closest to its bound. All relative.

    Attributes:
      case: what was run.
      worst: name of the result.
      jax, torch: each wing's distance from the truth.
      apart: the wings' distance from each other.
      bound: for `jax` and `torch`.
      ok: whether every result of both wings is within its bound.
    """

    case: Case
    worst: str
    jax: float
    torch: float
    apart: float
    bound: float
    ok: bool


def cases() -> Iterator[Case]:
    """The whole matrix."""
    modes, shapes = ("train", "eval"), ((16, 5), (6, 3, 7), (4, 3, 5, 6))
    for mode, dtype, convention, shape in itertools.product(modes, ("float32", "float64"), CONVENTIONS, shapes):
        yield Case("batch_norm", mode, dtype, convention, shape, "jit")
    for mode, dtype in itertools.product(modes, HALF):
        yield Case("batch_norm", mode, dtype, "seed", (4, 3, 5, 6), "jit")
    for mode, dtype in itertools.product(modes, ("float32", "float64")):
        yield Case("batch_norm", mode, dtype, "seed", (4, 3, 5, 6), "eager")
        yield Case("batch_norm", mode, dtype, "seed", (64, 3), "jit", hard=True)
    for mode in modes:
        yield Case("batch_norm", mode, "float32", "seed", (4, 3, 5, 6), "compile")
    for layer, mode, dtype, convention in itertools.product(
        ("BatchNorm", "BatchNorm (nnx)"), modes, ("float32", "float64"), CONVENTIONS
    ):
        yield Case(layer, mode, dtype, convention, (4, 3, 5, 6), "jit")
    for mode, dtype, shape in itertools.product(modes, ("float32", "float64"), ((1, 28), (3, 12))):
        yield Case("BLeNet", mode, dtype, "seed", shape, "jit")
    yield Case("BLeNet", "train", "float32", "seed", (1, 12), "eager")


def run(case: Case) -> Row:
    """Runs a case in both wings."""
    # As most users have JAX: optax relies on implicit promotion.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return _blenet(case) if case.layer == "BLeNet" else _batch_norm(case)


def _batch_norm(case: Case) -> Row:
    convention, train = CONVENTIONS[case.convention], case.mode == "train"
    g = subjects.given(case.shape, case.dtype, convention, train=train, hard=case.hard)
    truth, scales = subjects.truth(g, convention, train=train)
    in_jax, in_torch = {
        "batch_norm": ("function", "function"),
        "BatchNorm": ("linen", "layer"),
        "BatchNorm (nnx)": ("nnx", "layer"),
    }[case.layer]
    # What is compiled in one framework is so in the other; PyTorch's compiler is too slow to be asked more than twice.
    how_jax, how_torch = ("eager" if case.how == "eager" else "jit"), ("compile" if case.how == "compile" else "eager")
    a = subjects.run_jax(in_jax, g, case.dtype, convention, train=train, how=how_jax)
    b = subjects.run_torch(in_torch, g, case.dtype, convention, train=train, how=how_torch)
    # y and dx are rounded to x's dtype, all else is in float32 at least.
    eps = {name: _eps(case.dtype if name in ("y", "dx") else subjects.wide(case.dtype)) for name in truth}
    bounds = {name: EPS_BOUNDS[name] * eps[name] for name in truth}

    def error(name: str, given: NDArray, true: NDArray) -> float:
        return _per_channel(given, true, scales[name])

    return _row(case, a, b, truth, bounds, error)


def _eps(dtype: str) -> float:
    return float(jnp.finfo(dtype).eps)


def _per_channel(given: NDArray, truth: NDArray, scale: NDArray) -> float:
    """The largest error of a channel, relative to its scale."""
    if given.shape != truth.shape or not np.isfinite(given).all():
        return float("inf")
    difference = np.abs(given - truth)
    if difference.ndim > 1:
        difference = np.moveaxis(difference, 1, 0).reshape(len(scale), -1).max(1)
    ratio = np.divide(difference, scale, out=np.where(difference > 0, np.inf, 0.0), where=scale > 0, casting="unsafe")
    return float(ratio.max())


def _blenet(case: Case) -> Row:
    train = case.mode == "train"
    model, x, labels = subjects.blenet(case.shape[0], case.shape[1], case.dtype)
    truth = subjects.blenet_torch(model, x, labels, "float64", train=train)
    a = subjects.blenet_jax(model, x, labels, case.dtype, train=train, how=case.how)
    b = subjects.blenet_torch(model, x, labels, case.dtype, train=train)
    wide = case.dtype == "float64"
    bounds = dict.fromkeys(truth, compare.FLOAT64 if wide else compare.FLOAT32_LOGITS)
    if not wide:
        bounds["dx"] = bounds["gradient"] = compare.FLOAT32_GRADIENTS

    def error(name: str, given: NDArray, true: NDArray) -> float:
        whole = name in ("dx", "gradient")
        return (distance.relative_norm_error if whole else distance.relative_error)(given, true)

    return _row(case, a, b, truth, bounds, error)


def _row(
    case: Case, a: Arrays, b: Arrays, truth: Arrays, bounds: Mapping[str, float], error: Callable[..., float]
) -> Row:
    errors = {name: (error(name, a[name], truth[name]), error(name, b[name], truth[name])) for name in truth}
    worst = max(truth, key=lambda name: max(errors[name]) / bounds[name])
    ok = all(max(errors[name]) <= bounds[name] for name in truth)
    return Row(case, worst, *errors[worst], error(worst, a[worst], b[worst]), bounds[worst], ok)


def table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    found = Table(title="both wings against the truth (relative), and against each other")
    for name in (
        "layer",
        "mode",
        "dtype",
        "convention",
        "shape",
        "run",
        "compared",
        "JAX",
        "PyTorch",
        "apart",
        "bound",
        "",
    ):
        found.add_column(
            name, justify="right" if name in ("JAX", "PyTorch", "apart", "bound") else "left", no_wrap=True
        )
    for case, worst, in_jax, in_torch, apart, bound, ok in rows:
        shape = "x".join(map(str, case.shape)) + (" hard" if case.hard else "")
        numbers = (f"{v:.1e}" for v in (in_jax, in_torch, apart, bound))
        mark = "[green]ok[/green]" if ok else "[red]MISS[/red]"
        found.add_row(case.layer, case.mode, case.dtype, case.convention, shape, case.how, worst, *numbers, mark)
    return found


@dataclass(frozen=True)
class Matrix:
    """Compare this project's own two wings: layer, mode, dtype, convention, shape, and how it is run."""

    only: str | None = None
    """Only the lines that have this in them, such as "BLeNet" or "float64"; None: all."""

    def run(self) -> int:
        """Run, show; gives the exit status."""
        chosen = [case for case in cases() if self.only is None or self.only in " ".join(map(str, case))]
        if not chosen:
            raise ValueError(f"--only is {self.only!r}, which is in no line; allowed: batch_norm, train, float32, ...")
        started, wide = time.perf_counter(), Console(width=None if sys.stdout.isatty() else 160)
        rows = [
            run(case) for case in track(chosen, "comparing", console=wide, transient=True, disable=not wide.is_terminal)
        ]
        wide.print(table(rows))
        missed = sum(not row.ok for row in rows)
        seconds = time.perf_counter() - started
        said = (
            f"{missed} of {len(rows)} beyond their bound"
            if missed
            else f"{len(rows)} compared, all within their bounds"
        )
        wide.print(f"{said}; {seconds:.0f} s, {torch.get_num_threads()} threads", style="red" if missed else "green")
        return 1 if missed else 0


def main(args: Sequence[str] | None = None) -> int:
    """`python -m parity check`; gives the exit status."""
    from bn_common.command_line import parse, program_name

    return parse(
        Matrix, args, prog=f"{program_name('parity', 'python -m parity')} check", description=Matrix.__doc__ or ""
    ).run()
