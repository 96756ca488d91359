"""The processes of one run watch each other: when one is lost, the others end, soon, and say which.

Collectives wait for all, and what frameworks do about a process that is killed or frozen is to wait for minutes, to
abort without a name, or to wait for it once more at the end. So each process has a guard, which is connected to that of
the first one; over that both say every second that theirs are alive.

A guard is a small process of its own, and not a thread: a thread is silent for as long as what it belongs to compiles,
or holds the interpreter's lock, or has no share of a busy machine, and a process at work would be taken for lost. What
the guard says is what the operating system does: its process is there, and is not stopped. `python watch.py ...` is it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

SILENCE = 20.0
"""Seconds without a word after which a process counts as lost. One that ends is seen to at once."""

EVERY = 1.0
# A guard is given its connections as open files, which Windows does not hand on: nobody watches there.
CAN_WATCH = os.name == "posix"
# Until all are connected, who have met already.
TO_CONNECT = 120.0
# What a guard says, a byte each: that its process is alive; that it is done, and its end no loss; that one is lost: its
# number and what of it follow in a line. The process says DONE to its guard, and hears DONE of all or LOST.
ALIVE, DONE, LOST = b".", b"d", b"l"


class Watch:
    """One process's part in it: it has a guard, and a thread which hears what that says.

    Args:
      index: of this process; 0 is the one that all others talk to.
      count: how many processes there are.
      publish: of the first process: makes the port known to the others, where it listens.
      find: of the others: gives the address of the first process, when it is known.
      prog: the program's name in the message.
      silence: in place of SILENCE.

    Raises:
      OSError: not all have come in TO_CONNECT seconds.
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
        self.all_done = threading.Event()
        self.guard: subprocess.Popen[bytes] | None = None
        if not CAN_WATCH:
            return
        peers: dict[socket.socket, int] = {}
        if index == 0:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            with socket.create_server(("", 0), family=family, backlog=count, dualstack_ipv6=both) as server:
                publish(server.getsockname()[1])
                for _ in range(count - 1):
                    server.settimeout(TO_CONNECT)
                    peer = server.accept()[0]
                    peer.settimeout(TO_CONNECT)
                    peers[peer] = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")
        else:
            peer = socket.create_connection(find(), timeout=TO_CONNECT)
            peer.sendall(index.to_bytes(4, "big"))
            peers[peer] = 0
        self.link, link = socket.socketpair()
        given = [link.fileno(), *(peer.fileno() for peer in peers)]
        self.guard = subprocess.Popen(
            [sys.executable, "-I", __file__, *map(str, (os.getpid(), index, silence, *given, *peers.values())), prog],
            pass_fds=given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Open in the guard alone, whose end is to be seen.
        for one in (link, *peers):
            one.close()
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def leave(self) -> None:
        """This process is done; returns when all are, so that none misses another."""
        if self.guard is None:
            return
        self.link.sendall(DONE)
        self.all_done.wait()
        self.guard.wait()

    def failed(self) -> None:
        """A collective has failed here: if that was for a lost process, this does not return."""
        if self.guard is not None:
            time.sleep(self.silence + 3 * EVERY)

    @property
    def about(self) -> str:
        """What is said of it before the training."""
        if self.guard is None:
            return "Notice: processes can't watch each other on this system: a lost one is waited for, 10 minutes"
        return f"a process that ends early, or does not answer for {self.silence:g} seconds, is named, and all end"

    def _listen(self) -> None:
        """The thread: ends the process when another is lost."""
        said = b"".join(iter(lambda: self.link.recv(4096), b""))
        if said == DONE:
            self.all_done.set()
            return
        text = said.partition(LOST)[2].decode() or f"the guard of process {self.index} has ended"
        # Not by way of Python's own end, where the framework would wait for the lost process once more.
        from bn_common.streams import show_cursor  # which the guard's program does not see

        sys.stdout.flush()
        show_cursor()
        os.write(2, ending(self.prog, text, self.index))
        os._exit(1)


def ending(prog: str, text: str, index: int) -> bytes:
    """The line that a process ends with when another is lost."""
    return f"{prog}: stopped: {text}; process {index} ends\n".encode()


def is_stopped(process: int) -> bool:
    """Whether the operating system has stopped it, as by SIGSTOP: it does nothing until it is continued."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            state = file.read().rpartition(b") ")[2]
    except OSError:  # it is no more, or the system has other ways
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True).stdout.strip()
    return state[:1] in (b"T", b"t")


class Guard:
    """Says that a process is alive, hears of the others, and has the process end when one of these is lost.

    Args:
      process: whose guard this is, by the operating system's number; it has started this one.
      index: of that process.
      silence: see SILENCE.
      link: to it.
      peers: to the other guards (of a process other than the first one: to the first's alone), with their indices.
      prog: the program's name in the message.
    """

    def __init__(
        self, process: int, index: int, silence: float, link: socket.socket, peers: dict[socket.socket, int], prog: str
    ) -> None:
        self.process, self.index, self.silence, self.link, self.peers = process, index, silence, link, peers
        self.prog = prog

    def run(self) -> None:
        """Until all are done or one is lost."""
        selector = selectors.DefaultSelector()
        selector.register(self.link, selectors.EVENT_READ)
        heard: dict[int, float] = {}
        for peer, other in self.peers.items():
            peer.setblocking(False)
            selector.register(peer, selectors.EVENT_READ, other)
            heard[other] = time.monotonic()
        done, finished = False, set[int]()
        told = before = 0.0
        while True:
            now = time.monotonic()
            if now - before > self.silence / 2:
                # This one was frozen itself: what it has missed is not their silence.
                heard = dict.fromkeys(heard, now)
            before = now
            if now - told >= EVERY:
                told = now
                # The first is done when all are: it tells the others so.
                if done and (self.index > 0 or len(finished) == len(heard)):
                    self._tell(DONE)
                elif not is_stopped(self.process):
                    self._tell(ALIVE)
                if done and len(finished) == len(heard):
                    self.link.sendall(DONE)
                    return
            for key, _ in selector.select(EVERY / 4):
                try:
                    said = key.fileobj.recv(4096)  # type: ignore[union-attr]
                except OSError:
                    said = b""
                if key.fileobj is self.link:
                    if not said:
                        return  # the process has ended, and with this one's end the others see it
                    done = True
                    continue
                other = key.data
                heard[other] = time.monotonic()
                if LOST in said:
                    self._end(said.partition(LOST)[2].decode())
                    return
                if DONE in said:
                    finished.add(other)
                if not said and other in finished:
                    selector.unregister(key.fileobj)
                elif not said:
                    self._lose(other, "has ended")
                    return
            for other, last in heard.items():
                if other not in finished and time.monotonic() - last > self.silence:
                    self._lose(other, f"has not answered for {self.silence:g} seconds")
                    return

    def _tell(self, said: bytes) -> None:
        for peer in self.peers:
            with contextlib.suppress(OSError):  # one that is lost is found to be so by what it says
                peer.send(said)

    def _lose(self, other: int, what: str) -> None:
        text = f"process {other} {what}"
        self._tell(LOST + text.encode())
        self._end(text)

    def _end(self, text: str) -> None:
        """Have the process end; one that does not hear of it, because a thread of it never lets go, is killed."""
        with contextlib.suppress(OSError):
            self.link.sendall(LOST + text.encode())
            self.link.shutdown(socket.SHUT_WR)
        # The end of the first guard would be taken for a loss by those who have not heard yet.
        time.sleep(2 * EVERY if self.index == 0 else 0)
        for peer in self.peers:
            peer.close()
        left = self.silence
        self.link.settimeout(EVERY)
        while left > 0:
            try:
                if not self.link.recv(4096):
                    return
            except TimeoutError:
                # As long as it is stopped, it could not hear.
                left -= 0 if is_stopped(self.process) else EVERY
            except OSError:
                return
        os.write(2, ending(self.prog, text, self.index))
        os.kill(self.process, signal.SIGKILL)


def main(process: str, index: str, silence: str, link: str, *rest: str) -> None:
    """The guard's program."""
    # A signal to all processes of a job is for the one that has started this.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    *peers, prog = rest
    files, indices = peers[: len(peers) // 2], peers[len(peers) // 2 :]
    others = {socket.socket(fileno=int(file)): int(other) for file, other in zip(files, indices, strict=True)}
    Guard(int(process), int(index), float(silence), socket.socket(fileno=int(link)), others, prog).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
