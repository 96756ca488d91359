"""The JAX wing: functional batch normalisation, its Flax module, BLeNet and its training. Never imports torch."""

from jax_bn.batch_norm import BatchStats, batch_norm
from jax_bn.blenet import BLeNet
from jax_bn.layers import BatchNorm

__all__ = ["BLeNet", "BatchNorm", "BatchStats", "batch_norm"]
