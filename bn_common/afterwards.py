"""What the training programs do with a run that is finished, when they are asked to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bn_common import checkpoints, tensorboard
from bn_common.checks import require
from bn_common.config import AFTERWARDS, Config
from bn_common.files import LOCK, check_can_write, write_whole
from bn_common.images import read_image
from bn_common.predictions import Network, predict, tell
from bn_common.record import FILES
from bn_common.trained import Trained, check_new_file, read_trained

OF_A_RUN = {*FILES, LOCK, checkpoints.FOLDER, tensorboard.FOLDER, "profile"}
"""The names in a run folder."""


def is_asked(config: Config) -> bool:
    """Whether there is anything to do."""
    return config.export is not None or bool(config.predict)


def as_arguments(config: Config) -> list[str]:
    """What is asked, as on the command line: the run's record does not have it."""
    asked = {name: getattr(config, name) for name in sorted(AFTERWARDS)}
    return [text for name, v in asked.items() if v for text in (f"--{name}", *_texts(v))]


def _texts(value: object) -> list[str]:
    if value is True:
        return []
    return [str(v) for v in (value if isinstance(value, tuple) else (value,))]


def check(config: Config, fig_size: int | None = None) -> None:
    """Before the work, in the process that writes: whether it will be possible. It is tried.

    Args:
      config: what is asked.
      fig_size: what the network will take, where that is known.

    Raises:
      ValueError: it will not: a file to write that is there, or in the run folder's place; a folder that is not there;
        a file that is no image to predict.
    """
    for path in config.predict:
        read_image(path, fig_size, resize=config.resize, invert=config.invert)
    if config.export is not None:
        check_export(config, config.export)


def check_export(config: Config, export: Path) -> None:
    """The same of the file to write alone."""
    path, run = export.absolute(), (config.out or Path("runs") / "a new one").absolute()
    path, run = (Path(os.path.normpath(one)) for one in (path, run))
    require(path not in (run, *run.parents), "--export", export, "a file beside the run folder, or in it")
    allowed = f"a name that is not of {', '.join(sorted(OF_A_RUN))}"
    require(path.parent != run or path.name not in OF_A_RUN, "--export", export, allowed)
    if path.parent == run and not run.exists():
        # The run makes it; the name is tried where that will be.
        there = next(parent for parent in run.parents if parent.is_dir())
        check_can_write("--export", there / path.name)
        return
    check_new_file("--export", export)


def do(
    config: Config,
    run: Path,
    framework: str,
    *,
    export: Callable[[Trained], bytes] | None,
    predicting: Callable[[Trained], Network],
    say: Callable[[str], None],
    prog: str,
) -> int:
    """All that is asked; gives the exit status, 2 if an image could not be read.

    Args:
      config: which says it.
      run: the folder of the finished run.
      framework: whose it is.
      export: the content of the file for `config.export`, as the wing makes it.
      predicting: the wing's network of a run.
      say: prints a line.
      prog: the program's name.

    Raises:
      ValueError: the run is damaged.
      OSError: a file can't be written, or somebody has made it meanwhile.
    """
    trained = read_trained(run, framework)
    if config.export is not None:
        assert export is not None, "the program gives it where it is asked for"
        content = export(trained)
        with _named(config.export):
            if os.path.lexists(config.export):
                raise FileExistsError(17, "is there already")
            write_whole(config.export, content)
        say(f"exported: {config.export}, {len(content):,} bytes")
    if not config.predict:
        return 0
    network = predicting(trained)
    found, wrong = predict(network, config.predict, resize=config.resize, invert=config.invert)
    return tell(found, wrong, network, prog, as_list=False)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name the file that was asked for, not the temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
