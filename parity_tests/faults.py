"""Kill training runs at random moments, and see that nothing is lost: `make faults`, or

    python -m parity_tests.faults --moments 50 --seed 1

Each run of a program is killed (or told to stop, or a byte of its newest checkpoint flips) some times over and given
again, until it ends; then its weights and metrics are those of a run that nobody has disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import image_data
from bn_common.record import METRICS, WEIGHTS
from bn_common.run_folder import weights_metadata
from image_data.dataset import FILES

ROOT = Path(__file__).parents[1]
PROGRAMS = {"jax": ["train_jax.py"], "torch": ["-m", "torch_bn.training"]}
# For runs of which the numbers do not matter: conftest.py's `quickly_compiled`.
QUICKLY_COMPILED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
OPTIONS = ["--batch-size", "20", "--epochs", "12", "--checkpoint-every", "4"]
TIMES = "start_time", "seconds", "images_per_second"
LEFT = {"config.json", "config.toml", "metrics.jsonl", "weights.safetensors", "checkpoints"}
LEFT |= {"curves.png", "confusion.png", "mistakes.png"}


def small_folder(folder: Path) -> Path:
    """200 + 50 images of the sample, in the naming of MNIST, as plain files."""
    sample = image_data.load_sample()
    folder.mkdir()
    for name, array in zip(FILES, sample[:4], strict=True):
        image_data.write_idx(folder / name, array[:200] if "train" in name else array[:50])
    return folder


def start(program: str, data: Path, out: Path, *more: str) -> subprocess.Popen:
    """The program on those data, its output in pipes; no signal is ignored, whatever started us (as `nohup` does)."""
    command = [sys.executable, *PROGRAMS[program], "--data-dir", str(data), "--out", str(out), *OPTIONS, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | QUICKLY_COMPILED, **pipes)
    for number, handler in before.items():
        signal.signal(number, handler)
    return process


def finished(program: str, data: Path, out: Path, *more: str) -> str:
    """Run it to its end, which must be a good one; what it has said."""
    with start(program, data, out, *more) as process:
        said, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, ""), (process.returncode, errors)
    return said


def left(out: Path) -> tuple[bytes, list[dict]]:
    """What a run leaves, beside its times."""
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    numbers = [{name: v for name, v in line.items() if name not in TIMES} for line in lines]
    return (out / WEIGHTS).read_bytes(), numbers


def check_killed(out: Path, said: str) -> None:
    """What was said to be finished is there, and the weights are of that epoch, or of the one whose line was next."""
    told = sum(line.startswith("epoch ") for line in said.splitlines())
    lines = (out / METRICS).read_text().splitlines() if (out / METRICS).exists() else []
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) >= told
    assert int(weights_metadata(out / WEIGHTS).get("epoch", 0)) - len(lines) in (0, 1)


def check_tidy(out: Path) -> None:
    """No file is left that a killed process was writing."""
    assert {path.name for path in out.iterdir()} == LEFT
    names = [path.name.removesuffix(".damaged") for path in (out / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in names), names


def disturb(program: str, data: Path, out: Path, seconds: float, how: str) -> str:
    """Let it run for so long, and end it; the moment, in words."""
    with start(program, data, out) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        said, errors = process.communicate(timeout=300)
    if process.returncode == 0:
        return "it had ended"
    assert process.returncode == (143 if how == "SIGTERM" else -signal.SIGKILL), (process.returncode, errors)
    assert errors.count("\n") == (how == "SIGTERM"), errors
    if out.exists():
        check_killed(out, said)
    sealed = [path.parent.name for path in out.glob("checkpoints/*/checkpoint.json")]
    steps = [int(name) for name in sealed if name.isdigit()]
    if how == "flip" and len(steps) > 1:
        file = max((out / "checkpoints" / str(max(steps))).rglob("*"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 4
        file.write_bytes(content)
    return f"{how} after {seconds:.2f} s, step {max(steps, default=0)} saved"


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description="Kill training runs at random moments, and see that nothing is lost.")
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        data = small_folder(folder / "data")
        whole, lasts = {}, {}
        for program in PROGRAMS:
            finished(program, data, folder / f"{program}-first")  # compiled now
            begun = time.monotonic()
            finished(program, data, folder / program)
            lasts[program] = time.monotonic() - begun
            whole[program] = left(folder / program)
            assert left(folder / f"{program}-first") == whole[program]
        for moment in range(options.moments):
            program, out = rng.choice(list(PROGRAMS)), folder / f"run-{moment}"
            for _ in range(rng.randint(1, 3)):
                how = rng.choice(["SIGKILL", "SIGKILL", "SIGTERM", "flip"])
                done = disturb(program, data, out, rng.uniform(0.3, 1.0) * lasts[program], how)
                print(f"{moment + 1}/{options.moments} {program}: {done}", flush=True)
            finished(program, data, out)
            assert left(out) == whole[program], f"{program}: other weights or metrics than undisturbed"
            check_tidy(out)
    print(f"{options.moments} runs disturbed, nothing lost")


if __name__ == "__main__":
    main()
