"""What does `parity.check` cost: CPU seconds and memory, each pair in a process of its own, nothing compiled before?

    python -m benchmarks.check
    python -m benchmarks.check --pairs readme unet --rounds 3
    python -m benchmarks.check --write docs/check_speed.md

CPU seconds count all threads and the call of `parity.check` alone: PyTorch and JAX are imported, and the two modules
made, before. The memory is the most that the process ever had, the modules' own included.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from benchmarks.harness import (
    Calibration,
    answer,
    describe_machine,
    is_installed,
    made_by,
    measured,
    note_busy,
    print_line,
    print_machine,
    rows_markdown,
    rows_table,
    worker,
)
from bn_common.command_line import parse

PROG = "python -m benchmarks.check"
Name = Literal["readme", "unet", "transformer", "resnet50"]
WHAT: dict[str, str] = {
    "readme": "the README's pair, with its mistake",
    "unet": "a U-Net of 25 layers, 2 images of 32x32",
    "transformer": "a transformer of BERT-base's size: 12 layers, 2 x 64 tokens",
    "resnet50": "ResNet-50, 2 images of 224x224",
}
BOUNDS = {"readme": (3, None), "unet": (8, None), "transformer": (60, 6), "resnet50": (120, 6)}
"""CPU seconds and GB (2^30 bytes); None: no bound."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    pairs: tuple[Name, ...] = get_args(Name)
    """Which pairs."""
    rounds: int = 1
    """Checks of each pair, 1 to 20; the medians are shown."""
    json: Path | None = None
    """Also write the figures to this file."""
    write: Path | None = None
    """Also write the table to this file, in Markdown."""


def main(args: Sequence[str] | None = None) -> None:
    """The program."""
    options = parse(Options, args, prog=PROG, description="What parity.check costs, on pairs of four sizes.")
    measured(options, PROG, _check, measure, _markdown)


def _check(options: Options) -> None:
    if not 1 <= options.rounds <= 20:
        raise ValueError(f"--rounds is {options.rounds}; allowed: 1 to 20")
    if not is_installed("torch"):
        raise ValueError("torch is not installed; allowed: an environment with it (pip install '.[torch]')")


def measure(options: Options, console: Console) -> dict[str, Any]:
    """Check the pairs in turns, print a row for each, and return machine and rows."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch")}
    machine = describe_machine() | versions
    taken: dict[str, list[Row]] = {name: [] for name in options.pairs}
    print_machine(machine, console)
    with Calibration() as calibration:
        for name in list(options.pairs) * options.rounds:
            for _ in range(5):
                calibration.take()
            with worker(serve, name) as connection:
                taken[name].append(answer(connection))
            print_line(f"{name}: {taken[name][-1]}", console)
    rows: list[Row] = []
    for pair, runs in taken.items():
        seconds, memory = (statistics.median(run[key] for run in runs) for key in ("cpu_s", "gb"))
        met = all(bound is None or value <= bound for value, bound in zip((seconds, memory), BOUNDS[pair], strict=True))
        rows.append({"name": pair, "cpu_s": round(seconds, 1), "gb": round(memory, 1), "met": met, "runs": runs})
    console.print(rows_table(COLUMNS, rows))
    note_busy(machine, calibration, console)
    return {"machine": machine, "rows": rows}


def serve(connection: Connection, name: str) -> None:
    """One check, in the worker: CPU seconds, wall seconds, the most memory of the process, and the verdict."""
    import jax
    import torch

    import parity
    from benchmarks.check_pairs import PAIRS

    jax.config.update("jax_enable_compilation_cache", False)
    torch.manual_seed(0)
    torch_module, flax_module, inputs = PAIRS[name]()
    cpu, wall = time.process_time(), time.perf_counter()
    report = parity.check(torch_module, flax_module, *inputs, train=False)
    found = {
        "cpu_s": round(time.process_time() - cpu, 2),
        "wall_s": round(time.perf_counter() - wall, 2),
        "gb": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20), 2
        ),
        "ok": report.ok,
        "codes": [diagnosis.code for diagnosis in report.diagnoses],
    }
    connection.send(found)


COLUMNS = {
    "": lambda row: WHAT[row["name"]],
    "CPU s": lambda row: f"{row['cpu_s']:.1f}",
    "bound": lambda row: str(BOUNDS[row["name"]][0]),
    "GB": lambda row: f"{row['gb']:.1f}",
    "bound, GB": lambda row: str(BOUNDS[row["name"]][1] or "-"),
    "met": lambda row: "yes" if row["met"] else "MISSED",
    "verdict": lambda row: "ok" if row["runs"][0]["ok"] else ", ".join(row["runs"][0]["codes"]),
}


def _markdown(found: dict[str, Any], options: Options) -> str:
    """docs/check_speed.md."""
    head = f"""# What `parity.check` costs

{made_by(f"{PROG} --write docs/check_speed.md", found["machine"])}

Each pair in a process of its own in which nothing was compiled before, in prediction. CPU seconds of all threads, of
the call of `parity.check` alone; the most memory (2^30 bytes) that the process had, the modules' own included.
"""
    return f"{head}\n{rows_markdown(COLUMNS, found['rows'])}\n"


if __name__ == "__main__":
    main()
