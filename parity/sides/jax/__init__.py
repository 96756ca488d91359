"""Flax's side of the bridge. Never imports torch."""

from parity.sides.jax.layers import layers_of, structure
from parity.sides.jax.linen import LinenSide
from parity.sides.jax.module import Side, environment, flat, is_dropout, lifted
from parity.sides.jax.nnx import NnxSide, nnx_state
from parity.sides.jax.record import record
from parity.sides.jax.side import side_of

__all__ = [
    "LinenSide",
    "NnxSide",
    "Side",
    "environment",
    "flat",
    "is_dropout",
    "layers_of",
    "lifted",
    "nnx_state",
    "record",
    "side_of",
    "structure",
]
