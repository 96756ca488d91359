"""A run's checkpoints on disk: which of them are whole, which is the newest, which are kept.

A checkpoint is a folder named by its step. What the tensors in it look like only the wings know
(`jax_bn/checkpoint.py`, `torch_bn/checkpoint.py`); beside them lies SEAL, written last: what the run was, where it
stood, and the digest of every other file. A folder without a seal was never finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bn_common.checks import require
from bn_common.files import read_json, write_whole
from bn_common.record import check_epoch, check_record

FOLDER, SEAL = "checkpoints", "checkpoint.json"
DAMAGED = ".damaged"
# A step, and what Orbax calls it while it is written. Whatever has another name somebody else has put there.
STEP = re.compile(r"0|[1-9][0-9]*")
UNDER_WAY = re.compile(r"[0-9]+(\.orbax-checkpoint-tmp.*)?")

Fetched = tuple[tuple[float, float, float], ...]
"""Of every step its metrics, on the host: the sums of the losses, of the right predictions, of the examples."""


class UnfitError(ValueError):
    """A checkpoint, whole, that is none of this run."""


class Place(NamedTuple):
    """Where in its epochs a run stands.

    Attributes:
      epoch: the one under way, from 0: as many are finished.
      found: what its steps so far have found.
      start_time: when its first step began, in seconds since 1970; None before.
      seconds: wall time of its steps so far.
    """

    epoch: int = 0
    found: Fetched = ()
    start_time: float | None = None
    seconds: float = 0.0

    def steps_done(self, steps_per_epoch: int) -> int:
        """Steps since the beginning of the run."""
        return self.epoch * steps_per_epoch + len(self.found)


class Checkpoint(NamedTuple):
    """One that is whole: its step, its folder, and what its seal says."""

    step: int
    path: Path
    about: dict[str, Any]

    @property
    def place(self) -> Place:
        """Where the run stood."""
        place = Place(**self.about["place"])
        return place._replace(found=tuple((loss, correct, examples) for loss, correct, examples in place.found))


def seal(path: Path, about: Mapping[str, Any]) -> None:
    """Make a folder of files a checkpoint: write SEAL, with `about` and the SHA-256 of every other file."""
    sha256 = {name: _digest(file) for name, file in sorted(_files(path).items()) if name != SEAL}
    content = json.dumps({"about": about, "sha256": sha256}, allow_nan=False).encode()
    write_whole(path / SEAL, content + b"\n" + hashlib.sha256(content).hexdigest().encode() + b"\n")


def unseal(path: Path) -> dict[str, Any]:
    """What the seal says about a checkpoint, every byte of which is as it was written.

    Raises:
      ValueError: a file is damaged, missing or can't be read; the message says which.
    """
    held = _read_seal(path)
    for name, digest in held["sha256"].items():
        try:
            found = _digest(path / name)
        except OSError as error:
            raise ValueError(f"{name} can't be read: {error.strerror}") from None
        if found != digest:
            raise ValueError(f"{name} is not what was written")
    return held["about"]


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, or None; what is damaged is set aside, and said.

    What a killed process has left half written or half deleted is removed; nothing that has another name.
    """
    if not folder.is_dir():
        return None
    for path in folder.iterdir():
        if UNDER_WAY.fullmatch(path.name) and not (path / SEAL).exists():
            _remove(path)
    for step in sorted(_steps(folder), reverse=True):
        path = folder / str(step)
        try:
            return Checkpoint(step, path, unseal(path))
        except ValueError as error:
            aside = path.with_name(path.name + DAMAGED)
            _remove(aside)
            path.rename(aside)
            say(f"checkpoint {step} is damaged: {error}; it is now {aside}, and an older one is looked for")
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the last `keep` and the one with the best test accuracy."""
    steps = sorted(_steps(folder))
    scores = {step: _read_seal(folder / str(step))["about"]["test_accuracy"] for step in steps}
    best = max((step for step in steps if scores[step] is not None), key=scores.__getitem__, default=None)
    for step in steps[:-keep]:
        if step != best:
            _remove(folder / str(step))


def describe(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Name -> dtype and shape, of any framework's arrays: "float32 5x5x1x6"."""
    return {
        name: " ".join([str(v.dtype).removeprefix("torch."), "x".join(map(str, v.shape)) or "scalar"])
        for name, v in arrays.items()
    }


def check_arrays(mine: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Both as `describe` has them. UnfitError with the first that this run has otherwise than the checkpoint."""
    for name in (*theirs, *mine):
        given, allowed = mine.get(name, "missing"), theirs.get(name, "none of that name")
        if given != allowed:
            raise UnfitError(f"the array {name} is {given}; allowed: {allowed}, as the checkpoint has it")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around what a framework reads of a whole checkpoint: UnfitError for whatever it raises."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise UnfitError(
            f"{path} can't be read: {type(error).__name__}: {why}; allowed: what this program wrote"
        ) from error


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if STEP.fullmatch(path.name) and (path / SEAL).exists()]


def _read_seal(path: Path) -> dict[str, Any]:
    try:
        content, digest, end = (path / SEAL).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{SEAL} can't be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{SEAL} is not what was written") from None
    if end or hashlib.sha256(content).hexdigest().encode() != digest:
        raise ValueError(f"{SEAL} is not what was written")
    held = read_json(content)
    try:
        _check_seal(held)
    except (KeyError, TypeError, AttributeError, ValueError):
        # Whoever makes up a seal has made up its digest, too.
        raise ValueError(f"{SEAL} is none of a checkpoint") from None
    return held


def _check_seal(held: Any) -> None:
    """Any of the errors of values that are not there, or of another type, where it lacks something that is read."""
    about, place = held["about"], Place(**held["about"]["place"])
    for name, digest in held["sha256"].items():
        parts = Path(name).parts
        require(
            isinstance(digest, str) and ".." not in parts and not Path(name).is_absolute(), "a file", name, "within"
        )
    check_record(about["run"])
    for line in about["metrics"]:
        check_epoch(line)
    for name in ("arrays", "made_with"):
        require(all(isinstance(v, str) for v in about[name].values()), name, about[name], "texts")
    for step in place.found:
        whole = len(step) == 3 and all(isinstance(number, int | float) for number in step)
        require(whole, "a step", step, "three numbers")
    whole = type(place.epoch) is int and len(about["metrics"]) == place.epoch
    require(whole, "the epoch", place.epoch, "as many as there are lines of metrics")
    for name, number in (("the start", place.start_time), ("the score", about["test_accuracy"])):
        require(number is None or isinstance(number, int | float), name, number, "a number, or None")
    require(isinstance(place.seconds, int | float), "the seconds", place.seconds, "a number")


def _files(path: Path) -> dict[str, Path]:
    return {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    """The seal first: killed in the midst of it, what is left is no checkpoint. Of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
        return
    (path / SEAL).unlink(missing_ok=True) if path.is_dir() else path.unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
