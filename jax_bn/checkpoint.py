"""Checkpoints of a training run, written by Orbax beside the training. `torch_bn/checkpoint.py` is the same in PyTorch.

What makes a folder of Orbax's a checkpoint, and which of them is continued from, `bn_common/checkpoints.py` says:
Orbax itself restores a file in which a byte has flipped without a word.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from bn_common import checkpoints
from bn_common.checkpoints import Place
from bn_common.config import Config
from bn_common.run_folder import RunFolder


def made_with(config: Config) -> dict[str, Any]:
    """What the numbers of a run depend on, beside its other options: the same bytes come of the same only."""
    devices = jax.devices()[: config.devices]
    return {"jax": jax.__version__, "devices": f"{len(devices)} x {devices[0].device_kind}"}


def named_arrays(state: Any) -> dict[str, Array]:
    """The arrays of a training state by name: "params/Conv_0/kernel"."""
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in paths}


def on_host(state: Any) -> Any:
    """The state as numpy arrays, copied: of every array each device has all. JAX only: so is what Orbax is given."""
    return jax.tree.map(np.array, state)


def like(value: NDArray, there: Array) -> Array:
    """The value on the devices of an array of its shape, where a step may write over it. JAX only: see `on_host`."""
    if there.is_fully_addressable:
        return jax.device_put(value, there.sharding, may_alias=False)
    return jax.make_array_from_callback(value.shape, there.sharding, lambda index: np.array(value[index]))


def from_first(value: Any) -> Any:
    """What the first process has, for all of them."""
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    # As bytes: as numbers they would be added to zeros, and -0.0 lost.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(mine))))
    mine = np.resize(mine, size) if jax.process_index() else mine
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8).tobytes())


def agreed(told_to_stop: Callable[[int], int | None], processes: int) -> Callable[[int], int | None]:
    """`RunFolder.told_to_stop` where `jax.distributed` is initialised: in all processes the same.

    JAX takes SIGTERM for itself there, a machine's notice that it will be taken away, and has all processes
    agree on the step after which they stop. Any other signal reaches one of them, and counts where it is alone.
    """

    def told(step: int) -> int | None:
        if multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return told_to_stop(step) if processes == 1 else None

    return told


class Checkpoints:
    """The checkpoints of a run, in its folder. Of several processes, each with all of the state, the first one writes.

    Args:
      run: the run folder, which says what has been found so far and how many checkpoints are kept.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run, self.folder = run, run.path.absolute() / checkpoints.FOLDER
        # Before Orbax looks: what was never finished or is damaged is gone then, and its step free.
        self.found = run.newest_checkpoint()
        self.manager = None
        if run.writes:
            alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
            # Alone, it asks no other process for anything.
            options = ocp.CheckpointManagerOptions(
                create=False, **({"multiprocessing_options": alone} if jax.process_count() > 1 else {})
            )
            self.folder.mkdir(exist_ok=True)
            self.manager = ocp.CheckpointManager(self.folder, options=options)
        self.beside = ThreadPoolExecutor(1)
        self.saving: Future[None] | None = None
        run.before_close(self.close)
        if jax.distributed.is_initialized():
            run.told_to_stop = agreed(run.told_to_stop, jax.process_count())

    def restore(self, state: Any, *, again: bool = False) -> tuple[Any, Place]:
        """The state and the place in the newest whole checkpoint; without one, `state` and the beginning.

        Args:
          state: of this run at its beginning: what is restored has its arrays' names, shapes, dtypes and devices.
          again: look for what this process has written, too.

        Raises:
          UnfitError: the checkpoint's arrays are others, or it can't be read.
        """
        if again:
            self.wait()
            self.found = checkpoints.newest(self.folder, self.run.say) if self.run.writes else None
        place, values = Place(), None
        if self.found is not None and self.manager is not None:
            about = self.found.about
            checkpoints.check_arrays(checkpoints.describe(named_arrays(state)), about["arrays"])
            self.run.say_what_differs(made_with(self.run.config), about["made_with"])
            # Orbax asked for another shape would cut or pad, for another dtype cast, and say nothing.
            with checkpoints.reading(self.found.path):
                values = self.manager.restore(self.found.step, args=ocp.args.StandardRestore(on_host(state)))
            place = self.found.place
        if jax.process_count() > 1:
            place, values, self.run.metrics = from_first((place, values, self.run.metrics))
        return (state if values is None else jax.tree.map(like, values, state)), place

    def save(self, step: int, state: Any, place: Place) -> None:
        """Begin to write a checkpoint; returns when `state` may change. Waits for the one before.

        Raises:
          OSError: it can't be written, or the one before could not.
        """
        if self.manager is None:
            return
        self.wait()
        arrays = checkpoints.describe(named_arrays(state))
        about = self.run.about_checkpoint(place, arrays, made_with(self.run.config))
        with written(self.folder):
            self.manager.save(step, args=ocp.args.StandardSave(on_host(state)), force=True)
        self.saving = self.beside.submit(self._finish, step, about)

    def _finish(self, step: int, about: Mapping[str, Any]) -> None:
        assert self.manager is not None, "as in save"
        with written(self.folder):
            self.manager.wait_until_finished()
            checkpoints.seal(self.folder / str(step), about)
            self.run.saved_step = step
            checkpoints.prune(self.folder, self.run.config.keep_checkpoints)
            self.manager.reload()  # else it remembers, and looks through, every checkpoint that there ever was

    def wait(self) -> None:
        """Until what has been begun is on the disk.

        Raises:
          OSError: it can't be written.
        """
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Wait, and end the threads."""
        try:
            self.wait()
        finally:
            self.beside.shutdown()
            if self.manager is not None:
                with written(self.folder):
                    self.manager.close()


@contextlib.contextmanager
def written(folder: Path) -> Iterator[None]:
    """Whatever stops Orbax from writing is an OSError. JAX only: PyTorch's bytes are written by us."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise OSError(errno.EIO, f"Orbax can't write: {error}", str(folder)) from error
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
