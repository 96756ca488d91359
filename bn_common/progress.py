"""One line on a terminal that says how far something has come, while it lasts; at the end nothing is left of it.

Rich's own lines lead what is printed meanwhile to where they stand themselves, to standard error: that of a program
whose standard output is read by another would be lost.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

PATIENCE = 2.0
"""Seconds before there is a line: what is over sooner needs none."""
BEAT = 0.5
"""Seconds from one line to the next."""
ERASE = "\r\x1b[K"
"""To the begin of the line, and what is there is gone."""


class Progress:
    """The line: "checking: Flax in float64, 3 of at most 7, 14 s".

    Args:
      what: is done.
      stream: a terminal; None: there is none, and nothing is shown.
      clock: gives seconds.
    """

    def __init__(self, what: str, stream: TextIO | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._stream, self._clock = what, stream, clock
        self._began, self._stage = clock(), ""
        self._is_shown, self._is_at_begin = False, True
        self._lock = threading.RLock()  # the line is drawn from a thread of its own

    def stage(self, name: str, number: int, most: int) -> None:
        """What is done from now on, the so-manieth of at most so many."""
        with self._lock:
            self._stage = f"{name}, {number} of at most {most}"
            self.draw()

    def draw(self) -> None:
        """Bring the line up to date, once it has lasted long enough."""
        with self._lock:
            seconds = self._clock() - self._began
            if self._stream is None or seconds < PATIENCE or not self._is_at_begin:
                return
            said = ", ".join(part for part in (self._stage, f"{seconds:.0f} s") if part)
            # A line that is wrapped could not be erased.
            self._is_shown = True
            self._write(ERASE + f"{self._what}: {said}"[: _columns(self._stream) - 1])

    def erase(self) -> None:
        """Take the line away, if it is there."""
        with self._lock:
            if self._is_shown:
                self._is_shown = False
                self._write(ERASE)

    def let_pass(self, write: Callable[[str], Any], text: str) -> None:
        """Something else that is written: the line gives way, and comes back where that has ended its own line."""
        with self._lock:
            self.erase()
            write(text)
            self._is_at_begin = text.endswith("\n") if text else self._is_at_begin

    def _write(self, text: str) -> None:
        try:
            if self._stream is not None:
                self._stream.write(text)
                self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone
            self._stream = None


class _Passing:
    """A text stream, before whose output the line gives way. Otherwise as the one it is made of."""

    def __init__(self, stream: TextIO, line: Progress) -> None:
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        self._line.let_pass(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def progress(what: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """The line on standard error, if that is a terminal which can take it away again.

    Args:
      what: is done, "checking".
      clock: gives seconds.
    """
    terminal = sys.stderr
    line = Progress(what, terminal if _can_erase(terminal) else None, clock)
    if line._stream is None:
        yield line
        return
    mine = {name: _Passing(stream, line) for name in ("stdout", "stderr") if (stream := getattr(sys, name)) is not None}
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(BEAT):
            line.draw()

    thread = threading.Thread(target=beat, name="progress", daemon=True)
    for name, stream in mine.items():
        setattr(sys, name, stream)
    thread.start()
    try:
        yield line
    finally:
        is_over.set()
        thread.join()
        line.erase()
        for name, stream in mine.items():
            if getattr(sys, name) is stream:  # else it is somebody else's by now
                setattr(sys, name, stream._stream)


def _can_erase(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    except ValueError:  # closed
        return False


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
