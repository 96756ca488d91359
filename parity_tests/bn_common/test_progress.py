"""The line of progress, on a terminal of its own and by a clock that the test turns: nothing here waits."""

import contextlib
import fcntl
import io
import os
import struct
import sys
import termios
import threading

import pytest

from bn_common import progress as progress_module
from bn_common.progress import ERASE, progress


class Terminal:
    """A terminal, as standard error or output; and what somebody in front of it sees."""

    def __init__(self, columns):
        self.end, self.mine = os.openpty()
        fcntl.ioctl(self.mine, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = open(self.mine, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        self.written = ""

    def seen(self):
        """The lines on the screen; only what the line of progress uses is understood."""
        self.stream.flush()
        os.set_blocking(self.end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.written += os.read(self.end, 65536).decode()
        rows, at = [""], 0
        for i, text in enumerate(self.written.split("\x1b[K")):
            rows[-1] = rows[-1][:at] if i else rows[-1]
            for c in text:
                if c == "\n":
                    rows.append("")
                elif c == "\r":
                    at = 0
                else:
                    rows[-1], at = rows[-1][:at] + c + rows[-1][at + 1 :], at + 1
        return rows

    def close(self):
        self.stream.close()
        os.close(self.mine)
        os.close(self.end)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def terminal(monkeypatch):
    """Of 60 columns. The line is drawn when the test says so, and not besides by its own thread."""
    made = Terminal(60)
    monkeypatch.setattr(progress_module, "BEAT", 1e6)
    monkeypatch.setenv("TERM", "xterm")
    yield made
    made.close()


@contextlib.contextmanager
def checking(terminal, clock):
    """With the terminal as standard output and error, which are as before at the end."""
    stream = terminal.stream
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            with progress("checking", clock) as line:
                yield line
        finally:
            assert sys.stdout is sys.stderr is stream


def test_a_line_after_two_seconds_and_nothing_at_the_end(terminal):
    clock = Clock()
    with checking(terminal, clock) as line:
        line.stage("gradients", 3, 7)
        clock.now += 1.5
        line.draw()
        assert terminal.seen() == [""]
        clock.now += 0.5
        line.draw()
        assert terminal.seen() == ["checking: gradients, 3 of at most 7, 2 s"]
        clock.now += 12
        line.stage("all", 4, 7)
        assert terminal.seen() == ["checking: all, 4 of at most 7, 14 s"]
    assert terminal.seen() == [""]


def test_what_is_printed_meanwhile_stands_alone(terminal):
    """It is neither overwritten nor appended to the line, which comes back below it."""
    clock = Clock()
    with checking(terminal, clock) as line:
        line.stage("gradients", 3, 7)
        clock.now += 5
        line.draw()
        print("of the module")
        print("a part of ", end="")
        line.draw()
        assert terminal.seen() == ["of the module", "a part of "]
        print("a line", file=sys.stderr)
        sys.stdout.writelines(["and two\n", "more\n"])
        line.draw()
        printed = ["of the module", "a part of a line", "and two", "more"]
        assert terminal.seen() == [*printed, "checking: gradients, 3 of at most 7, 5 s"]
    assert terminal.seen() == [*printed, ""]


def test_it_is_gone_before_an_error_is_told(terminal):
    clock = Clock()

    def interrupted():
        with checking(terminal, clock) as line:
            clock.now += 5
            line.draw()
            assert terminal.seen() == ["checking: 5 s"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert terminal.seen() == [""]


def test_a_line_that_a_narrow_terminal_would_wrap_is_cut(terminal):
    """Of a wrapped one the first half would stay."""
    clock = Clock()
    with checking(terminal, clock) as line:
        clock.now += 5
        line.stage("x" * 100, 3, 7)
        assert terminal.seen() == [("checking: " + "x" * 100)[:59]]


def test_by_itself_it_is_drawn_again_and_again(terminal, monkeypatch):
    """From a thread of its own, while the program is busy."""
    monkeypatch.setattr(progress_module, "BEAT", 1e-3)
    clock = Clock()
    clock.now = 0.0
    with checking(terminal, clock):
        clock.now += 7
        while "checking: 7 s" not in terminal.seen()[-1]:
            assert any(thread.name == "progress" for thread in threading.enumerate())
    assert terminal.seen() == [""]


@pytest.mark.parametrize("how", ["no terminal", "dumb", "closed", "none"])
def test_elsewhere_nothing_is_written(terminal, monkeypatch, how):
    error = None if how == "none" else io.StringIO() if how != "dumb" else terminal.stream
    if how == "closed":
        error.close()
    monkeypatch.setenv("TERM", "dumb" if how == "dumb" else "xterm")
    clock = Clock()
    out = contextlib.redirect_stdout(terminal.stream)
    with out, contextlib.redirect_stderr(error), progress("checking", clock) as line:
        clock.now += 5
        line.stage("gradients", 3, 7)
        assert (sys.stdout, sys.stderr) == (terminal.stream, error)
    assert terminal.seen() == [""]
    assert how != "no terminal" or error.getvalue() == ""


def test_a_terminal_that_is_gone_costs_nothing(terminal):
    clock = Clock()

    def gone(_):
        raise OSError(5, "Input/output error")

    with checking(terminal, clock) as line:
        clock.now += 5
        line._stream = type("Gone", (), {"write": gone, "fileno": terminal.stream.fileno})
        line.stage("gradients", 3, 7)
        line.draw()
    assert ERASE not in terminal.seen()[0]
