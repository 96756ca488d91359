"""The program between a process and the coordinator of a JAX run."""

import ctypes
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bn_common import relay
from jax_bn import processes

ROOT = Path(__file__).parents[2]


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


ECHO = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
connection = server.accept()[0]
connection.sendall(connection.recv(100).upper())
connection.recv(1)
"""


@pytest.fixture
def echo_elsewhere():
    """The port of a server in a process of its own."""
    with subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE) as process:
        yield int(process.stdout.readline())
        process.kill()


def test_an_answer_comes_while_the_interpreter_is_locked(echo_elsewhere):
    """As in JAX's agreement on the step to stop at: a thread of Python's would never hand it on."""
    host, port = processes._relay(("127.0.0.1", echo_elsewhere)).split(":")
    try:
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 20, 0))
            connection.sendall(b"hello")
            answer = ctypes.create_string_buffer(5)
            # PyDLL: the call keeps the interpreter's lock.
            assert ctypes.PyDLL(None).recv(connection.fileno(), answer, 5, 0) == 5
            assert answer.raw == b"HELLO"
    finally:
        with processes.RELAYS.pop() as process:
            process.kill()


def test_where_there_is_no_sighup():
    """As on Windows."""
    program = "import signal; del signal.SIGHUP; from bn_common import relay; relay.main('127.0.0.1', '1')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, input="", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 0
