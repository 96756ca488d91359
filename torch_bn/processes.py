"""Several processes that train together, each on its own device. `jax_bn/processes.py` is its twin."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import distributed as dist

from bn_common.checks import require
from bn_common.config import Config
from bn_common.watch import Watch

# Until all are there.
SECONDS_TO_JOIN = 120
# PyTorch's own bound raises an exception without a name; ours is to be sooner.
SECONDS_OF_FRAMEWORK = 600


def join(config: Config, prog: str) -> tuple[int, Watch | None]:
    """(number of this process, the watch over the others, if there are any), of those that torchrun has started.

    Raises:
      ValueError: the config speaks of other processes, or they have not come in time.
    """
    require(config.coordinator is None, "--coordinator", config.coordinator, "torchrun's own options")
    count = int(os.environ.get("WORLD_SIZE", 1))
    allowed = f"{count}, the number of processes (torchrun --nproc-per-node N -m torch_bn.training)"
    require(config.devices in (None, count), "--devices", config.devices, allowed)
    config.check_shares(count)
    require(
        config.batch_size >= count, "--batch-size", config.batch_size, f"{count} or more, an image for each process"
    )
    if count == 1:
        return 0, None
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        store, index, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=SECONDS_TO_JOIN)))
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("training", store),
            rank=index,
            world_size=count,
            timeout=timedelta(seconds=SECONDS_OF_FRAMEWORK),
        )
    except RuntimeError as error:
        what = f"the number of processes that have come in {SECONDS_TO_JOIN} seconds is below {count}"
        raise ValueError(f"{what} ({str(error).splitlines()[0]:.100}); allowed: all") from error

    def find() -> tuple[str, int]:
        return os.environ["MASTER_ADDR"], int(store.get("watch"))

    return index, Watch(index, count, lambda port: store.set("watch", str(port)), find, prog)


def again(prog: str) -> str:
    """What to start the run with once more, in all of its processes: see `Program`."""
    count, here = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if count == 1:
        return ""
    command = prog.removeprefix("python ")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"in each process, as it was started: {prog}"
    if count == here:
        return f"torchrun --nproc-per-node {here} {command}"
    return f"on each node, with its rendezvous: torchrun --nnodes {count // here} --nproc-per-node {here} {command}"


def leave() -> None:
    """Wait for the others, and say goodbye; they are watched until then."""
    dist.barrier()
    dist.destroy_process_group()
