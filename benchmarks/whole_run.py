"""How long does a whole run take, from the start of the process: to its first step, and to an accuracy?

    python -m benchmarks.whole_run --accuracy 0.85 --rounds 1
    python -m benchmarks.whole_run --write docs/whole_run_speed.md

`train_jax.py` and `python -m torch_bn.training`, its twin in PyTorch, with the same options, in turns A B A B, as a
user starts them. JAX's first run begins with an empty compilation cache; the others find what it has compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from benchmarks.harness import (
    Calibration,
    command,
    describe_machine,
    is_installed,
    made_by,
    measured,
    note_busy,
    print_line,
    print_machine,
    rows_markdown,
    rows_table,
)
from bn_common.command_line import load, parse
from bn_common.config import Config
from bn_common.run_folder import METRICS

PROG = "python -m benchmarks.whole_run"
ROOT = Path(__file__).parents[1]
PROGRAMS = {"jax": [str(ROOT / "train_jax.py")], "torch": ["-m", "torch_bn.training"]}
SECOND_START = 3.0
"""Bound for the seconds from the start of `train_jax.py` to its first step, where it has been compiled before."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    accuracy: float = 0.90
    """Test accuracy at which a run ends (`--until-accuracy`), above 0 and below 1."""
    rounds: int = 2
    """Runs of each program, 1 to 20; JAX has one more, the first."""
    data: Literal["fashion-mnist", "sample"] = "fashion-mnist"
    """fashion-mnist or sample, as the programs have it."""
    json: Path | None = None
    """Also write the figures to this file."""
    write: Path | None = None
    """Also write the table to this file, in Markdown."""


def main(args: Sequence[str] | None = None) -> None:
    """The program."""
    options = parse(Options, args, prog=PROG, description="A whole run's seconds, JAX and PyTorch in turns.")
    measured(options, PROG, _check, measure, _markdown)


def _check(options: Options) -> None:
    if not 0 < options.accuracy < 1:
        raise ValueError(f"--accuracy is {options.accuracy}; allowed: above 0, below 1")
    if not 1 <= options.rounds <= 20:
        raise ValueError(f"--rounds is {options.rounds}; allowed: 1 to 20")
    if not is_installed("torch"):
        raise ValueError("torch is not installed; allowed: an environment with it (pip install '.[bench]')")


def measure(options: Options, console: Console) -> dict[str, Any]:
    """Run the programs in turns, print a row for each run, and return machine and rows."""
    load(Config(data=options.data), console)  # were it downloaded, the first run would wait
    machine = describe_machine() | {name: importlib.metadata.version(name) for name in ("jax", "torch")}
    rows: list[Row] = []
    print_machine(machine, console)
    turns = [("jax", "empty"), *[(name, "filled" if name == "jax" else "") for name in PROGRAMS] * options.rounds]
    with Calibration() as calibration, tempfile.TemporaryDirectory(prefix="whole-run-") as folder:
        for number, (name, cache) in enumerate(turns):
            for _ in range(5):
                calibration.take()
            rows.append({"name": name, "cache": cache, **_run(name, Path(folder), f"run-{number}", options)})
            print_line("  ".join(f"{key} {value}" for key, value in rows[-1].items()), console)
    console.print(rows_table(COLUMNS, rows))
    second = statistics.median(row["first_step_s"] for row in rows if row["cache"] == "filled")
    met = "met" if second <= SECOND_START else "missed"
    print_line(
        f"JAX's first step where it was compiled before: {second:.1f} s, bound {SECOND_START:.1f}: {met}", console
    )
    note_busy(machine, calibration, console)
    return {"machine": machine, "rows": rows, "second_start_s": second, "met": second <= SECOND_START}


def _run(name: str, folder: Path, run: str, options: Options) -> Row:
    """One run: seconds from its start to its first step and to its end, epochs, accuracy, peak memory.

    Raises:
      EOFError: the program has failed; with what it said.
    """
    command = [sys.executable, *PROGRAMS[name], "--until-accuracy", str(options.accuracy), "--data", options.data]
    # The data are found where they are; what is compiled goes into a folder of this benchmark's.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla")} | _CACHE
    begin = time.time()
    with _started([*command, "--out", str(folder / run)], environment) as process:
        said = process.stderr.read() if process.stderr else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.time() - begin
    if process.returncode:
        raise EOFError(f"{' '.join(command[1:])} has ended with status {process.returncode}: {said.strip()[-300:]}")
    lines = [json.loads(line) for line in (folder / run / METRICS).read_text().splitlines()]
    return {
        "first_step_s": round(lines[0]["start_time"] - begin, 2),
        "whole_run_s": round(seconds, 1),
        "epochs": len(lines),
        "test_accuracy": lines[-1]["test_accuracy"],
        "peak_memory_mib": round(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)),
    }


# As `jax_bn.settings.keep_compiled` has it for the folder that it chooses itself.
_CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@contextlib.contextmanager
def _started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The program's process; ended, if this one is."""
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        if process.stderr:
            process.stderr.close()


COLUMNS = {
    "": lambda row: {"jax": "train_jax.py", "torch": "torch_bn.training"}[row["name"]],
    "compiled before": lambda row: {"empty": "no", "filled": "yes", "": "-"}[row["cache"]],
    "first step, s": lambda row: f"{row['first_step_s']:.1f}",
    "whole run, s": lambda row: f"{row['whole_run_s']:.1f}",
    "epochs": lambda row: str(row["epochs"]),
    "test accuracy": lambda row: f"{row['test_accuracy']:.4f}",
    "peak MiB": lambda row: str(row["peak_memory_mib"]),
}


def _markdown(found: dict[str, Any], options: Options) -> str:
    """docs/whole_run_speed.md."""
    head = f"""# How long a whole run takes

{made_by(command(PROG, options, "docs/whole_run_speed.md"), found["machine"])}

The default run of both wings (seed 0) until the test accuracy is {options.accuracy:g}, in this order. Seconds count
from the start of the process: Python, the framework and the data are loaded before the first step begins, and JAX's
step is compiled, or found compiled.
"""
    return f"{head}\n{rows_markdown(COLUMNS, found['rows'])}\n"


if __name__ == "__main__":
    main()
