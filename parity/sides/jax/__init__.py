"""Flax's side of the bridge. Never imports torch."""

from bn_common.installed import needed_by

with needed_by("Flax's side of the bridge"):
    from parity.sides.jax.ask import answers, check_transform, is_float32_inside
    from parity.sides.jax.constants import constants
    from parity.sides.jax.layers import layers_of, structure
    from parity.sides.jax.linen import LinenSide
    from parity.sides.jax.module import Side, default_loss, environment, flat, forget, lifted, nested, versions
    from parity.sides.jax.nnx import NnxSide, flat_variables, nnx_state
    from parity.sides.jax.record import record
    from parity.sides.jax.side import own_variables, side_of
    from parity.sides.jax.train import flax_steps

__all__ = [
    "LinenSide",
    "NnxSide",
    "Side",
    "answers",
    "check_transform",
    "constants",
    "default_loss",
    "environment",
    "flat",
    "flat_variables",
    "flax_steps",
    "forget",
    "is_float32_inside",
    "layers_of",
    "lifted",
    "nested",
    "nnx_state",
    "own_variables",
    "record",
    "side_of",
    "structure",
    "versions",
]
