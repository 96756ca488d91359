"""The JAX wing: functional batch normalisation, its Flax module, BLeNet and its training. Never imports torch."""

from jax_bn import nnx
from jax_bn.batch_norm import BatchStats, batch_norm
from jax_bn.blenet import BLeNet
from jax_bn.layers import BatchNorm
from jax_bn.precise import precise_statistics, precise_statistics_nnx

__all__ = ["BLeNet", "BatchNorm", "BatchStats", "batch_norm", "nnx", "precise_statistics", "precise_statistics_nnx"]
