"""Several processes that train together, each with its own devices. JAX only: so far."""

from __future__ import annotations

import jax
from jax._src import distributed  # the address that was found, and the store: JAX has no public name for them

from bn_common.config import Config
from bn_common.watch import Watch

# Until all are there.
SECONDS_TO_JOIN = 120
# JAX's own heartbeats abort the process without a name; the watch is to be sooner.
SECONDS_OF_JAX = 600


def join(config: Config, prog: str) -> tuple[int, int, Watch | None]:
    """(number of this process, how many there are, the watch over the others), of those that config names.

    Before the first look at a device.

    Raises:
      ValueError: they could not be found, or have not come in time.
    """
    if config.coordinator is None:
        return 0, 1, None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    found = config.coordinator == "auto"
    try:
        jax.distributed.initialize(
            None if found else config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=SECONDS_TO_JOIN,
            heartbeat_timeout_seconds=SECONDS_OF_JAX,
            shutdown_timeout_seconds=SECONDS_TO_JOIN,
        )
    except (RuntimeError, ValueError) as error:
        allowed = (
            "HOST:PORT, where process 0 is, or auto where SLURM, Cloud TPU or Kubernetes has started the processes"
        )
        raise ValueError(f"--coordinator is {config.coordinator} ({error}); allowed: {allowed}") from error
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return 0, 1, None
    store, address = distributed.global_state.client, distributed.global_state.coordinator_address
    assert store is not None, "initialised above"
    assert address is not None, "initialised above"
    host = address.rpartition(":")[0]

    def publish(port: int) -> None:
        store.key_value_set("watch", str(port))

    def find() -> tuple[str, int]:
        return host.strip("[]"), int(store.blocking_key_value_get("watch", SECONDS_TO_JOIN * 1000))

    return index, count, Watch(index, count, publish, find, prog)


def leave() -> None:
    """Wait for the others, and say goodbye; they are watched until then."""
    jax.distributed.shutdown()
