"""PyTorch's side of the bridge. Never imports jax."""

from parity.sides.torch.module import (
    COUNTER,
    floating,
    has_dropout,
    lifted,
    loss_of,
    numpy,
    projections,
    without_dropout,
)
from parity.sides.torch.record import default_dtype, layers_of, record

__all__ = [
    "COUNTER",
    "default_dtype",
    "floating",
    "has_dropout",
    "layers_of",
    "lifted",
    "loss_of",
    "numpy",
    "projections",
    "record",
    "without_dropout",
]
