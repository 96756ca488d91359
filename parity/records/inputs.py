"""What a module is called with: arrays, one by one or nested in whatever way; None, numbers and words beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.records import trees
from parity.records.kinds import as_native, is_floating, is_too_wide

PLAIN = bool, int, float, complex, str, bytes, type(None)
"""What is handed on as it is."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of a call.

    Attributes:
      args: in order; each an array, anything of `PLAIN`, or tuples, lists, dicts and dataclasses of these.
      keywords: by name, likewise.
    """

    args: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs | Sequence[Any] | Mapping[str, Any]) -> Inputs:
        """A sequence of arguments, or a dict of keywords."""
        if isinstance(inputs, Inputs):
            return inputs
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        return cls(tuple(inputs))

    def mapped(self, function: Callable[[Any], Any]) -> Inputs:
        """The same call with function(array) in every array's place."""
        tree = trees.mapped(lambda _, v: v if isinstance(v, PLAIN) else function(v), (self.args, dict(self.keywords)))
        return Inputs(*tree)

    def arrays(self) -> list[Any]:
        """Every array, in order."""
        found: list[Any] = []
        self.mapped(found.append)
        return found

    def filled(self, arrays: Sequence[Any]) -> Inputs:
        """The same call with these in the arrays' places."""
        others = iter(arrays)
        return self.mapped(lambda _: next(others))

    def form(self) -> str:
        """All but the arrays, in words: two calls of one form differ in their arrays alone."""
        return repr(self.mapped(lambda _: Ellipsis))


def given(
    inputs: Sequence[Any] | Mapping[str, Any] | None, keywords: Mapping[str, Any] | None, name: str = "inputs"
) -> Inputs | None:
    """What a user gives, as numpy arrays: bfloat16, which numpy does not know, as float32, which holds it exactly.

    Args:
      inputs: a sequence of arguments, or a dict of keywords; None: none.
      keywords: more of these.
      name: of the argument, for messages.

    Returns:
      The call; None where neither is given.

    Raises:
      TypeError: one array in place of a sequence, or what is no array.
      ValueError: no array at all, or nothing but empty ones.
    """
    if inputs is None and keywords is None:
        return None
    if keywords is not None and not (isinstance(keywords, Mapping) and all(isinstance(k, str) for k in keywords)):
        raise TypeError(f"keywords is {keywords!r:.80}; allowed: a dict from names of arguments to arrays, or None")
    if hasattr(inputs, "shape") or not isinstance(inputs, Sequence | Mapping | None) or isinstance(inputs, str):
        what = "one array" if hasattr(inputs, "shape") else type(inputs).__name__
        raise TypeError(f"{name} is {what}; allowed: a sequence of arrays, or a dict of keywords")
    call = Inputs.of(() if inputs is None else inputs)
    both = call.keywords.keys() & (keywords or {}).keys()
    if both:
        raise ValueError(f"{name} and keywords both have {', '.join(sorted(both))}; allowed: each argument once")
    call = Inputs(call.args, {**call.keywords, **(keywords or {})})
    call = Inputs(*trees.mapped(lambda _, v: _array(v, name), (call.args, dict(call.keywords))))
    shapes = [a.shape for a in call.arrays()]
    if not shapes:
        raise ValueError(f"{name} is none; allowed: one numpy array or more")
    if not any(math.prod(shape) for shape in shapes):
        shapes_told = ", ".join(map(str, shapes))
        allowed = "an example or more"
        raise ValueError(f"{name} are empty, of shape {shapes_told}: nothing would be compared; allowed: {allowed}")
    return call


def _array(value: Any, name: str) -> Any:
    if not hasattr(value, "__array__") or type(value).__module__.split(".")[0] == "torch":
        if isinstance(value, PLAIN):
            return value
        allowed = "numpy arrays, None, numbers, words, and tuples, lists, dicts and dataclasses of them"
        raise TypeError(f"one of {name} is {type(value).__name__}; allowed: {allowed}")
    a: NDArray[Any] = np.asarray(value)
    a = a.astype(np.float32) if a.dtype.kind == "V" and is_floating(a) else a
    if a.dtype.kind not in "fiub" or is_too_wide(a.dtype):
        raise TypeError(f"one of {name} is {a.dtype}; allowed: numbers of up to 64 bits")
    return as_native(a)


class Calls(NamedTuple):
    """How a user has both sides called.

    Attributes:
      torch: PyTorch's module; None: with what its first layer suggests.
      flax: Flax's, in its layout; None: with the same.
      flax_call: see `parity.check`.
    """

    torch: Inputs | None = None
    flax: Inputs | None = None
    flax_call: Callable[..., Any] | None = None


def calls(
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    keywords: Mapping[str, Any] | None = None,
    flax_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    flax_call: Callable[..., Any] | None = None,
) -> Calls:
    """What a user gives every entrance of the bridge, see `parity.check`.

    Raises:
      TypeError, ValueError: see `given`; another number of arrays for Flax, one by one.
    """
    torch, flax = given(inputs, keywords), given(flax_inputs, None, "flax_inputs")
    if flax is not None:
        if torch is None:
            raise ValueError("flax_inputs is given without inputs; allowed: both, or neither")
        counts = [len(call.arrays()) for call in (torch, flax)]
        # By keywords it is said what each is: one side may ask for more than the other.
        if counts[0] != counts[1] and not flax.keywords:
            raise ValueError(f"flax_inputs is {counts[1]} arrays; allowed: {counts[0]}, as many as inputs")
    if flax_call is not None and not callable(flax_call):
        raise TypeError(f"flax_call is {flax_call!r}; allowed: a function, or None")
    return Calls(torch, flax, flax_call)
