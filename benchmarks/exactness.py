"""How exact is batch norm in float32, beside its peers, where the input is hard?

    python -m benchmarks.exactness
    python -m benchmarks.exactness --write docs/batch_norm_exactness.md

The inputs are those of `truth/hard_inputs.py`; the truth is `truth/batch_norm.py`. Prints Markdown.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks.harness import check_can_be_written, installed, is_installed
from benchmarks.peers import EPSILON, Result, Start
from bn_common.command_line import parse, refuse
from bn_common.files import write_whole
from truth.hard_inputs import CHANNELS, CONSTANT, HARD_INPUTS, SHAPE, HardInput

PROG = "python -m benchmarks.exactness"
COLUMNS = ("jax_bn", "torch_bn", "torch native", "flax.linen", "flax.nnx", "keras", "equinox", "haiku")
PREDICTED = ("N(0, 1)", "mean 1e6, std 0.1")
TABLES = {
    "y": "**y** in training: the largest error, in eps of the channel's largest true |y|.",
    "mean": "**mean**, as it comes back with momentum 0: in eps of the channel's largest |x|.",
    "var": "**var**, likewise: in eps of var + epsilon, by whose root y is divided. PyTorch's own returns "
    "var m / (m - 1), and is held against that.",
    "dx": "**dx**, the gradient of sum(y dy): in eps of the channel's largest true |dx| or its largest "
    "|gamma dy| / sqrt(var + epsilon), whichever is larger.",
    "dgamma": "**dgamma**: in eps of the true |dgamma| or the Euclidean norm of dy x_hat over the channel, that is the "
    "size of what is added (of dy, where x_hat is 0), whichever is larger.",
    "dbeta": "**dbeta**: in eps of the true |dbeta| or the Euclidean norm of dy over the channel, whichever is larger.",
    "prediction": "**y in prediction**, with the batch's own mean and variance, rounded to float32, as moving "
    "statistics: in eps of the channel's largest true |y|.",
}
Errors = dict[str, dict[str, float]]  # input -> peer -> error


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the tables go."""

    write: Path | None = None
    """Also write the tables to this file, with versions and an explanation, as Markdown."""
    seed: int = 0
    """Of the inputs, 0 to 2^32 - 1."""


def main(args: Sequence[str] | None = None) -> None:
    """The program."""
    options = parse(Options, args, prog=PROG, description="Batch norm's errors in float32 beside its peers.")
    if not 0 <= options.seed < 2**32:
        refuse(PROG, f"--seed is {options.seed}; allowed: 0 to 2^32 - 1")
    path = options.write
    try:
        check_can_be_written("--write", path)
    except ValueError as error:
        refuse(PROG, str(error))
    if not is_installed("mpmath"):
        refuse(PROG, "mpmath, which the truth is computed with, is not installed (pip install '.[bench]')")
    console = Console(stderr=True)
    try:
        text = report(options.seed, console)
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROG}: interrupted; nothing written\n")
        raise SystemExit(130) from None
    print(text, end="")
    if path is not None:
        write_whole(path, text.encode())


def report(seed: int, console: Console) -> str:
    """The whole text."""
    modules = _modules(console)
    tables: dict[str, Errors] = {name: {} for name in TABLES}
    names = track(HARD_INPUTS, "inputs", console=console, transient=True, disable=not console.is_terminal)
    for name in names:
        for table, errors in measure(name, HARD_INPUTS[name](seed), modules).items():
            tables[table][name] = errors
    versions: dict[str, str] = {}
    for module in dict.fromkeys(modules.values()):
        versions |= module.about()
    return _text(seed, versions, {name: _markdown(table, list(modules)) for name, table in tables.items()})


def _modules(console: Console) -> dict[str, ModuleType]:
    """Column -> the module that has this peer, of those that are installed."""
    found: dict[str, ModuleType] = {}
    for framework in ("jax", "torch"):
        if not is_installed(framework):
            console.print(f"{framework} is not installed, and its batch norms are left out (pip install '.[torch]')")
            continue
        module = importlib.import_module(f"benchmarks.{framework}_peers")
        peers, missing = installed(module.PEERS)
        found |= dict.fromkeys(peers, module)
        for line in missing:
            console.print(line, markup=False, highlight=False)
    return {name: found[name] for name in COLUMNS if name in found}


def measure(name: str, given: HardInput, modules: Mapping[str, ModuleType]) -> dict[str, dict[str, float]]:
    """Table -> peer -> error at one input. Channels that hold a NaN are left out: the others are looked at."""
    from truth import batch_norm as exact

    clean = np.isfinite(given.x).all(_axes(given.x))
    x, gamma, beta, dy = given.x[:, clean], given.gamma[clean], given.beta[clean], given.dy[:, clean]
    zero = np.zeros(len(gamma), np.float32)
    truth = exact.long_batch_norm(x, gamma, beta, zero, zero, dy, train=True, momentum=0.0, eps=EPSILON)
    unbiased = truth.var * (x.size // x.shape[1]) / (x.size // x.shape[1] - 1)
    scales = _scales(x, gamma, dy, truth)
    if name in CONSTANT:
        scales["y"] = np.where(beta == 0, 1, np.abs(beta))
    moving = (truth.mean.astype(np.float32), truth.var.astype(np.float32))
    tables: dict[str, dict[str, float]] = {}
    for peer, module in modules.items():
        layer = module.PEERS[peer].make(_start(given, clean, (zero, zero)))
        step = module.calls(layer, given.x, given.dy)["forward+backward"]
        result = _clean(module.read_step(layer, step()), clean)
        right = Result(truth.y, truth.mean, unbiased if layer.unbiased else truth.var, *truth[3:6])
        for what, value in result._asdict().items():
            error = exact.error_in_eps(value, getattr(right, what), "float32", scales.get(what))
            tables.setdefault(what, {})[peer] = error
    if name in PREDICTED:
        predicted = exact.long_batch_norm(x, gamma, beta, *moving, dy, train=False, eps=EPSILON).y
        tables["prediction"] = {}
        for peer, module in modules.items():
            layer = module.PEERS[peer].make(_start(given, clean, moving))
            y = module.read_eval(layer, module.calls(layer, given.x, given.dy)["eval"]())
            tables["prediction"][peer] = exact.error_in_eps(y[:, clean], predicted, "float32")
    return tables


def _axes(x: NDArray) -> tuple[int, ...]:
    return tuple(a for a in range(x.ndim) if a != 1)


def _start(given: HardInput, clean: NDArray, moving: tuple[NDArray, NDArray]) -> Start:
    """Momentum 0: the new statistics are the batch's. A channel that isn't clean begins with the first one's."""
    mean, var = (np.resize(v, len(clean)) for v in moving)
    return Start(given.x.shape, given.gamma, given.beta, mean, var, 0.0)


def _clean(result: Result, clean: NDArray) -> Result:
    """Only the channels that are clean."""
    return Result(*(v[:, clean] if v.ndim > 1 else v[clean] for v in result))


def _scales(x: NDArray, gamma: NDArray, dy: NDArray, truth) -> dict[str, NDArray]:
    """What an error is compared with where the truth itself may be what cancellation has left: [C] each."""
    from truth import batch_norm as exact

    axes = _axes(x)
    var = truth.var.astype(float) + EPSILON
    of_dbeta, of_dgamma = exact.sizes_of_sums(x, dy, truth.mean, var)
    of_dgamma = np.where(of_dgamma == 0, of_dbeta, of_dgamma)
    largest = {
        "dx": (truth.dx, gamma * np.abs(dy).max(axes) / np.sqrt(var)),
        "dgamma": (truth.dgamma, of_dgamma),
        "dbeta": (truth.dbeta, of_dbeta),
    }
    scales = {
        name: np.maximum(np.abs(v).max(axes if v.ndim > 1 else ()).astype(float), size)
        for name, (v, size) in largest.items()
    }
    largest_x = np.abs(x).max(axes)
    return scales | {"mean": np.where(largest_x == 0, 1, largest_x), "var": var}


def compact(value: float) -> str:
    """Two digits: 0.62, 5.3, 41, 1.4e3; 0 is 0 alone."""
    if value == 0:
        return "0"
    if value < 1e-3:
        return "<0.001"
    if not math.isfinite(value):
        return "NaN"
    rounded = float(f"{value:.1e}")
    if rounded >= 100:
        return f"{rounded:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{rounded:.0f}" if rounded >= 10 else f"{rounded:.1f}" if rounded >= 1 else f"{rounded:.2g}"


def _markdown(errors: Errors, peers: Sequence[str]) -> str:
    """A Markdown table that can be read as it stands."""
    rows = [["", *peers], *([name, *(compact(of[peer]) for peer in peers)] for name, of in errors.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _text(seed: int, versions: Mapping[str, str], tables: Mapping[str, str]) -> str:
    made = (
        f"Made by `{PROG} --write docs/batch_norm_exactness.md`, seed {seed}, with "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}."
    )
    head = f"""# How exact batch norm is in float32

{textwrap.fill(made, 120, break_on_hyphens=False)}

Every figure is the largest error over the channels, in float32 eps (2^-23) of a size that each table names; two digits;
0 is exact; NaN is a value that is not finite. 0.5 is what rounding the truth to float32 can cost. The truth is computed
by `truth/batch_norm.py`: sums and statistics per channel without rounding, in integers and fractions, y and dx from
these in numpy's longdouble, whose rounding is below 1e-3 of an eps. Epsilon is 1e-5 everywhere, the other options are
each library's own, except that Equinox is in its mode "batch" (its default normalises with the moving statistics in
training too). The JAX libraries are jitted and take channels last (Equinox: one example under vmap, channels first),
PyTorch channels on axis 1, contiguous.

The inputs are defined in `truth/hard_inputs.py`: {CHANNELS} channels, {SHAPE[0]} x {SHAPE[2]} x {SHAPE[3]} values
each where nothing else is said. In the rows "constant" and "zero" the figure for y is |y - beta| in eps of |beta|. The
row "NaN in one channel" is about the other channels.
"""
    return head + "".join(f"\n{TABLES[name]}\n\n{table}\n" for name, table in tables.items())


if __name__ == "__main__":
    main()
