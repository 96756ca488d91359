"""The program between a process and the coordinator of a JAX run."""

import signal
import socket
import subprocess
import sys
import threading

import pytest

from bn_common import relay


@pytest.fixture
def echo():
    """The port of a server that answers once, in capitals, and then closes."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer():
        with server.accept()[0] as connection:
            connection.sendall(connection.recv(100).upper())

    threading.Thread(target=answer, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


def test_bytes_go_both_ways_and_a_lost_end_is_not_told(echo):
    command = [sys.executable, "-I", relay.__file__, "127.0.0.1", str(echo)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        port = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)  # meant for its parent
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"hello")
            assert connection.recv(100) == b"HELLO"
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.recv(100)  # the server has closed
        process.stdin.close()
        assert process.wait(30) == 0
