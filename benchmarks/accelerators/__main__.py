"""What batch norm costs on accelerators that are not here, in compiled programs, beside Flax's.

    python -m benchmarks.accelerators --write docs/accelerators.md

Training and prediction steps of BLeNet and ResNet-50 are compiled ahead of time for a TPU v5e and an H100, one and four
of them, with this project's batch norm and with Flax's. Nothing runs on them: what is counted stands in the programs.
The plugins that compile for them have an environment of their own, which `make accelerators` makes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import describe_machine, is_installed, made_by, measured, print_line, rows_markdown, rows_table
from bn_common.command_line import parse

PROG = "python -m benchmarks.accelerators"
PLUGINS = {"v5e": "libtpu", "H100": "jax_cuda12_plugin"}
FOUR = (1, 4)
SECONDS = 600
"""Given to a program: the TPU's compiler is erratic in how long it takes."""
# What is compiled: network, dtype, steps, devices.
WANTED = (
    ("BLeNet", "float32", ("train", "eval"), FOUR),
    ("ResNet-50", "bfloat16", ("train",), FOUR),
    ("ResNet-50", "bfloat16", ("eval",), (1,)),
    ("ResNet-50", "float32", ("train",), (1,)),
)
BOUNDS = {("BLeNet", "v5e"): 1.05, ("BLeNet", "H100"): 1.05, ("ResNet-50", "v5e"): 1.02, ("ResNet-50", "H100"): 1.04}
"""Of traffic, and on a v5e of cycles, in units of Flax's, for a training step."""
MORE_TRAFFIC = 1.05
"""What a program may have of the traffic that the page in docs/ says of it."""
KEY = ("network", "step", "dtype", "card", "devices", "norm")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    only: str = ""
    """Programs whose name has this in it only, such as 'BLeNet train'."""
    against: Path | None = None
    """Figures that `--json` wrote: exit status 1 with one all-reduce or 5 % of traffic more than there."""
    json: Path | None = None
    """Also write the figures to this file."""
    write: Path | None = None
    """Also write a page to this file, in Markdown."""


def main(args: Sequence[str] | None = None) -> None:
    """The program."""
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["--one"]:
        print(json.dumps(compiled(*args[1:])))
        return
    options = parse(Options, args, prog=PROG, description="Steps compiled for accelerators, beside Flax's.")
    measured(options, PROG, _check, measure, _markdown)


def _check(options: Options) -> None:
    for card, module in PLUGINS.items():
        if not is_installed(module):
            raise ValueError(f"{module}, which compiles for a {card}, is not installed; allowed: make accelerators")
    if not programs(options.only):
        raise ValueError(f"--only is {options.only}; allowed: a part of a name, such as {_name(programs('')[0])}")
    if options.against is not None and not options.against.is_file():
        raise ValueError(f"--against is {options.against}; allowed: a file that --json wrote")


def programs(only: str) -> list[Row]:
    """What is compiled, all or those whose name has this in it."""
    rows = [
        dict(zip(KEY, (network, step, dtype, card, count, norm), strict=True))
        for network, dtype, steps, counts in WANTED
        for step, count, card, norm in itertools.product(steps, counts, PLUGINS, ("jax_bn", "flax"))
    ]
    return [row for row in rows if only in _name(row)]


def _name(row: Row) -> str:
    return " ".join(str(row[key]) for key in KEY)


def measure(options: Options, console: Console) -> dict[str, Any]:
    """Compile each program in a process of its own, and print a row for it."""
    names = ("jax", "flax", *(name.replace("_", "-") for name in PLUGINS.values()))
    machine = describe_machine() | {name: importlib.metadata.version(name) for name in names}
    rows = []
    for row in programs(options.only):
        rows.append(row | _in_a_process(row))
        print_line(
            f"{_name(row)}: " + ", ".join(f"{key} {rows[-1][key]}" for key in rows[-1] if key not in KEY), console
        )
    console.print(rows_table(COLUMNS, rows))
    found = {"machine": machine, "rows": rows}
    for line in bounds(rows):
        print_line(line, console)
    if options.against is not None:
        worse = compare(rows, json.loads(options.against.read_text())["rows"])
        if worse:
            raise ArithmeticError("; ".join(worse))
    return found


def _in_a_process(row: Row) -> Row:
    """Its figures, or {"failed": why}: a compiler that crashes or takes too long ends no run."""
    command = [sys.executable, "-m", "benchmarks.accelerators", "--one", *(str(row[key]) for key in KEY)]
    # A TPU's compiler looks for a TPU's machine, and for other processes that use it.
    said = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    said |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": os.environ | said}
    try:
        done = subprocess.run(command, timeout=SECONDS, check=False, **options)
    except subprocess.TimeoutExpired:
        return {"failed": f"not compiled in {SECONDS} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return {"failed": f"status {done.returncode}: {last[0][:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def compiled(network: str, step: str, dtype: str, card: str, devices: str, norm: str) -> Row:
    """Compile one program, and count."""
    from benchmarks.accelerators.hlo import figures
    from benchmarks.accelerators.programs import Program, lowered

    program = lowered(Program(network, step, dtype, card, int(devices), norm))
    # Autotuning runs what it compares, on the card; the TPU's compiler tries for minutes what it need not.
    options = {"xla_gpu_autotune_level": 0} if card == "H100" else {"exec_time_optimization_effort": -1.0}
    begin = time.perf_counter()
    executable = program.compile(compiler_options=options)
    seconds = time.perf_counter() - begin
    cost: Any = executable.cost_analysis() or {}
    return figures(executable.as_text())._asdict() | {
        "seconds": round(seconds, 1),
        "flops": cost.get("flops"),
        "bytes": cost.get("bytes accessed"),
        "temp": executable.memory_analysis().temp_size_in_bytes,
    }


def bounds(rows: Sequence[Row]) -> list[str]:
    """A line for each training program: traffic and cycles in units of Flax's, beside the bound."""
    at = {tuple(row[key] for key in KEY): row for row in rows if "failed" not in row}
    lines = []
    for key, row in at.items():
        peer = at.get((*key[:-1], "flax"))
        if row["norm"] == "jax_bn" and row["step"] == "train" and peer:
            bound = BOUNDS[row["network"], row["card"]]
            for name in ("traffic", "cycles"):
                if row[name] and peer[name]:
                    ratio = row[name] / peer[name]
                    said = "met" if ratio <= bound else "missed"
                    lines.append(f"{' '.join(map(str, key[:-1]))}: {name} {ratio:.3f} of Flax's, bound {bound}: {said}")
    return lines


def compare(rows: Sequence[Row], before: Sequence[Row]) -> list[str]:
    """What has become worse: an all-reduce more, or 5 % of traffic, or a program that is compiled no more."""
    was = {tuple(row[key] for key in KEY): row for row in before if "failed" not in row}
    worse = []
    for row in rows:
        old = was.get(tuple(row[key] for key in KEY))
        if old is None or row["norm"] != "jax_bn":
            continue
        if "failed" in row:
            worse.append(f"{_name(row)}: {row['failed']}")
        elif row["collectives"] > old["collectives"]:
            worse.append(f"{_name(row)}: {row['collectives']} operations over devices, before {old['collectives']}")
        elif row["traffic"] > MORE_TRAFFIC * old["traffic"]:
            worse.append(f"{_name(row)}: traffic {row['traffic']:,} bytes, before {old['traffic']:,}")
    return worse


def _mega(row: Row, name: str) -> str:
    return f"{row[name] / 1e6:,.1f}" if row.get(name) else "-"


def _plain(row: Row, name: str) -> str:
    return "-" if row.get(name) is None else f"{row[name]:,}"


COLUMNS = {
    "": lambda row: f"{row['network']}, {row['step']}, {row['dtype']}",
    "on": lambda row: f"{row['devices']} x {row['card']}",
    "norm": lambda row: row["norm"],
    "traffic, MB": lambda row: row.get("failed") or _mega(row, "traffic"),
    "Mcycles": lambda row: f"{row['cycles'] / 1e6:.2f}" if row.get("cycles") else "-",
    "bytes, MB": lambda row: _mega(row, "bytes"),
    "GFLOP": lambda row: f"{row['flops'] / 1e9:.2f}" if row.get("flops") else "-",
    "temp, MB": lambda row: _mega(row, "temp"),
    "fusions": lambda row: _plain(row, "fusions"),
    "over devices": lambda row: _plain(row, "collectives"),
    "float64": lambda row: _plain(row, "float64"),
    "compiled in, s": lambda row: f"{row['seconds']:.0f}" if "seconds" in row else "-",
}


def _markdown(found: dict[str, Any], options: Options) -> str:
    """docs/accelerators.md."""
    only = f" --only '{options.only}'" if options.only else ""
    machine = {name: value for name, value in found["machine"].items() if name != "load before"} | {"busy": False}
    said = "\n".join(f"- {line}" for line in bounds(found["rows"]))
    return f"""# What batch norm costs on accelerators

{made_by(f"{PROG}{only} --write docs/accelerators.md", machine)}

Steps compiled ahead of time for accelerators that were not there: nothing has run on them, and no time is claimed.
BLeNet's are those of `train_jax.py`, with 64 images for each device; ResNet-50's have 32 of 224 x 224, SGD with
momentum. **norm** is whose batch norm is in it, with all else alike. With four devices the statistics are those of the
whole batch, in both.

- **traffic**: bytes through memory at the borders of fusions, without caches; where `lax.cond` chooses, without the
  branches, of which the usual one is empty.
- **cycles**: the sum of the TPU compiler's own estimates, likewise; to compare two programs with, no more.
- **bytes**, **FLOP**: XLA's own analysis, which counts all branches (TPU only).
- **temp**: memory beside arguments and results. **over devices**: all-reduces and their like. **float64**: instructions
  that make float64.

TPU programs are compiled with `exec_time_optimization_effort` -1, GPU programs without autotuning, which needs the
card. The H100 is described to XLA by public figures (`benchmarks/accelerators/h100.txtpb`).

{rows_markdown(COLUMNS, found["rows"])}

## Bounds

Of a training step, in units of the same step with `flax.linen.BatchNorm`.

{said}
"""


if __name__ == "__main__":
    main()
