"""Where a framework is not installed: what is said, in one line, and what to install."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator

# What each is called by those who use it. Each is installed under the name that it is imported by.
NAMES = {"torch": "PyTorch", "jax": "JAX", "flax": "Flax", "optax": "Optax"}
BOTH = ("torch", "jax", "flax", "optax")


def need(who: str, *modules: str) -> None:
    """See that what is needed is installed; nothing is imported.

    Args:
      who: needs it, in the message.
      *modules: of NAMES.

    Raises:
      ModuleNotFoundError: "`who` needs PyTorch, which is not installed; allowed: pip install torch".
    """
    absent = [name for name in modules if not _is_there(name)]
    if absent:
        raise _error(who, absent)


def missing(error: BaseException) -> str | None:
    """Which of the frameworks it is that was to be imported and is not there; None of any other error."""
    name = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return name if name in NAMES and not _is_there(name) else None


@contextlib.contextmanager
def needed_by(who: str) -> Iterator[None]:
    """Around imports: where a framework is not there, `need`'s words in the place of Python's.

    What `need` has said further in stays. While Python still imports the packages of the program that -m names, nobody
    could handle the error: the process ends as a program that refuses something, in one line with exit status 2.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        absent = missing(error)
        if absent is None or "allowed:" in str(error):
            raise
        said = _error(who, [absent])
        if sys.argv[:1] == ["-m"]:  # so long as it looks for the module
            sys.stderr.write(f"{_started() or who}: error: {said}\n")
            raise SystemExit(2) from None
        raise said from None


def _started() -> str:
    """How the process was started, by -m; "" if that is not to be seen."""
    words = sys.orig_argv
    after = words.index("-m") + 1 if "-m" in words else len(words)
    return " ".join(["python -m", *words[after : after + 1]]) if after < len(words) else ""


def _error(who: str, absent: list[str]) -> ModuleNotFoundError:
    named = " and ".join(NAMES[name] for name in absent)
    verb = "is" if len(absent) == 1 else "are"
    text = f"{who} needs {named}, which {verb} not installed; allowed: pip install {' '.join(absent)}"
    return ModuleNotFoundError(text, name=absent[0])


def _is_there(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None  # None keeps it from being imported
    return importlib.util.find_spec(name) is not None
