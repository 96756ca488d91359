"""Three processes that watch each other, without any framework: a loss is named by all others, and an end is none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bn_common import watch

ROOT = Path(__file__).parents[2]
SILENCE = 10.0  # seconds: a busy machine holds a process up for one or two
PROGRAM = """
import ctypes, pathlib, sys, time
from bn_common.watch import Watch

index, folder, seconds, silence = int(sys.argv[1]), pathlib.Path(sys.argv[2]), *map(float, sys.argv[3:5])

def publish(port):
    (folder / "new").write_text(str(port))
    (folder / "new").rename(folder / "port")

def find():
    while not (folder / "port").exists():
        time.sleep(0.05)
    return "127.0.0.1", int((folder / "port").read_text())

watch = Watch(index, 3, publish, find, "prog", silence=silence)
print("watching", watch.guard.pid, flush=True)
if index == int(sys.argv[5]):
    ctypes.PyDLL(None).sleep(int(seconds))  # which lets no other thread of this process do anything
else:
    time.sleep(seconds)
watch.leave()
print("left", flush=True)
"""


@pytest.fixture
def three(tmp_path):
    """Starts them; each works for so many seconds, one perhaps with the interpreter's lock."""
    processes = []

    def start(*seconds, locked=-1):
        for index, each in enumerate(seconds):
            command = [sys.executable, "-c", PROGRAM, *map(str, (index, tmp_path, each, SILENCE, locked))]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, cwd=ROOT, **pipes))
        for process in processes:
            watching, guard = process.stdout.readline().split()
            assert watching == "watching"
            process.guard = int(guard)
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def ends(process, within):
    """(status, standard output, standard error) of a process that ends in time."""
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


def test_none_is_lost(three):
    """Whoever is done first waits for the others, longer than the silence that is allowed."""
    for process in three(0, SILENCE + 1, 0.5):
        assert ends(process, 60) == (0, "left\n", "")


thorough = pytest.mark.thorough
STOPPED = [pytest.param(0, "STOP", marks=thorough), pytest.param(1, "STOP", marks=thorough), (2, "STOP")]


@pytest.mark.parametrize(("victim", "how"), [*((victim, "KILL") for victim in range(3)), *STOPPED])
def test_one_is_lost(three, victim, how):
    processes = three(100, 100, 100)
    time.sleep(1)
    processes[victim].send_signal(getattr(signal, f"SIG{how}"))
    what = "has ended" if how == "KILL" else f"has not answered for {SILENCE:g} seconds"
    for index, process in enumerate(processes):
        if index != victim:
            expected = f"prog: stopped: process {victim} {what}; process {index} ends\n"
            assert ends(process, 120) == (1, "", expected)


def test_a_short_stop_is_no_loss(three):
    processes = three(4, 4, 4)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(2)
    processes[1].send_signal(signal.SIGCONT)
    for process in processes:
        assert ends(process, 60) == (0, "left\n", "")


def test_who_is_done_may_not_be_missed_either(three):
    """One waits for the others at the end, and is killed: they have not been told that it may go."""
    processes = three(0, 100, 100)
    time.sleep(2.5)
    processes[0].kill()
    for index in (1, 2):
        expected = f"prog: stopped: process 0 has ended; process {index} ends\n"
        assert ends(processes[index], 120) == (1, "", expected)


def test_who_holds_the_lock_is_not_lost(three):
    """As in a long compilation, or where a busy machine leaves a process no time: it says nothing itself, and lives."""
    for process in three(1, SILENCE + 3, 2, locked=1):
        assert ends(process, 120) == (0, "left\n", "")


@thorough
def test_who_holds_the_lock_ends_as_well(three):
    """It can't hear that another is lost: its guard says so, and kills it."""
    processes = three(1000, 1000, 1000, locked=1)
    time.sleep(1)
    processes[2].kill()
    expected = "prog: stopped: process 2 has ended; process {} ends\n"
    assert ends(processes[0], 120) == (1, "", expected.format(0))
    assert ends(processes[1], 120) == (-signal.SIGKILL, "", expected.format(1))


def test_a_guard_is_killed(three):
    processes = three(100, 100, 100)
    os.kill(processes[1].guard, signal.SIGKILL)
    expected = ["process 1 has ended", "the guard of process 1 has ended", "process 1 has ended"]
    for index, (process, what) in enumerate(zip(processes, expected, strict=True)):
        assert ends(process, 120) == (1, "", f"prog: stopped: {what}; process {index} ends\n")


def test_where_no_files_can_be_handed_on(monkeypatch):
    """As on Windows: nobody is asked for anything or waited for, and that is said."""

    def called(*_):
        raise AssertionError

    monkeypatch.setattr(watch, "CAN_WATCH", False)
    for index in range(2):
        alone = watch.Watch(index, 2, called, called, "prog", silence=1000.0)
        assert alone.about.startswith("Notice: ")
        alone.failed()
        alone.leave()
