"""A batch spread over several devices: its statistics merged, and its sums. `torch_bn/devices.py` is its twin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import dtypes
from jax import Array, lax

from jax_bn.arrays import product
from jax_bn.channels import Channels


def num_shards(axis_name: str | tuple[str, ...] | None, groups: Sequence[Sequence[int]] | None) -> int:
    """Over how many devices the batch is spread."""
    return 1 if axis_name is None else len(groups[0]) if groups else lax.axis_size(axis_name)


def psum(values: Sequence[Array], channels: Channels) -> tuple[Array, ...]:
    """Sums over the devices, of values of one shape, in one collective."""
    if channels.axis_name is None:
        return tuple(values)
    groups = None if channels.groups is None else [list(group) for group in channels.groups]
    return tuple(lax.psum(jnp.stack(values), channels.axis_name, axis_index_groups=groups))


def is_shared(v: Array, x: Array, channels: Channels) -> bool:
    """Whether v is known to be the same on all devices over which x is spread: `jax.shard_map` says so in their types.

    Not where x is on more devices than its batch is: what they decide might differ, and with it their collectives.
    JAX only: PyTorch's processes say nothing of each other.
    """
    if channels.axis_name is None:
        return True
    names = {channels.axis_name} if isinstance(channels.axis_name, str) else set(channels.axis_name)
    return channels.groups is None and varying(x) == names and not names & varying(v)


def merge(
    num_values: Array, shift: Array, rest: Array, var: Array, channels: Channels
) -> tuple[Array, Array, Array, Array]:
    """Statistics of the whole batch from those of its pieces (Chan, Golub and LeVeque 1979), in one collective.

    A sum of rows that only their owner fills is an all-gather whose result every device is known to share; the rows
    of other groups stay empty, and weigh nothing.
    """
    size, mine = (
        lax.axis_size(channels.axis_name),
        (num_values.astype(shift.dtype), shift, rest, var.astype(shift.dtype)),
    )
    row = (lax.broadcasted_iota(np.int32, (size,), 0) == lax.axis_index(channels.axis_name)).astype(shift.dtype)
    counts, shifts, rests, variances = psum([jnp.tensordot(row, value, 0) for value in mine], channels)
    counts, variances = counts.real, variances.real
    total = counts.sum(0)
    weights = counts / jnp.maximum(total, 1)[None]
    # Around the shift of the largest piece: an empty one has nothing to say, and its 0 may be far away.
    shift = jnp.take_along_axis(shifts, counts.argmax(0)[None], 0)[0]
    offsets = (shifts - shift[None]) + rests
    rest = (weights.astype(shift.dtype) * offsets).sum(0)
    apart = offsets - rest[None]
    return total, shift, rest, (weights * (variances + product(apart, apart))).sum(0)


def send(v: Array, x: Array) -> Array:
    """v, the same on every device, as each device's own where x is spread over them: so its gradient is their sum.

    On a CPU that is a sum in the devices' order: those of one process are added up in another order than processes are,
    which in four terms is seen in the last bit. There each device's term is a row, and the collective, which only puts
    the rows together, cannot round. Elsewhere, where this would be too much to send, the collective adds.
    JAX only: in PyTorch `DistributedDataParallel` sums gradients.
    """
    axes = tuple(sorted(varying(x) - varying(v)))
    if not axes:
        return v

    def own_row(v: Array) -> Array:
        rows = lax.pcast(jnp.broadcast_to(v, (lax.axis_size(axes), *v.shape)), axes, to="varying")
        return lax.dynamic_index_in_dim(rows, lax.axis_index(axes), keepdims=False)

    return lax.platform_dependent(v, cpu=own_row, default=lambda v: lax.pcast(v, axes, to="varying"))


def promote_dtype(x: Array, *params: Array | None, dtype: Any, inexact: bool = True) -> list[Any]:
    """Flax's, for layers whose x is spread over devices and whose parameters are not: these are sent to them first.

    There JAX sums their gradient over the devices: so it adds what dtype's rounding has left in float32, not in dtype.
    JAX only: in PyTorch `DistributedDataParallel` sums them.
    """
    sent = [None if v is None else send(v, x) for v in params]
    return dtypes.promote_dtype(x, *sent, dtype=dtype, inexact=inexact)


def varying(x: Array) -> frozenset[str]:
    """The mapped axes along which x differs from device to device, as `jax.shard_map` keeps track of them.

    JAX only.
    """
    return jax.typeof(x).manual_axis_type.varying
