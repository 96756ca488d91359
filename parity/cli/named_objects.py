"""The objects that options of `python -m parity` name as MODULE:NAME, and a stranger's errors told in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bn_common.checks import require
from bn_common.installed import missing, need
from parity.records import array_files

HERE = Path(__file__).parents[1]
LONGEST = 400
"""Of what is told of a stranger's error: JAX's and PyTorch's may go on for pages."""
FACTORY = "package.module:name or file.py:name of a module, its class or a function that makes it"


def check_name(option: str, name: str) -> None:
    """ValueError if it is not of the form MODULE:NAME, or if there is no such module; nothing is imported."""
    place, colon, last = name.rpartition(":")
    require(bool(colon and place and last.isidentifier()), option, repr(name), FACTORY)
    if place.endswith(".py"):
        require(Path(place).is_file(), option, repr(name), f"{FACTORY}; there is no file {place}")


def object_of(option: str, name: str) -> Any:
    """What the name MODULE:NAME stands for; modules are looked for in the working directory, too.

    Raises:
      ValueError: no such module, one that can't be imported, or no such name in it.
    """
    check_name(option, name)
    place, _, last = name.rpartition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = _file(place) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises; its exit is not ours
        if (framework := missing(error)) is not None:
            need(f"{option} {name!r}", framework)
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{place}.".startswith(f"{absent}."):
            raise ValueError(f"{option} is {name!r}, and there is no module {absent}; allowed: {FACTORY}") from None
        raise ValueError(f"{option} is {name!r}, which can't be imported: {told(error)}; allowed: {FACTORY}") from error
    require(hasattr(module, last), option, repr(name), f"{FACTORY}; {place} has no {last}")
    return getattr(module, last)


def _file(place: str) -> Any:
    """The module in this file, run."""
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, such as linen modules, look their module up.
    sys.modules[spec.name] = module
    # Its neighbours are found as if it were run itself.
    sys.path.insert(0, str(Path(place).resolve().parent))
    spec.loader.exec_module(module)
    return module


def pair_of(option: str, name: str | None) -> tuple[Any, Any] | None:
    """The two objects, PyTorch's and JAX's, that the name stands for.

    Raises:
      ValueError: no such name, or what it gives is no pair.
    """
    if name is None:
        return None
    found = object_of(option, name)
    fine = isinstance(found, tuple | list) and len(found) == 2
    require(fine, option, f"{name!r}, which gives {type(found).__name__}", "a pair, PyTorch's and JAX's")
    return found[0], found[1]


def module_of(option: str, name: str, seed: int = 0) -> Any:
    """The module that the name stands for, made if it is a class or a function.

    What it draws at random, when it is imported and when it is made, it draws from this seed.

    Raises:
      ValueError: no such name, one that needs arguments or fails, or what it gives is no module.
    """
    from parity.sides.module import framework_of
    from parity.sides.seed import sow

    sow(seed)
    found = object_of(option, name)
    is_made = isinstance(found, type) or (callable(found) and framework_of(found) is None)
    sow(seed)  # whatever was imported before, and drew
    module = _made(option, name, found) if is_made else found
    wanted = next((one for one in ("torch", "flax") if one in option), None)
    is_fine = framework_of(module) is not None and wanted in (None, framework_of(module))
    allowed = {"torch": "a torch.nn.Module", "flax": "a flax.linen.Module or flax.nnx.Module"}
    what = allowed[wanted] if wanted else " or ".join(allowed.values())
    require(is_fine, option, f"{name!r}, which gives {type(module).__name__}", what)
    return module


def _made(option: str, name: str, factory: Any) -> Any:
    try:
        return factory()
    except (Exception, SystemExit) as error:  # whatever a stranger's factory raises
        allowed = FACTORY
        if isinstance(factory, type):  # an NNX class wants its rngs
            allowed += f"; {factory.__name__} by a function without arguments: lambda: {factory.__name__}(...)"
        raise ValueError(f"{option} is {name!r}, which fails: {told(error)}; allowed: {allowed}") from error


def read_arrays(option: str, path: Path) -> dict[str, NDArray]:
    """The arrays of a .npz file by name, in their order; of a .npy file the one.

    Raises:
      ValueError: it can't be read.
    """
    try:
        return array_files.read(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} is {path}, which can't be read ({error}); allowed: .npy or .npz files") from error


@contextlib.contextmanager
def taken(who: str, inputs: Sequence[NDArray]) -> Iterator[None]:
    """ValueError with one line for whatever the modules raise on these inputs.

    What is raised in the bridge's own code is a mistake of its own, and stays as it is.
    """
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if "allowed:" in str(error) or Path(last.filename).is_relative_to(HERE):
            raise
        shapes = ", ".join(f"{a.dtype} {a.shape}" for a in inputs)
        allowed = f"what {who} can take, in PyTorch's layout"
        raise ValueError(f"the input is {shapes}, on which a run fails: {told(error)}; allowed: {allowed}") from error


@contextlib.contextmanager
def exits_told() -> Iterator[None]:
    """ValueError with one line where a stranger's module ends the program: its status is not what was found."""
    try:
        yield
    except SystemExit as stop:
        allowed = "modules that return, or raise an error"
        raise ValueError(f"a module ends the program: {told(stop)}; allowed: {allowed}") from stop


def told(error: BaseException) -> str:
    """An error in one short line, with the last place in the user's own code that it came through."""
    places = [
        f"{Path(frame.filename).name}, line {frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not {"site-packages", "dist-packages"} & set(Path(frame.filename).parts)
        and Path(frame.filename).is_file()
        and not Path(frame.filename).is_relative_to(HERE)
        and not Path(frame.filename).is_relative_to(Path(os.__file__).parent)
    ]
    return f"{type(error).__name__}: {_in_short(str(error))}" + (f" ({places[-1]})" if places else "")


def _in_short(text: str) -> str:
    """The first paragraph of a framework's message, without the addresses of its documentation."""
    text = re.sub(r"\(?\bhttps?://\S+", "", text.strip().split("\n\n")[0])
    words = " ".join(text.split())
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 3]}..."
