"""Being told to stop: by Ctrl-C, by a scheduler or a machine taken away (SIGTERM), by a terminal that is gone."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Self

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

    A second one ends the program at once. What the program was started to ignore (nohup, a shell's background)
    stays ignored.

    Attributes:
      deferred: whether a run is under way that will look at `asked` soon, and save before it stops.
      asked: the signal noted, or None.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.asked: int | None = None
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
        if self.asked is not None:
            os._exit(128 + number)
        self.asked = number
        if not self.deferred:
            raise Stopped(number)
