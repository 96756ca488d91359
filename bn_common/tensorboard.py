"""Each epoch's scalars for TensorBoard, by tensorboardX: it brings three small packages, of which two are here anyway.

tensorboard itself would bring a web server and gRPC, `torch.utils.tensorboard` that and PyTorch, clu TensorFlow.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
SCALARS = {
    "loss/train": "loss",
    "loss/test": "test_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/test": "test_accuracy",
    "learning_rate": "learning_rate",
    "images_per_second": "images_per_second",
}
"""TensorBoard's names of what is in a line of the metrics."""


def check_installed() -> None:
    """Raise ValueError where tensorboardX is missing, which is to say how to install it."""
    if importlib.util.find_spec("tensorboardX") is None:
        allowed = "with tensorboardX (pip install tensorboardX, or this project's extra tensorboard)"
        raise ValueError(f"--tensorboard is True; allowed: {allowed}")


class Scalars:
    """Writes event files in a run folder, each line at once: what can't be written is an OSError of the caller's.

    (tensorboardX's own SummaryWriter writes in a thread, which a full disk ends with a trace and nothing else.)

    Args:
      run_folder: they go to its folder FOLDER, which TensorBoard shows under the run's name.
    """

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder.absolute() / FOLDER
        self._file: Any = None

    def write(self, line: Mapping[str, Any]) -> None:
        """A line of the metrics, at its step.

        The first one tells TensorBoard to forget all from this step on: an earlier process may have come farther than
        its last checkpoint.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        at = {"step": line["step"], "wall_time": line["start_time"] + line["seconds"]}
        if self._file is None:
            self._folder.mkdir(exist_ok=True)
            # tensorboardX names it by the second, and writes over what was begun in the same one.
            self._file = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            self._file.write_event(Event(session_log=SessionLog(status=SessionLog.START), **at))
        for name, key in SCALARS.items():
            self._file.write_event(Event(summary=scalar(name, line[key]), **at))
        self._file.flush()

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None
