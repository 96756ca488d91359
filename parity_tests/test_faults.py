"""Faults, tried for real: what is saved is whole, how to go on is said in one line, and nothing else is.

The random ones are `make faults`.
"""

import contextlib
import errno
import os
import pty
import signal
import subprocess
import sys
import threading

import jax
import pytest
from jax.experimental import multihost_utils

import jax_bn.training
import torch_bn.training
from bn_common import checkpoints, files, stopping
from bn_common.stopping import Stopped
from jax_bn.checkpoint import agreed
from parity_tests.faults import (
    OPTIONS,
    PROGRAMS,
    QUICKLY_COMPILED,
    ROOT,
    check_killed,
    check_tidy,
    finished,
    left,
    small_folder,
    start,
)
from parity_tests.test_checkpoint import LOOPS, KilledRun, trained
from parity_tests.test_checkpoint import left as left_in

TRAINING = {"jax": jax_bn.training, "torch": torch_bn.training}


@pytest.mark.parametrize("program", PROGRAMS)
def test_killed_stopped_and_given_again(program, tmp_path):
    """kill -9 in the midst of it, SIGTERM where it goes on, then left alone: the bytes of an undisturbed run.

    Which nobody listens to: its standard output is full.
    """
    data = small_folder(tmp_path / "data")
    command = [sys.executable, *PROGRAMS[program], "--data-dir", str(data), "--out", str(tmp_path / "whole"), *OPTIONS]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | QUICKLY_COMPILED, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")

    out, said = tmp_path / "run", []
    for number, epoch in ((signal.SIGKILL, 2), (signal.SIGTERM, 4), (signal.SIGHUP, 6)):
        with start(program, data, out) as process:
            for line in process.stdout:
                said.append(line)
                if line.startswith(f"epoch {epoch:2d}/"):
                    process.send_signal(number)
                    break
            rest, errors = process.communicate(timeout=120)
        if number == signal.SIGKILL:
            assert (process.returncode, errors) == (-number, "")
            check_killed(out, "".join(said) + rest)
        else:
            assert process.returncode == 128 + number
            assert errors.count("\n") == 1
            assert f"interrupted by {signal.Signals(number).name}; {out} holds the checkpoint of step" in errors
            assert f"--resume --out {out}" in errors
    assert "continued from step" in finished(program, data, out, "--resume")
    assert left(out) == left(tmp_path / "whole")
    check_tidy(out)
    assert "holds all of this run" in finished(program, data, out)


def test_nothing_to_write_to(tmp_path):
    """Standard output and error closed: what is opened next takes their numbers, and is not written to."""
    data, out = small_folder(tmp_path / "data"), tmp_path / "run"
    command = [sys.executable, *PROGRAMS["jax"], "--data-dir", str(data), "--out", str(out), *OPTIONS, "--epochs", "1"]
    shell = ["sh", "-c", '"$@" >&- 2>&-', "sh", *command]
    assert subprocess.run(shell, cwd=ROOT, env=os.environ | QUICKLY_COMPILED).returncode == 0
    assert {path.name for path in out.iterdir()} >= {"curves.png", "weights.safetensors"}


@pytest.mark.parametrize(
    ("loop", "number"),
    [("jax", errno.ENOSPC), ("torch", errno.ENOSPC), ("torch", errno.EDQUOT), ("torch", errno.EROFS)],
)
@pytest.mark.usefixtures("quickly_compiled")
def test_what_cannot_be_written(loop, number, tmp_path, monkeypatch):
    """Ends the run with the reason; the checkpoint before is whole, and from there it goes on."""
    monkeypatch.setattr("bn_common.run_folder.draw_curves", lambda *_: b"")
    calls, fsync = [], os.fsync

    def full(file):
        calls.append(file)
        if len(calls) > 6:
            raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(number)):
        trained(loop, tmp_path / "run", checkpoint_every=3)
    monkeypatch.setattr(files.os, "fsync", fsync)
    assert "continued from step" in trained(loop, tmp_path / "run")
    if number == errno.ENOSPC:
        trained(loop, tmp_path / "whole")
        assert left_in(tmp_path / "run") == left_in(tmp_path / "whole")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_is_full(tmp_path):
    """Orbax's own writing: one line, no trace."""
    disk, data = tmp_path / "disk", small_folder(tmp_path / "data")
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with start("jax", data, disk / "run") as process:
            _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert errors.count("\n") == 1
        assert "No space left on device; " in errors
        assert "holds the checkpoint of step" in errors
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("quickly_compiled")
def test_a_folder_that_is_gone(loop, tmp_path, monkeypatch):
    """Is not made anew with half of the run in it."""
    monkeypatch.setattr(
        "bn_common.run_folder._tidy", lambda path: (path / "config.json").exists() and path.rename(gone)
    )
    gone = tmp_path / "gone"
    trained(loop, tmp_path / "run", after=3)
    with pytest.raises(ValueError, match="No such file"):
        trained(loop, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_signals():
    """At once, or noted; what is ignored stays ignored, and all is as before afterwards."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.asked is None
            signals.deferred = True
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.asked == signal.SIGTERM
        with stopping.Signals(), pytest.raises(Stopped) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.value.signal, stop.value.status) == (signal.SIGTERM, 143)
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in stopping.SIGNALS} == before


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("quickly_compiled")
def test_told_twice(loop, tmp_path, monkeypatch, capfd):
    """In a step, and again while that is saved: it is saved, and the run ends by the first signal."""
    seal, before = checkpoints.seal, {number: signal.getsignal(number) for number in stopping.SIGNALS}

    def told_again(path, about):
        os.kill(os.getpid(), signal.SIGTERM)  # not SIGINT, which is ignored where the suite runs in the background
        seal(path, about)

    monkeypatch.setattr(checkpoints, "seal", told_again)
    with stopping.Signals() as signals:
        signals.deferred = True

        def told_to_stop(step):
            if step == 5 and signals.asked is None:
                os.kill(os.getpid(), signal.SIGTERM)
            return signals.asked

        given = property(lambda run: told_to_stop, lambda run, value: None)
        monkeypatch.setattr(KilledRun, "told_to_stop", given, raising=False)
        with pytest.raises(Stopped) as stop:
            trained(loop, tmp_path / "run")
    assert stop.value.signal == signal.SIGTERM
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["5"]
    assert capfd.readouterr().err == "It ends as soon as a checkpoint is written; told once more, it ends without.\n"
    monkeypatch.undo()
    assert {number: signal.getsignal(number) for number in stopping.SIGNALS} == before
    assert "continued from step 5" in trained(loop, tmp_path / "run")


BAR = """
import os, signal
from rich.progress import Progress
from bn_common import stopping

with stopping.Signals() as signals:
    signals.deferred = True
    with Progress() as bar:
        for _ in range(3):
            print("told", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
"""


def test_told_a_third_time():
    """It ends at once, and the terminal has its cursor again, which the progress bar has hidden."""
    near, far = pty.openpty()
    command, environment = [sys.executable, "-c", BAR], os.environ | {"TERM": "xterm"}
    with subprocess.Popen(command, cwd=ROOT, stdin=far, stdout=far, stderr=far, env=environment) as process:
        os.close(far)
        late = threading.Timer(120, process.kill)
        late.start()
        said = b""
        with contextlib.suppress(OSError):  # Linux's word for the end of a terminal
            while more := os.read(near, 4096):
                said += more
    late.cancel()
    os.close(near)
    assert process.returncode == 128 + signal.SIGTERM
    assert said.count(b"told\r\n") == 3
    assert -1 < said.rfind(b"\x1b[?25l") < said.rfind(b"\x1b[?25h")


@pytest.mark.usefixtures("quickly_compiled")
def test_a_notice_to_one_of_several_processes(tmp_path, monkeypatch):
    """The step that JAX has had all of them agree on is saved; a signal of this process alone is not enough."""
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 5)
    asked = {2: signal.SIGINT}.get
    assert [agreed(asked, 2)(step) for step in (1, 2, 5)] == [None, None, signal.SIGTERM]
    assert [agreed(asked, 1)(step) for step in (1, 2, 5)] == [None, signal.SIGINT, signal.SIGTERM]
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(Stopped) as stop:
        trained("jax", tmp_path / "run")
    assert stop.value.signal == signal.SIGTERM
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["5"]
