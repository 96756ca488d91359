"""Functions of a framework exchanged for a while, whoever has them.

Who has imported one by name keeps it in a module of his own, where setting `framework.function` does not reach.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any


@contextlib.contextmanager
def exchanged(
    functions: dict[Callable[..., Any], Callable[[Callable[..., Any]], Callable[..., Any]]],
) -> Iterator[None]:
    """Each function does what `functions[function](original)` does.

    One in Python is changed itself, so that it does not matter where it is kept; one in C is replaced under every name
    that a module of the process has for it.
    """
    with contextlib.ExitStack() as stack:
        for function, make in functions.items():
            if isinstance(function, FunctionType) and function.__closure__ is None:
                stack.enter_context(_changed(function, make))
            else:
                stack.enter_context(_renamed(function, make(function)))
        yield


@contextlib.contextmanager
def _changed(function: FunctionType, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    code, names = function.__code__, function.__globals__
    original = FunctionType(code, names, function.__name__, function.__defaults__)
    original.__kwdefaults__ = function.__kwdefaults__
    replacement = make(original)
    # Code finds what it calls by name, among the globals of the function.
    name = f"_exchanged_{id(replacement)}"
    found: dict[str, Any] = {}
    exec(f"def f(*args, **kwargs): return {name}(*args, **kwargs)", found)
    names[name] = replacement
    function.__code__ = found["f"].__code__
    try:
        yield
    finally:
        function.__code__ = code
        del names[name]


@contextlib.contextmanager
def _renamed(function: Callable[..., Any], replacement: Callable[..., Any]) -> Iterator[None]:
    places = [(space, name) for space, name in _held(function, len(sys.modules)) if space.get(name) is function]
    for space, name in places:
        space[name] = replacement
    try:
        yield
    finally:
        for space, name in places:
            space[name] = function


@functools.lru_cache(maxsize=8)
def _held(function: Callable[..., Any], number_of_modules: int) -> list[tuple[dict[str, Any], str]]:
    """Where modules keep it; looked for again where others have been imported, as that takes milliseconds."""
    del number_of_modules
    spaces = [vars(module) for module in [*sys.modules.values()] if hasattr(module, "__dict__")]
    return [(space, name) for space in spaces for name, value in [*space.items()] if value is function]
