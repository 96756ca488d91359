"""Standard output and error that may be closed, full, or go away while a program runs: no reason to end it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


def fill_standard_streams() -> None:
    """Open what is closed of the descriptors 0 to 2, to nowhere: else the next file opened would be written to as one.

    And what can't be written is lost, whoever writes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
    for name in ("stdout", "stderr"):
        setattr(sys, name, Patient(getattr(sys, name) or open(os.devnull, "w")))  # noqa: SIM115


def show_cursor() -> None:
    """What a program that ends at once owes a terminal: a progress bar has hidden its cursor."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.isatty(number):
                os.write(number, b"\x1b[?25h")


class Patient:
    """A text stream that loses what can't be written. Otherwise as the one it is made of.

    Args:
      stream: which.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """The number of characters, written or lost."""
        with contextlib.suppress(OSError, ValueError):  # closed, full, a terminal that is gone; closed by Python
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what has been kept, or lose it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            # What it keeps would be tried again, at the latest at Python's end, which then ends with status 120.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
