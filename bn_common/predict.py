"""The programs that predict: what both wings have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from bn_common.command_line import parse, refuse
from bn_common.predictions import Network, predict, tell

Flag = tyro.conf.FlagCreatePairsOff


@dataclasses.dataclass(frozen=True)
class Options:
    """What is predicted, and how it is told."""

    run: tyro.conf.Positional[Path]
    """The run folder of a training program, or a file that was exported from it."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """PNG or JPEG files, one image each."""
    resize: Annotated[bool, Flag] = False
    """Bring images to the size that the network takes: the longer side fits, the shorter is filled up."""
    invert: Annotated[bool, Flag] = False
    """Images are dark on white; those that were trained on are bright on black."""
    json: Annotated[bool, Flag] = False
    """A list as JSON, with the probabilities of all classes."""


def program(args: Sequence[str] | None, *, prog: str, description: str, load: Callable[[Path], Network]) -> None:
    """A program that predicts; it ends with exit status 2 where anything was refused, one line each.

    Args:
      args: the command line; None: the process's.
      prog: the program's name in messages.
      description: of the program, for --help.
      load: gives the network of a run folder or an exported file; ValueError for what is none.
    """
    options = parse(Options, args, prog=prog, description=description)
    try:
        if not options.images:
            raise ValueError("IMAGES is empty; allowed: one PNG or JPEG file or more")
        network = load(options.run)
    except ValueError as error:
        refuse(prog, str(error))
    found, wrong = predict(network, options.images, resize=options.resize, invert=options.invert)
    status = tell(found, wrong, network, prog, as_list=options.json)
    if status:
        raise SystemExit(status)
