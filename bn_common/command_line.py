"""From the command line to a run that can begin: what both wings' training programs do first."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, cast

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from bn_common import afterwards
from bn_common.checkpoints import UnfitError
from bn_common.checks import check_blenet, require
from bn_common.config import GROUPS, MOST_STEPS, NUM_CLASS, Config
from bn_common.config_file import read_toml
from bn_common.files import check_can_be_made
from bn_common.installed import missing, needed_by
from bn_common.memory import imports
from bn_common.mistakes import pictures
from bn_common.predictions import Network
from bn_common.record import (
    identity_of,
    is_finished,
    names_the_same_data,
    record_of,
    recorded_config,
    refuse_other,
    refuse_under_way,
)
from bn_common.run_folder import RunFolder
from bn_common.shown import as_text, printable
from bn_common.stopping import Signals, Stopped
from bn_common.streams import fill_standard_streams
from bn_common.tensorboard import check_installed
from bn_common.trained import Trained, read_trained
from bn_common.watch import Watch
from image_data import ImageDataset, load_fashion_mnist, load_folder, load_sample, steps_per_epoch

Options = TypeVar("Options")
HELP = "what --help lists"


def parse(
    kind: type[Options],
    args: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    groups: Sequence[type[Any]] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Options:
    """The dataclass `kind` as the command line says; bad input ends the program with exit status 2 and one line.

    Args:
      kind: of the options.
      args: the command line; None: the process's.
      prog: the program's name in messages.
      description: of the program, for --help.
      groups: the dataclasses that `kind` inherits all its fields from, as --help is to show them.
      defaults: what the command line leaves out, by the field's name, where it is not as in the groups.
    """
    args = sys.argv[1:] if args is None else args
    for option, value in zip(("", *args), (*args, "--"), strict=True):
        # tyro takes an option of any number of values without one.
        if option == "--predict" and value.startswith("--"):
            refuse(prog, f"{option} is ''; allowed: {HELP}")
        # tyro makes of an empty path the folder that the program is started in.
        if not value or re.fullmatch(r"--[\w-]+=", value):
            refuse(prog, f"{value.removesuffix('=') or option} is ''; allowed: {HELP}")
    errors = io.StringIO()
    asked = _nested(groups, defaults or {}) if groups else kind
    try:
        with contextlib.redirect_stderr(errors):
            found = tyro.cli(asked, prog=prog, description=description, args=args)
    except SystemExit as stop:
        if stop.code == 2:
            refuse(prog, _in_one_line(errors.getvalue()))
        sys.stderr.write(errors.getvalue())
        raise
    if not groups:
        return cast(Options, found)
    try:
        return kind(**{name: value for group in vars(found).values() for name, value in vars(group).items()})
    except ValueError as error:
        refuse(prog, str(error))


def _nested(groups: Sequence[type[Any]], defaults: Mapping[str, Any]) -> type[Any]:
    """A dataclass with a field for each group, which tyro shows as one, under the field's name alone."""
    fields: list[Any] = []
    for group in groups:
        own = {field.name: defaults[field.name] for field in dataclasses.fields(group) if field.name in defaults}
        kind: Any = Annotated[tyro.conf.OmitArgPrefixes[group], tyro.conf.arg(help="")]  # type: ignore[misc, valid-type]
        fields.append((group.__name__.lower(), kind, dataclasses.field(default=group(**own))))
    return dataclasses.make_dataclass("Options", fields)


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
    return f"{message}; allowed: {HELP}" if message.startswith("Unrecognized options") else message


def program_name(script: str, otherwise: str) -> str:
    """What to call the program that runs: by the name of its console script, where it was started by that."""
    started = Path(sys.argv[0])
    return script if started.is_absolute() and started.stem == script else otherwise


def as_command(prog: str) -> str:
    """The command that starts the program of that name."""
    return f"python {prog}" if prog.endswith(".py") else prog


def refuse(prog: str, message: str) -> NoReturn:
    """End the program: one line on standard error, exit status 2."""
    _tell(prog, message)
    raise SystemExit(2)


def _tell(prog: str, message: str) -> None:
    sys.stderr.write(f"{prog}: error: {printable(' '.join(message.split()))}\n")


def read_config(args: Sequence[str] | None, *, prog: str, description: str, framework: str | None = None) -> Config:
    """The configuration that the command line asks for; a bad one ends the program, as does a folder of another run.

    What the command line leaves out is as the file of --config has it, and else, with --resume, the run in --out. A
    run that is finished already is told, and ends the program with exit status 0, unless something is to be done with
    it.
    """
    read = partial(parse, Config, args, prog=prog, description=description, groups=GROUPS)
    try:
        defaults: dict[str, Any] = {}
        asked = read()
        if asked.resume:
            if asked.out is None:
                raise ValueError("--out is missing; allowed with --resume: the folder of the run to continue")
            defaults = vars(recorded_config(asked.out))
        if asked.config is not None:
            defaults |= read_toml(asked.config)
        config = read(defaults=defaults).resolved()
        if config.tensorboard:
            check_installed()
        # Before a download, and before another of several processes could have made it.
        if config.out is not None:
            refuse_other(config.out, record_of(config, framework) if framework else {})
            refuse_under_way(config.out)
        else:
            check_can_be_made("--out", Path("runs"))
        finished = framework is not None and _nothing_to_train(config)
        if finished and config.export is not None:
            afterwards.check_export(config, config.export)
        elif not finished and (config.coordinator is None or config.process_id == 0):
            afterwards.check(config)
    except ValueError as error:
        refuse(prog, str(error))
    if finished:
        _say(f"run folder: {config.out} holds all of this run")
        if not afterwards.is_asked(config):
            raise SystemExit(0)
    return config


def _nothing_to_train(config: Config) -> bool:
    """Whether the run in --out is finished; of one in several processes nobody asks, the others are waiting.

    Where other data are named, and nothing else is to be done with the run, nobody knows before they are looked at.
    """
    if config.coordinator is not None or config.out is None or not is_finished(config, config.out):
        return False
    return afterwards.is_asked(config) or names_the_same_data(config, config.out)


def _say(text: str) -> None:
    Console().print(as_text(text), soft_wrap=True, markup=False, highlight=False, emoji=False)


def _no_network(run: Trained) -> Network:
    raise AssertionError("the program gives what predicts where it is asked for")


class Program(NamedTuple):
    """A wing that is ready to train.

    Attributes:
      train: train(config, dataset, run).
      process: the number of this process.
      watch: over the other processes, if there are any.
      leave: what the framework does when all are done.
      export: gives the content of the file for --export; None where that is not asked for.
      predicting: gives a run's network, for --predict.
      again: how the program is started in all its processes, in words and the command's beginning; "": by its name.
    """

    train: Callable[..., Any]
    process: int = 0
    watch: Watch | None = None
    leave: Callable[[], None] = lambda: None
    export: Callable[[Trained], bytes] | None = None
    predicting: Callable[[Trained], Network] = _no_network
    again: str = ""


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
        most = MOST_STEPS // steps_per_epoch(num_train, config.batch_size)
        require(config.epochs <= most, "--epochs", config.epochs, f"1 to {most}: steps are counted to 2^31 - 1")
        identity = identity_of(dataset)
        if config.out is not None:
            refuse_other(config.out, {**record_of(config, framework), **identity})
        program = loading.result()
        if program.process == 0:
            afterwards.check(config, dataset.train_images.shape[1])
        about = {"data": dataset.name} | ({"notice": dataset.notice} if dataset.notice else {})
        run = RunFolder(config, framework, about, console, identity, writes=program.process == 0)
    except ValueError as error:
        refuse(prog, str(error))
    if dataset.notice:
        run.say(f"Notice: {dataset.notice}", style="yellow")
    return program, dataset, run


def _of_a_framework(load: Callable[[Config], Program], config: Config, prog: str) -> Program:
    """What `load` gives; ValueError that says what to install, where the framework is not there."""
    try:
        with needed_by(prog):
            return load(config)
    except ModuleNotFoundError as error:
        if missing(error) is None:
            raise
        raise ValueError(str(error)) from None


def _loaded(loading: Future[Program], prog: str) -> Program:
    """The wing, where there is nothing to train."""
    try:
        return loading.result()
    except ValueError as error:
        refuse(prog, str(error))


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
    fill_standard_streams()
    run, again = None, ""
    with Signals() as signals:
        try:
            config = read_config(None, prog=prog, description=description, framework=framework)
            with imports():
                meanwhile = ThreadPoolExecutor(1)
                try:
                    loading = meanwhile.submit(_of_a_framework, load, config, prog)
                    if _nothing_to_train(config):
                        program = _loaded(loading, prog)
                    else:
                        program, dataset, run = start(config, loading, framework=framework, prog=prog)
                except SystemExit as stop:
                    end(int(stop.code or 0))  # what is refused does not wait for what is still being imported
                meanwhile.shutdown()
            again = program.again
            if run is not None:
                signals.deferred = True
                run.told_to_stop = lambda step: signals.asked
                if run.writes:
                    run.pictures = partial(_pictures, program, dataset, run.path, framework)
                _train(program, config, dataset, run)
            if afterwards.is_asked(config) and program.process == 0:
                signals.deferred = False
                if signals.asked is not None:
                    raise Stopped(signals.asked)
                path, say = (run.path, run.say) if run is not None else (config.out, _say)
                assert path is not None, "that of a finished run was given"
                means: Any = {"export": program.export, "predicting": program.predicting}
                try:
                    status = afterwards.do(config, path, framework, **means, say=say, prog=prog)
                except ValueError as error:
                    refuse(prog, str(error))
                if status:
                    raise SystemExit(status)
        except Stopped as stop:
            stopped(run, prog, f"interrupted by {stop.signal.name}", stop.status, again=again)
        except FloatingPointError as error:
            stopped(run, prog, f"stopped: {error}", 1, goes_on=False)
        except UnfitError as error:
            assert run is not None, "whose checkpoint it is"
            run.close()
            _tell(prog, str(error))
            end(2)  # not by way of Python's end, where other processes would be waited for
        except OSError as error:
            at = f"{error.filename}: " if error.filename else ""
            stopped(run, prog, f"stopped: {at}{error.strerror or error}", 1, again=again)


def _pictures(program: Program, dataset: ImageDataset, path: Path, framework: str) -> tuple[bytes, bytes, str]:
    """What a finished run in that folder makes of the test set, see `bn_common.mistakes`."""
    return pictures(program.predicting(read_trained(path, framework)), dataset)


def _train(program: Program, config: Config, dataset: ImageDataset, run: RunFolder) -> None:
    """Train; with other processes, end with them, or by way of the watch where one is lost."""
    watch = program.watch
    if watch is None:
        program.train(config, dataset, run)
        return
    run.say(watch.about)
    try:
        program.train(config, dataset, run)
        program.leave()
    except (FloatingPointError, Stopped):  # in all of them at once
        run.close()  # first what is being written, then the others may go
        program.leave()
        watch.leave()
        raise
    except (OSError, UnfitError):  # in the one that writes, whose end the others will see
        raise
    except Exception:
        watch.failed()
        # A fault of this process's own, which the others find out by its end: not by way of Python's, which waits for
        # them.
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    watch.leave()


def stopped(
    run: RunFolder | None, prog: str, why: str, status: int, *, goes_on: bool = True, again: str = ""
) -> NoReturn:
    """End the program before its run is finished: one line on standard error, with what is saved.

    Args:
      run: if one has begun.
      prog: the program's name.
      why: it ends.
      status: with which.
      goes_on: whether it would go otherwise another time; then how to go on is told.
      again: see `Program`.
    """
    held = "nothing begun"
    if run is not None:
        try:
            run.close()
        except OSError as error:
            if str(error.strerror) not in why:
                why += f"; {error.strerror}"
        held = f"{run.path} holds the checkpoint of step {run.saved_step}"
        if run.saved_step is None:
            held = f"{run.path} holds no checkpoint yet"
        command = again or as_command(prog)
        if goes_on:
            more = shlex.join(["--out", str(run.path), *afterwards.as_arguments(run.config)])
            held += f"; to go on: {command} --resume {more}"
        if not run.is_there():
            held = "nothing is left of it"
    said = f"{why}; {held}" if run is None or run.writes else why
    sys.stderr.write(f"{prog}: {printable(' '.join(said.split()))}\n")
    end(status)


def end(status: int) -> NoReturn:
    """End the program now, and not by way of Python's own end: threads may be in the midst of something."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
