"""Files that are whole or not there, and a folder's lock."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two at once are not kept apart there.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


def read_json(content: bytes) -> Any:
    """The value in a file that may be damaged. ValueError for whatever is wrong with it."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that no reader, and no crash, ever sees a part of it."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files whole, in this order; nothing is replaced before all of it is on the disk.

    Killed between two of them, a process leaves what is missing as `leftovers` of its file.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in contents}
    try:
        for path, content in contents.items():
            with open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def leftovers(path: Path) -> list[Path]:
    """What killed processes have left that were writing this file."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\d+")
    return [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]


def lock(folder: Path) -> Callable[[], None] | None:
    """Lock a folder for this process; what unlocks it, or None if another process has it.

    The lock ends with the process, however that ends: the file that it leaves then locks nothing.
    """
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may just have removed the file: another one is to be locked then.
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                break
        except BlockingIOError:
            os.close(file)
            return None
        except FileNotFoundError:
            pass
        os.close(file)

    def unlock() -> None:
        with contextlib.suppress(OSError):  # the folder is gone
            path.unlink(missing_ok=True)
        os.close(file)

    return unlock


def check_can_be_made(name: str, path: Path) -> None:
    """A folder that is there and can be written, or can be made. Nothing is.

    Raises:
      ValueError: "`name` is `path`: why not; allowed: ...".
    """
    allowed = "a folder that can be written"
    try:
        there = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
        if not os.path.isdir(there):
            raise NotADirectoryError(20, f"{'it' if there == path else there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(13, f"{'it' if there == path else there} can't be written")
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{name} is {path}: {why}; allowed: {allowed}") from None


def check_can_write(name: str, path: Path) -> None:
    """A file that can be written as `write_whole` does, beside its place. It is tried, and nothing is left.

    Raises:
      ValueError: "`name` is `path`: why not; allowed: ...".
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        temporary.unlink()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{name} is {str(path)[:200]}: {why}; allowed: a file that can be written") from None
