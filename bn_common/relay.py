"""A program that hands on bytes between a port of its own and an address: `python relay.py HOST PORT`.

It prints its port, on 127.0.0.1, and ends with its standard input, that is with the process that has started it. A
process of its own, and not a thread: a thread of Python's waits while another one holds the interpreter's lock, as
JAX does where its processes agree on the step to stop at, over this very connection.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading


def pump(source: socket.socket, target: socket.socket) -> None:
    """Hand on until either end is closed; then wait: the end that is left is to see no broken connection."""
    with contextlib.suppress(OSError):
        while said := source.recv(2**16):
            target.sendall(said)


def serve(server: socket.socket, address: tuple[str, int]) -> None:
    """Each connection to the server as one to the address."""
    while True:
        near = server.accept()[0]
        try:
            far = socket.create_connection(address)
        except OSError:  # not there yet: whoever asks tries again
            near.close()
            continue
        for way in (near, far), (far, near):
            threading.Thread(target=pump, args=way, daemon=True).start()


def main(host: str, port: str) -> None:
    """The program."""
    # A signal to all processes of a job is for the one that has started this. SIGHUP is none of Windows's.
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    server = socket.create_server(("127.0.0.1", 0))
    print(server.getsockname()[1], flush=True)
    threading.Thread(target=serve, args=(server, (host, int(port))), daemon=True).start()
    while os.read(0, 2**10):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
