"""New networks of PyTorch's, one for each seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from parity.sides.seed import sown
from parity.sides.torch import layers
from parity.sides.torch.state import state_of, to_numpy


def new_module(factory: Callable[[], Any], seed: int) -> nn.Module:
    """What the factory makes with this seed, unwrapped.

    Raises:
      TypeError: it is no factory of modules.
    """
    allowed = "a function without arguments that makes a torch.nn.Module, or a class"
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(f"torch_factory is {type(factory).__name__}, which draws nothing anew; allowed: {allowed}")
    with sown(seed):
        module = factory()
    if not isinstance(module, nn.Module):
        raise TypeError(f"torch_factory makes {type(module).__name__}; allowed: {allowed}")
    return layers.unwrapped(module)[0]


def tensors_of(module: nn.Module) -> dict[str, NDArray[Any]]:
    """Its floating parameters and buffers by name."""
    state = {name: to_numpy(v) for name, v in state_of(module)[0].items() if v.is_floating_point()}
    return {name: np.asarray(a, np.float32) for name, a in state.items()}
