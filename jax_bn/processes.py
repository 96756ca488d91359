"""Several processes that train together, each with its own devices. `torch_bn/processes.py` is its twin."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import jax
from jax._src import clusters, distributed  # what finds the processes, and their store: there are no public names

from bn_common import relay
from bn_common.config import Config
from bn_common.watch import Watch

# Until all are there.
SECONDS_TO_JOIN = 120
# JAX's own bounds abort the process without a name; ours are to be sooner.
SECONDS_OF_FRAMEWORK = 600
# What was started, to be there as long as this process is. JAX only, as `_relay` is.
RELAYS: list[subprocess.Popen[bytes]] = []


def join(config: Config, prog: str) -> tuple[int, Watch | None]:
    """(number of this process, the watch over the others, if there are any), of those that config names.

    Before the first look at a device.

    Raises:
      ValueError: they could not be found, or have not come in time.
    """
    if config.coordinator is None:
        return 0, None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = None if config.coordinator == "auto" else config.coordinator
    try:
        address, count, index, own_devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            given, config.num_processes, config.process_id, None, None, SECONDS_TO_JOIN
        )
        if address is None or count is None or index is None:
            raise RuntimeError("none is found")
        host, _, port = address.rpartition(":")
        place = host.strip("[]"), int(port)
        with _in_time(f"{prog}: error: at {address} not all {count} processes have met in {SECONDS_TO_JOIN} seconds"):
            jax.distributed.initialize(
                address if index == 0 else _relay(place),
                count,
                index,
                own_devices,
                initialization_timeout=SECONDS_OF_FRAMEWORK,
                heartbeat_timeout_seconds=SECONDS_OF_FRAMEWORK,
                shutdown_timeout_seconds=SECONDS_OF_FRAMEWORK,
            )
    except (RuntimeError, ValueError) as error:
        allowed = "HOST:PORT of process 0, or auto where SLURM, Cloud TPU or Kubernetes has started the processes"
        raise ValueError(f"--coordinator is {config.coordinator} ({error}); allowed: {allowed}") from error
    if count == 1:
        return 0, None
    store = distributed.global_state.client
    assert store is not None, "initialised above"

    def find() -> tuple[str, int]:
        return place[0], int(store.blocking_key_value_get("watch", SECONDS_TO_JOIN * 1000))

    return index, Watch(index, count, lambda port: store.key_value_set("watch", str(port)), find, prog)


def again(prog: str) -> str:
    """What to start the run with once more, in all of its processes: see `Program`."""
    if jax.process_count() == 1:
        return ""
    return f"in each process, as it was started: {prog}"


def leave() -> None:
    """Wait for the others, and say goodbye; they are watched until then."""
    jax.distributed.shutdown()


@contextlib.contextmanager
def _in_time(otherwise: str) -> Iterator[None]:
    """End the process with that line and status 2 after SECONDS_TO_JOIN.

    JAX only: there what comes too late aborts the process. PyTorch raises an exception.
    """

    def give_up() -> None:
        os.write(2, f"{otherwise}; allowed: --coordinator with the address of process 0, and all started\n".encode())
        os._exit(2)

    timer = threading.Timer(SECONDS_TO_JOIN, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _relay(coordinator: tuple[str, int]) -> str:
    """An address of this machine that leads to the coordinator, and stays open when that is lost.

    JAX ends a process as soon as this connection breaks, without a name: sooner or later than the watch by chance.
    JAX only: PyTorch raises an exception.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", relay.__file__, coordinator[0], str(coordinator[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    RELAYS.append(process)
    assert process.stdout is not None, "as asked for"
    return f"127.0.0.1:{int(process.stdout.readline())}"
