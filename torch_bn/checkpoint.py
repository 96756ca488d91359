"""Checkpoints of a training run, written beside the training. `jax_bn/checkpoint.py` is the same in JAX, by Orbax.

What makes a folder a checkpoint, and which of them is continued from, `bn_common/checkpoints.py` says.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.lr_scheduler import LRScheduler

from bn_common import checkpoints
from bn_common.checkpoints import Checkpoint, Place
from bn_common.config import Config
from bn_common.files import write_whole
from bn_common.run_folder import RunFolder

# PyTorch only: Orbax has names of its own.
STATE = "state.pt"
# PyTorch only: JAX is told of a step by its own service.
AGREE_EVERY = 10


def made_with(config: Config) -> dict[str, Any]:
    """What the numbers of a run depend on, beside its other options: the same bytes come of the same only."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return {"torch": torch.__version__, "devices": f"{processes} x {name}"}


def named_arrays(model: nn.Module) -> dict[str, Tensor]:
    """The arrays of a model by name: "conv.0.weight". Those of an optimiser are not there before its first step."""
    return model.state_dict()


def from_first(value: Any) -> Any:
    """What the first process has, for all of them."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def agreed(told_to_stop: Callable[[int], int | None]) -> Callable[[int], int | None]:
    """`RunFolder.told_to_stop` of several processes: in all of them the same, asked for every few steps."""

    def told(step: int) -> int | None:
        if step % AGREE_EVERY:
            return None
        number = torch.tensor(told_to_stop(step) or 0, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number) or None

    return told


class Checkpoints:
    """The checkpoints of a run, in its folder. Of several processes, each with all of the state, the first one writes.

    Args:
      run: the run folder, which says what has been found so far and how many checkpoints are kept.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run, self.folder = run, run.path.absolute() / checkpoints.FOLDER
        self.found = run.newest_checkpoint()
        self.beside = ThreadPoolExecutor(1)
        self.saving: Future[None] | None = None
        run.before_close(self.close)
        if dist.is_initialized():
            run.told_to_stop = agreed(run.told_to_stop)

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, *, again: bool = False
    ) -> Place:
        """Put what is in the newest whole checkpoint into all three; the place in it, or without one the beginning.

        Args:
          model: of this run at its beginning.
          optimizer: of it.
          scheduler: of it.
          again: look for what this process has written, too.

        Raises:
          UnfitError: the checkpoint's arrays are others, or it can't be read.
        """
        if again:
            self.wait()
            self.found = checkpoints.newest(self.folder, self.run.say) if self.run.writes else None
        place, held = Place(), None
        if self.found is not None:
            place, held = self.found.place, self._held(self.found, model)
        if dist.is_initialized():
            place, held, self.run.metrics = from_first((place, held, self.run.metrics))
        if held is not None:
            with checkpoints.reading(self.folder):
                for name, one in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
                    one.load_state_dict(held[name])
        return place

    def _held(self, found: Checkpoint, model: nn.Module) -> dict[str, Any]:
        about = found.about
        checkpoints.check_arrays(checkpoints.describe(named_arrays(model)), about["arrays"])
        self.run.say_what_differs(made_with(self.run.config), about["made_with"])
        with checkpoints.reading(found.path):
            return torch.load(found.path / STATE, weights_only=True, map_location="cpu")

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, place: Place
    ) -> None:
        """Begin to write a checkpoint; returns when all three may change. Waits for the one before.

        Raises:
          OSError: it can't be written, or the one before could not.
        """
        if not self.run.writes:
            return
        self.wait()
        about = self.run.about_checkpoint(place, checkpoints.describe(named_arrays(model)), made_with(self.run.config))
        state = model.state_dict(), optimizer.state_dict(), scheduler.state_dict()
        content = io.BytesIO()
        torch.save(dict(zip(("model", "optimizer", "scheduler"), state, strict=True)), content)
        self.saving = self.beside.submit(self._finish, step, content.getvalue(), about)

    def _finish(self, step: int, content: bytes, about: Mapping[str, Any]) -> None:
        path = self.folder / str(step)
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / STATE, content)
        checkpoints.seal(path, about)
        self.run.saved_step = step
        checkpoints.prune(self.folder, self.run.config.keep_checkpoints)

    def wait(self) -> None:
        """Until what has been begun is on the disk.

        Raises:
          OSError: it can't be written.
        """
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self.beside.shutdown()
