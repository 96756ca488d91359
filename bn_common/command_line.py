"""From the command line to a run that can begin: what both wings' training programs do first."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn, TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from bn_common.checks import check_blenet, require
from bn_common.config import NUM_CLASS, Config
from bn_common.memory import imports
from bn_common.run_folder import RunFolder, refuse_used
from bn_common.watch import Watch
from image_data import ImageDataset, load_fashion_mnist, load_folder, load_sample

Options = TypeVar("Options")


def parse(kind: type[Options], args: Sequence[str] | None, *, prog: str, description: str) -> Options:
    """The dataclass `kind` as the command line says; bad input ends the program with exit status 2 and one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, prog=prog, description=description, args=args)
    except SystemExit as stop:
        if stop.code == 2:
            refuse(prog, _in_one_line(errors.getvalue()))
        sys.stderr.write(errors.getvalue())
        raise


def _in_one_line(box: str) -> str:
    """What was given and what is allowed, out of tyro's box of a title, a message, the option's help and a pointer.

    Where standard output takes no UTF-8, the box is drawn with hyphens, and has one more rule below its title.
    """
    box = re.sub("-{5,}", "─" * 5, re.sub(r"\A(.*\n) *-{5,} *\n", r"\1", box))
    sections = [" ".join(re.sub(r"[│╭╮╰╯─]", " ", part).split()) for part in re.split(r"─{5,}", box.partition("\n")[2])]
    message = re.sub(r"^Error parsing \w+: ", "", sections[0])
    for section in sections[1:]:
        if section.startswith("Argument helptext: "):
            message += f"; allowed: {section.removeprefix('Argument helptext: ')}"
    return f"{message}; allowed: what --help lists" if message.startswith("Unrecognized options") else message


def refuse(prog: str, message: str) -> NoReturn:
    """End the program: one line on standard error, exit status 2."""
    sys.stderr.write(f"{prog}: error: {' '.join(message.split())}\n")
    raise SystemExit(2)


def read_config(args: Sequence[str] | None, *, prog: str, description: str) -> Config:
    """The configuration that the command line asks for; a bad one, or a run folder in use, ends the program."""
    config = parse(Config, args, prog=prog, description=description).resolved()
    try:
        if config.out is not None:
            refuse_used(config.out)  # before a download, and before another process could have made it
    except ValueError as error:
        refuse(prog, str(error))
    return config


class Program(NamedTuple):
    """A wing that is ready to train.

    Attributes:
      train: train(config, dataset, run).
      process: the number of this process.
      watch: over the other processes, if there are any.
      leave: what the framework does when all are done.
    """

    train: Callable[..., Any]
    process: int = 0
    watch: Watch | None = None
    leave: Callable[[], None] = lambda: None


def start(
    config: Config, loading: Future[Program], *, framework: str, prog: str
) -> tuple[Program, ImageDataset, RunFolder]:
    """Load the data, wait for the training loop, open the run folder.

    What can be refused is refused here or in `read_config`, before any work starts: exit status 2 and one line that
    says what was given and what is allowed.
    """
    console = Console()
    try:
        dataset = load(config, console)
        check_blenet(channels=1, fig_size=dataset.train_images.shape[1], num_class=NUM_CLASS)
        num_train = len(dataset.train_images)
        require(
            config.batch_size <= num_train, "--batch-size", config.batch_size, f"2 to {num_train}, the training set"
        )
        program = loading.result()
        about = {"data": dataset.name} | ({"notice": dataset.notice} if dataset.notice else {})
        run = RunFolder(config, framework, about, console, writes=program.process == 0)
    except ValueError as error:
        refuse(prog, str(error))
    if dataset.notice:
        run.say(f"Notice: {dataset.notice}", style="yellow")
    return program, dataset, run


def load(config: Config, console: Console) -> ImageDataset:
    """The data set that the config names, with a progress bar if it has to be downloaded."""
    if config.data_dir is not None:
        return load_folder(config.data_dir)
    if config.data == "sample":
        return load_sample()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name)
            bar.update(tasks[name], completed=done, total=total)

        return load_fashion_mnist(progress=progress)


def main(load: Callable[[Config], Program], *, framework: str, prog: str, description: str) -> None:
    """A training program: the command line, then the training loop of one wing.

    Args:
      load: imports the framework and finds the other processes: while the data are loaded, in another thread, once the
        command line is known to be good. ValueError for a config that the devices refuse.
      framework: "jax" or "torch".
      prog: the program's name in messages.
      description: of the program, for --help.
    """
    run = config = None
    try:
        config = read_config(None, prog=prog, description=description)
        with imports(), ThreadPoolExecutor(1) as meanwhile:
            loading = meanwhile.submit(load, config)
            program, dataset, run = start(config, loading, framework=framework, prog=prog)
        _train(program, config, dataset, run)
    except SystemExit as stop:
        if config is not None and config.coordinator is not None:  # Python's own end would wait for the others
            sys.stdout.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        raise
    except FloatingPointError as error:
        sys.stderr.write(f"{prog}: stopped: {error}; {run.path if run else ''} holds the epochs before\n")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write(
            f"{prog}: interrupted; {f'{run.path} holds the finished epochs' if run else 'nothing begun'}\n"
        )
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by way of Python's own end: XLA's threads may still be in the midst of a step, and would crash there.
        os._exit(130)


def _train(program: Program, config: Config, dataset: ImageDataset, run: RunFolder) -> None:
    """Train; with other processes, end with them, or by way of the watch where one is lost."""
    watch = program.watch
    if watch is None:
        program.train(config, dataset, run)
        return
    run.say(f"a process that ends early, or does not answer for {watch.silence:g} seconds, is named, and all end")
    try:
        program.train(config, dataset, run)
        program.leave()
    except FloatingPointError:  # in all of them at once
        watch.leave()
        raise
    except Exception:
        watch.failed()
        # A fault of this process's own, which the others find out by its end: not by way of Python's, which waits for
        # them.
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    watch.leave()
