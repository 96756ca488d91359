"""Whether something computes in float32 though it is given float64. Never imports jax."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from parity.sides.exchange import exchanged

SHORT = (torch.float32, torch.float16, torch.bfloat16)
# Copies of numbers: nothing is rounded.
EXACT = frozenset((
    "_unsafe_view", "abs", "alias", "amax", "amin", "arange", "as_strided", "cat", "clone", "constant_pad_nd",
    "copy_", "detach", "empty", "empty_like", "expand", "fill_", "full", "full_like", "gather", "index",
    "index_select", "lift_fresh", "max", "min", "neg", "ones", "ones_like", "permute", "relu", "reshape",
    "scalar_tensor", "scatter", "select", "sign", "slice", "split", "squeeze", "stack", "t", "transpose", "unbind",
    "unsqueeze", "view", "where", "zeros", "zeros_like",
))  # fmt: skip


class Rounds(TorchDispatchMode):
    """While it is entered, sees whether an operation rounds to float32 or less.

    Of a constant in float32 that is only widened nothing is rounded.

    Attributes:
      seen: whether one did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else PyTorch's compiler is imported, a second, to keep it away from here: nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation as it is."""
        result = func(*args, **(kwargs or {}))
        if any(v.dtype in SHORT for v in _pytree.tree_leaves(result) if isinstance(v, Tensor)):
            name = func.overloadpacket.__name__
            given = {v.dtype for v in _pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
            is_exact = name in EXACT or (name == "_to_copy" and torch.float64 not in given)
            self.seen = self.seen or not is_exact
        return result


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """For a while what a module makes inside its forward (a state of zeros, a mask) is of this dtype.

    So is, in float64, what PyTorch's own code has in float32 whatever it is given: the 1/6 of a hard sigmoid's
    derivative, which is off by 3e-8.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with exchanged({nn.functional.hardsigmoid: _hard_sigmoid} if dtype == torch.float64 else {}):
            yield
    finally:
        torch.set_default_dtype(before)


def _hard_sigmoid(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """PyTorch's, but that its derivative has 1/6 in the input's dtype."""

    @functools.wraps(original)
    def hard_sigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002  # as PyTorch calls it
        y = nn.functional.relu6(input + 3) / 6
        return input.copy_(y) if inplace else y

    return hard_sigmoid
