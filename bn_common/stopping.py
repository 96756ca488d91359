"""Being told to stop: by Ctrl-C, by a scheduler or a machine taken away (SIGTERM), by a terminal that is gone."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Self

from bn_common.streams import show_cursor

# SIGHUP is none of Windows's.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal has ended the run. Like `KeyboardInterrupt`, no error that anybody handles on the way.

    Attributes:
      signal: which.
      status: what the program ends with, as a shell would have it: 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.status = 128 + number


class Signals:
    """While it is entered, `SIGNALS` raise `Stopped` at once; or, once `deferred`, the first is only noted.

    The next one ends the program at once; but of a run that is to save what it has, only the third does: a job's
    launcher hands on what its processes have heard themselves, and who presses Ctrl-C twice is told what is waited for.
    What the program was started to ignore (nohup, a shell's background) stays ignored.

    Attributes:
      deferred: whether a run is under way that will look at `asked` soon, and save before it stops.
      asked: the signal noted, or None.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.asked: int | None = None
        self._count = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._told)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    def _told(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > (2 if self.deferred else 1):
            show_cursor()
            os._exit(128 + number)
        if self._count == 2:
            with contextlib.suppress(OSError):
                os.write(2, b"It ends as soon as a checkpoint is written; told once more, it ends without.\n")
            return
        self.asked = number
        if not self.deferred:
            raise Stopped(number)
