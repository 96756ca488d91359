"""The JAX wing: functional batch normalisation, its Flax module, BLeNet and its training. Never imports torch."""

import importlib
from typing import TYPE_CHECKING, Any

from jax_bn.batch_norm import BatchStats, batch_norm
from jax_bn.blenet import BLeNet
from jax_bn.layers import BatchNorm

if TYPE_CHECKING:
    from jax_bn import nnx
    from jax_bn.precise import precise_statistics, precise_statistics_nnx

__all__ = ["BLeNet", "BatchNorm", "BatchStats", "batch_norm", "nnx", "precise_statistics", "precise_statistics_nnx"]

if not TYPE_CHECKING:  # a name that is not there is an error for type checkers too

    def __getattr__(name: str) -> Any:
        # When they are asked for: they import Flax NNX, a sixth of what a start of train_jax.py takes to import.
        if name == "nnx":
            return importlib.import_module("jax_bn.nnx")
        if name in ("precise_statistics", "precise_statistics_nnx"):
            return getattr(importlib.import_module("jax_bn.precise"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
