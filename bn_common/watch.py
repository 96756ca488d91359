"""The processes of one run watch each other: when one is lost, the others end, soon, and say which.

Collectives wait for all, and what frameworks do about a process that is killed or frozen is to wait for minutes, to
abort without a name, or to wait for it once more at the end. So beside the training each process has a connection to
the first one, over which both say every second that they are alive.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable

SILENCE = 20.0
"""Seconds without a word after which a process counts as lost. One that ends is seen to at once."""

EVERY = 1.0
# What a process says, a byte each: that it is alive; that it is done, and its end no loss; that one is lost: its number
# and what of it follow in a line.
ALIVE, DONE, LOST = b".", b"d", b"l"


class Watch:
    """One process's part in it; a thread does the watching.

    Args:
      index: of this process; 0 is the one that all others talk to.
      count: how many processes there are.
      publish: of the first process: makes the port known to the others, where it listens.
      find: of the others: gives the address of the first process, when it is known.
      prog: the program's name in the message.
      silence: in place of SILENCE.
    """

    def __init__(
        self,
        index: int,
        count: int,
        publish: Callable[[int], None],
        find: Callable[[], tuple[str, int]],
        prog: str,
        silence: float = SILENCE,
    ) -> None:
        self.index, self.prog, self.silence = index, prog, silence
        self.others: dict[socket.socket, int] = {}
        self.heard: dict[int, float] = {}
        self.done, self.all_done = threading.Event(), threading.Event()
        if index == 0:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            with socket.create_server(("", 0), family=family, backlog=count, dualstack_ipv6=both) as server:
                publish(server.getsockname()[1])
                for _ in range(count - 1):
                    server.settimeout(silence * 3)
                    peer = server.accept()[0]
                    peer.settimeout(silence)
                    self.others[peer] = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")
        else:
            peer = socket.create_connection(find(), timeout=silence)
            peer.sendall(index.to_bytes(4, "big"))
            self.others[peer] = 0
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def leave(self) -> None:
        """This process is done; returns when all are, so that none misses another."""
        self.done.set()
        self.all_done.wait()

    def failed(self) -> None:
        """A collective has failed here: if that was for a lost process, this does not return."""
        time.sleep(self.silence + 3 * EVERY)

    def _watch(self) -> None:
        """The thread: hears the others, and talks to them; ends the process when one is lost."""
        selector = selectors.DefaultSelector()
        for peer, other in self.others.items():
            peer.setblocking(False)
            selector.register(peer, selectors.EVENT_READ, (peer, other))
            self.heard[other] = time.monotonic()
        finished: set[int] = set()
        told = before = 0.0
        while True:
            now = time.monotonic()
            if now - before > self.silence / 2:
                # This one was frozen itself: what it has missed is not their silence.
                self.heard = dict.fromkeys(self.heard, now)
            before = now
            if now - told >= EVERY:
                told = now
                # The first is done when all are: it tells the others so.
                mine = self.done.is_set() and (self.index > 0 or len(finished) == len(self.others))
                self._tell(DONE if mine else ALIVE)
                if self.done.is_set() and len(finished) == len(self.others):
                    self.all_done.set()
                    return
            for key, _ in selector.select(EVERY / 4):
                peer, other = key.data
                try:
                    said = peer.recv(4096)
                except OSError:
                    said = b""
                self.heard[other] = time.monotonic()
                if LOST in said:
                    self._end(said.partition(LOST)[2].decode())
                if DONE in said:
                    finished.add(other)
                if not said and other in finished:
                    selector.unregister(peer)
                elif not said:
                    self._lose(other, "has ended")
            for other, last in self.heard.items():
                if other not in finished and time.monotonic() - last > self.silence:
                    self._lose(other, f"has not answered for {self.silence:g} seconds")

    def _tell(self, said: bytes) -> None:
        for peer in self.others:
            with contextlib.suppress(OSError):  # one that is lost is found to be so by what it says
                peer.send(said)

    def _lose(self, other: int, what: str) -> None:
        text = f"process {other} {what}"
        self._tell(LOST + text.encode())
        self._end(text)

    def _end(self, text: str) -> None:
        """Not by way of Python's own end, where the framework would wait for the lost process once more."""
        sys.stdout.flush()
        os.write(2, f"{self.prog}: stopped: {text}; process {self.index} ends\n".encode())
        if self.index == 0:
            time.sleep(2 * EVERY)  # its end would be taken for a loss by those who have not heard yet
        os._exit(1)
