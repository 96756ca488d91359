"""Real processes that train together: the same as one; and what becomes of one when another is lost."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from bn_common import watch
from parity.comparison import bounds
from parity_tests.faults import LEFT, PROGRAMS, QUICKLY_COMPILED, ROOT, left, small_folder
from torch_bn.processes import again


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(program, folder, args, *, count=2, slurm=False, devices=1, **environment):
    """The processes, JAX's with so many devices each; their standard output and error go to files in the folder.

    slurm: JAX finds them itself.
    """
    address = ("127.0.0.1", str(free_port()))
    processes = []
    for rank in range(count):
        if slurm:
            more = ["--coordinator", "auto"]
            # The number of the job gives the port.
            names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
            own = dict(zip(names, (address[1], "localhost", str(count), str(rank), str(rank)), strict=True))
            own |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        elif program == "jax":
            more = ["--coordinator", ":".join(address), "--num-processes", str(count), "--process-id", str(rank)]
            own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        else:
            more, names = [], ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "OMP_NUM_THREADS")
            own = dict(zip(names, (*address, str(count), str(rank), str(rank), "1"), strict=True))
        command = [sys.executable, *PROGRAMS[program], *map(str, args), *more]
        with open(folder / f"out{rank}", "w") as out, open(folder / f"err{rank}", "w") as err:
            processes.append(
                subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, env=os.environ | environment | own)
            )
    return processes


def end(processes):
    for process in processes:
        process.kill()
        process.wait()


thorough = pytest.mark.thorough
# Processes, the devices of each, and the batch: shares of 13 and 12; of 7, 7, 7 and 6.
TOGETHER = {
    "two": (2, 1, 25, {}),
    "slurm": (2, 1, 25, {"slurm": True}),
    "four": (4, 1, 27, {}),
    "two of two": (2, 2, 27, {}),
}


@pytest.mark.parametrize("case", ["two", *(pytest.param(case, marks=thorough) for case in TOGETHER if case != "two")])
def test_jax_processes_are_devices(case, tmp_path):
    """To the bit: the weights, and the metrics but for the times. Process 0 alone writes."""
    count, devices, batch_size, options = TOGETHER[case]
    args = ["--data-dir", small_folder(tmp_path / "data"), "--epochs", 2, "--batch-size", batch_size]
    # XLA's pool has a thread for each core or device of the process, whichever are more: by that sums are cut up.
    environment = QUICKLY_COMPILED | {"NPROC": "4"}
    several = {"count": count, "devices": devices} | options | environment
    processes = start("jax", tmp_path, [*args, "--out", tmp_path / "several"], **several)
    try:
        assert [process.wait(300) for process in processes] == [0] * count, (tmp_path / "err0").read_text()
    finally:
        end(processes)
    command = [sys.executable, *PROGRAMS["jax"], *map(str, args), "--out", str(tmp_path / "one")]
    one = os.environ | environment | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count * devices)}
    subprocess.run(command, cwd=ROOT, env=one, check=True, capture_output=True, timeout=300)
    assert left(tmp_path / "several") == left(tmp_path / "one")
    assert f"{count * devices} x cpu in {count} processes" in (tmp_path / "out0").read_text()
    assert "epoch" not in (tmp_path / "out1").read_text()
    assert {path.name for path in (tmp_path / "several").iterdir()} == LEFT


@thorough
def test_a_notice_to_one_of_two(tmp_path):
    """SIGTERM to the second: both stop after the same step, which is saved; given again, they end as two devices do."""
    data = small_folder(tmp_path / "data")
    args = ["--data-dir", data, "--epochs", 60, "--batch-size", 20, "--out", tmp_path / "run"]
    processes = start("jax", tmp_path, args, **QUICKLY_COMPILED)
    try:
        begun = time.monotonic()
        while "epoch  3/60" not in (tmp_path / "out0").read_text():
            assert time.monotonic() - begun < 300
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(120) for process in processes] == [143, 143]
        said = (tmp_path / "err0").read_text()
        assert said.count("\n") == 1
        assert "interrupted by SIGTERM; " in said
        assert "holds the checkpoint of step" in said
        assert "train_jax.py: interrupted by SIGTERM\n" in (tmp_path / "err1").read_text()
        processes = start("jax", tmp_path, args, **QUICKLY_COMPILED)
        assert [process.wait(300) for process in processes] == [0, 0], (tmp_path / "err0").read_text()
    finally:
        end(processes)
    assert "continued from step" in (tmp_path / "out0").read_text()
    command = [sys.executable, *PROGRAMS["jax"], *map(str, args[:-1]), str(tmp_path / "one")]
    one = os.environ | QUICKLY_COMPILED | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    subprocess.run(command, cwd=ROOT, env=one, check=True, capture_output=True, timeout=300)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "run")]
    assert weights[0] == weights[1]


def test_torchrun(tmp_path):
    """Two processes and one go the same way, but for rounding; a bad option is refused in one line, by status 2."""
    args = ["-m", "torch_bn.training", "--data-dir", str(small_folder(tmp_path / "data")), "--epochs", "1"]
    args += ["--batch-size", "25", "--optimizer", "sgd", "--lr", "0.1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    runs = {"one": [sys.executable, *args], "two": [*launch, *args], "local": [*launch, *args, "--sync-bn", "local"]}
    lines, printed = {}, {}
    for name, command in runs.items():
        command = [*command, "--out", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "deprecated" not in done.stderr
        lines[name], printed[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text()), done.stdout
    assert printed["two"].startswith("a process that ends early")
    assert "2 x cpu" in printed["two"]
    assert printed["two"].count("epoch 1/1") == 1
    for key in ("step", "train_accuracy", "test_accuracy"):
        assert lines["one"][key] == lines["two"][key]
    for key in ("loss", "test_loss"):
        assert lines["two"][key] == pytest.approx(lines["one"][key], abs=bounds.FLOAT32_LOGITS_200_SGD_STEPS)
        assert abs(lines["local"][key] - lines["one"][key]) > 1e-4
    for more, words in (
        (["--devices", "2"], "--devices is 2; allowed: 1, the number of processes"),
        (["--coordinator", "auto"], "--coordinator is auto; allowed: torchrun's own options"),
    ):
        command = [sys.executable, *args, *more, "--out", str(tmp_path / "refused")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert words in done.stderr
        assert not (tmp_path / "refused").exists()


@thorough
def test_torchrun_is_told_to_stop(tmp_path):
    """All of its processes stop after one step, which is saved; given again, they end in the same bytes."""
    args = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "torch_bn.training", "--batch-size", "20"]
    args += ["--data-dir", str(small_folder(tmp_path / "data")), "--epochs", "30", "--checkpoint-every", "7"]
    whole, command = ([sys.executable, *args, "--out", str(tmp_path / name)] for name in ("whole", "run"))
    finished = {"check": True, "capture_output": True, "text": True, "timeout": 300, "cwd": ROOT}
    subprocess.run(whole, **finished)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launched:
        for line in launched.stdout:
            if line.startswith("epoch  3/"):
                launched.terminate()
                break
        _, errors = launched.communicate(timeout=120)
    assert launched.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("python -m torch_bn.training: ")]
    assert len(said) == 2
    assert sum("holds the checkpoint of step" in line for line in said) == 1
    assert all("interrupted by SIGTERM" in line for line in said)
    (told,) = (line.partition("; to go on: ")[2] for line in said if "to go on" in line)
    assert told.startswith("torchrun --nproc-per-node 2 -m torch_bn.training --resume --out ")
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(told)[1:]]
    assert "continued from step" in subprocess.run(command, **finished).stdout
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def test_how_to_go_on(monkeypatch):
    """Of several processes, the command that starts all of them, as torchrun tells them of it."""
    prog = "python -m torch_bn.training"
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert again(prog) == ""
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert again(prog) == f"in each process, as it was started: {prog}"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert again(prog) == "torchrun --nproc-per-node 8 -m torch_bn.training"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    several = "torchrun --nnodes 2 --nproc-per-node 4 -m torch_bn.training"
    assert again(prog) == f"on each node, with its rendezvous: {several}"


def test_none_to_be_found(tmp_path):
    command = [sys.executable, *PROGRAMS["jax"], "--data", "sample", "--coordinator", "auto", "--out", tmp_path / "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--coordinator is auto" in done.stderr
    assert not (tmp_path / "run").exists()


# The program, but for how long it waits for the others.
ALONE = """
import importlib, runpy, sys
module, wing, *sys.argv = sys.argv[1:]
importlib.import_module(f"{wing}.processes").SECONDS_TO_JOIN = 4
runpy.run_path(module, run_name="__main__")
"""


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_does_not_come(program, rank, tmp_path):
    """One line, status 2, before any work."""
    address, given = ("127.0.0.1", str(free_port())), ["--data", "sample", "--out", str(tmp_path / "run")]
    path, wing = ("train_jax.py", "jax_bn") if program == "jax" else ("torch_bn/training.py", "torch_bn")
    if program == "jax":
        given += ["--coordinator", ":".join(address), "--num-processes", "2", "--process-id", str(rank)]
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
    own = dict(zip(names, (*address, "2", str(rank), str(rank)), strict=True)) if program == "torch" else {}
    command = [sys.executable, "-c", ALONE, path, wing, path, *given]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    said = [line for line in lines if ": error: " in line]
    assert said == (lines[-1:] if program == "torch" else lines)  # PyTorch's socket says more, in its own words
    assert "2" in said[0]
    assert "; allowed: " in said[0]
    assert len(said[0]) < 300
    assert not (tmp_path / "run").exists()


@thorough
def test_both_diverge(tmp_path):
    """No process is taken for lost then: each says so in a line, and the run folder holds no NaN."""
    args = [
        "--data-dir",
        small_folder(tmp_path / "data"),
        "--batch-size",
        100,
        "--epochs",
        3,
        "--out",
        tmp_path / "run",
    ]
    bad = ["--optimizer", "sgd", "--schedule", "constant", "--lr", 1e6, "--weight-decay", 1e6, "--warmup-epochs", 0]
    processes = start("jax", tmp_path, [*args, *bad], **QUICKLY_COMPILED)
    try:
        assert [process.wait(300) for process in processes] == [1, 1]
    finally:
        end(processes)
    for rank in range(2):
        lines = [line for line in (tmp_path / f"err{rank}").read_text().splitlines() if not line.startswith("[Gloo]")]
        assert len(lines) == 1, lines
        assert "no longer finite in epoch" in lines[0]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


LOSSES = [(0, "KILL"), (1, "STOP"), pytest.param(1, "KILL", marks=thorough), pytest.param(0, "STOP", marks=thorough)]


@pytest.mark.parametrize(("victim", "how"), LOSSES, ids=lambda v: str(v))
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_process_is_lost(program, victim, how, tmp_path):
    """The other ends within the bound that was printed, with one line that names it, and not with success."""
    data = small_folder(tmp_path / "data")
    args = ["--data-dir", data, "--batch-size", 50, "--epochs", 100000, "--out", tmp_path / "run"]
    processes = start(program, tmp_path, args, **QUICKLY_COMPILED)
    try:
        started = time.monotonic()
        while "epoch      2/100000" not in (tmp_path / "out0").read_text():
            assert time.monotonic() - started < 300
            assert [process.poll() for process in processes] == [None, None], (tmp_path / "err0").read_text()
            time.sleep(0.1)
        assert f"does not answer for {watch.SILENCE:g} seconds" in (tmp_path / "out0").read_text()
        processes[victim].send_signal(getattr(signal, f"SIG{how}"))
        # JAX itself would wait for ten minutes.
        status = processes[1 - victim].wait(300)
        assert status > 0
        what = "has ended" if how == "KILL" else f"has not answered for {watch.SILENCE:g} seconds"
        errors = (tmp_path / f"err{1 - victim}").read_text()
        assert f"stopped: process {victim} {what}; process {1 - victim} ends\n" in errors
        assert len([line for line in errors.splitlines() if not line.startswith("[Gloo]")]) == 1, errors
    finally:
        end(processes)
