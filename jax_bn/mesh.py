"""A training step over several devices: which they are, what lies where, and how a batch is spread over them.

JAX only: in PyTorch each device has a process of its own.

Every device holds all parameters, statistics, the optimiser's state and the data set, and takes its share of each
batch. The step is one program under `jax.shard_map`, in which batch norm merges the statistics of the shares and the
gradients are summed: a collective forward and one backward for each batch norm, and one for all gradients. `jax.jit`
of the plain step on sharded batches would be right too, but finds two to three times as many.

On one device nothing here makes a difference: the step is the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from bn_common.checks import require
from bn_common.config import Config

AXIS = "batch"
"""The name of the mesh's axis, over whose devices a batch is spread."""

SAME, SHARE = PartitionSpec(), PartitionSpec(AXIS)
"""What is the same on every device, and what each has its share of (along the first axis)."""


def make_mesh(config: Config) -> Mesh:
    """The devices that the config asks for: the first there are, or all.

    Raises:
      ValueError: there are not so many, or the batch is too small for them.
    """
    devices = jax.devices()
    count = len(devices) if config.devices is None else config.devices
    require(
        count <= len(devices), "--devices", count, f"1 to {len(devices)}, the {devices[0].platform} devices there are"
    )
    joined = config.coordinator is not None or jax.process_count() == 1
    require(joined, "--coordinator", None, f"auto: this is one of {jax.process_count()} processes")
    together = jax.process_count() == 1 or count == len(devices)
    require(together, "--devices", count, f"{len(devices)}, all that the processes have")
    config.check_shares(count)
    return Mesh(np.asarray(devices[:count]), (AXIS,), axis_types=(AxisType.Auto,))


def axis_of(mesh: Mesh) -> str | None:
    """The axis to name in collectives; None of one device, which has none."""
    return AXIS if mesh.size > 1 else None


def on_mesh(
    function: Callable[..., Any], mesh: Mesh, arguments: tuple[Any, ...], results: Any = SAME, **jit: Any
) -> Any:
    """`jax.jit` of a function that each device runs on its shares.

    Args:
      function: names `axis_of(mesh)` where the devices have to agree.
      mesh: the devices.
      arguments: SAME or SHARE for each of the function's arguments, or a tree of these.
      results: the same of what it returns.
      jit: options of `jax.jit`.
    """
    if mesh.size == 1:
        return jax.jit(function, **jit)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=arguments, out_specs=results)
    given, found = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (arguments, results))
    return jax.jit(mapped, in_shardings=given, out_shardings=found, **jit)


def everywhere(values: Any, mesh: Mesh | None) -> Any:
    """A tree of arrays, whole on every device (None: on the default one)."""
    if mesh is None or mesh.size == 1:
        return jax.tree.map(jnp.asarray, values)
    sharding = NamedSharding(mesh, SAME)
    if jax.process_count() == 1:
        return jax.device_put(values, sharding)
    return jax.tree.map(lambda v: jax.make_array_from_process_local_data(sharding, np.asarray(v), np.shape(v)), values)


def spread(values: Any, mesh: Mesh) -> Any:
    """A tree of numpy arrays, the whole of which each process has, with their first axes over the devices."""
    if jax.process_count() == 1:
        return values  # `on_mesh` has told jax.jit how to spread them
    sharding = NamedSharding(mesh, SHARE)

    def own(v: NDArray) -> Array:
        places = sharding.addressable_devices_indices_map(v.shape).values()
        rows = sorted({place[0].indices(len(v))[:2] for place in places if place is not None})
        return jax.make_array_from_process_local_data(sharding, np.concatenate([v[a:b] for a, b in rows]), v.shape)

    return jax.tree.map(own, values)


def shares(batch: NDArray[np.int32], mesh: Mesh) -> tuple[NDArray[np.int32], NDArray[np.bool_] | None]:
    """A batch as the devices take it, one share behind the other, and which of its examples count (None: all).

    Shares that differ in size, by one, are filled up with a last example that does not count.

    Args:
      batch: indices [..., B].
      mesh: the devices.

    Returns:
      indices [..., mesh.size * size], and bool [mesh.size * size].
    """
    if batch.shape[-1] % mesh.size == 0:
        return batch, None
    parts = np.array_split(batch, mesh.size, axis=-1)
    size = max(part.shape[-1] for part in parts)
    counts = np.concatenate([np.arange(size) < part.shape[-1] for part in parts])
    # Of a share without an example, the batch's first.
    filler = batch[..., :1]
    filled = [part if part.shape[-1] == size else np.concatenate([part, filler], -1) for part in parts]
    return np.concatenate(filled, -1), counts


def in_turn(batches: NDArray[np.int32], mesh: Mesh) -> NDArray[np.int32]:
    """Batches [steps, B] as `shares` of [steps * size]: all that the first device takes, step by step, and so on."""
    shared, _ = shares(batches, mesh)
    return shared.reshape(len(shared), mesh.size, -1).swapaxes(0, 1).reshape(-1)


def of_first(values: Any, axis_name: str) -> Any:
    """What the first device of the axis has, for all of them."""
    first = lax.axis_index(axis_name) == 0
    return lax.psum(jax.tree.map(lambda v: jnp.where(first, v, jnp.zeros_like(v)), values), axis_name)


def add_up(values: Any, axis_name: str | None) -> Any:
    """Sums of a few numbers [] over the devices of the axis, in their order: see `devices.send`."""
    if axis_name is None:
        return values
    mine = lax.broadcasted_iota(np.int32, (lax.axis_size(axis_name),), 0) == lax.axis_index(axis_name)
    rows = jax.tree.map(lambda v: jnp.where(mine, v[None], jnp.zeros_like(v)[None]), values)
    return jax.tree.map(lambda v: v.sum(0), lax.psum(rows, axis_name))


def mean_over_devices(values: Array, mask: Array | None, axis_name: str | None) -> Array:
    """Mean of values [B], of those in mask only, over all devices of the axis."""
    if mask is None:
        return values.mean() if axis_name is None else lax.pmean(values.mean(), axis_name)
    total, count = jnp.where(mask, values, jnp.zeros_like(values)).sum(), mask.astype(values.dtype).sum()
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return total / count
