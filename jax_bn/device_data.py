"""A data set on the devices, as uint8, and batches of it. `torch_bn/device_data.py` is its twin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from numpy.typing import NDArray

from bn_common.config import Config
from image_data import ImageDataset, epoch_batches, pixel_mean_and_std, steps_per_epoch
from jax_bn.mesh import SAME, SHARE, everywhere, in_turn, on_mesh, shares, spread


class DeviceData(NamedTuple):
    """A data set on the device.

    Attributes:
      images: uint8 [N, H, W].
      labels: int32 [N].
      mean, std: float32 [], of the training set's pixels (one channel is one feature).
    """

    images: Array
    labels: Array
    mean: Array
    std: Array

    def batch(self, indices: Array) -> tuple[Array, Array]:
        """Standardised images float32 [B, H, W, 1] and labels int32 [B]."""
        # Read row by row first: fused into what follows, in another layout, each pixel would be fetched by itself.
        # All indices are valid; without "clip" each pixel would be asked for that.
        images = lax.optimization_barrier(self.images.at[indices].get(mode="clip"))
        x = (images.astype(jnp.float32) - self.mean) / self.std
        return x[..., None], self.labels[indices]

    def permuted(self, order: Array) -> DeviceData:
        """The same data in another order, int32 [N]."""
        return self._replace(images=self.images.at[order].get(mode="clip"), labels=self.labels[order])

    def slice(self, step: Array, size: int) -> tuple[Array, Array]:
        """The batch that `batch` gives of the indices from step * size on, `size` of them."""
        images, labels = (lax.dynamic_slice_in_dim(v, step * size, size) for v in (self.images, self.labels))
        x = (images.astype(jnp.float32) - self.mean) / self.std
        return x[..., None], labels


class Batch(NamedTuple):
    """A batch as a step is given it.

    Attributes:
      data: where its images lie.
      where: their indices there, int32 [B]; or, of data in the epoch's order, the number of the slice, int32 [].
      mask: bool [B], which of them count; None: all. JAX only, as all of it is: PyTorch's step is given images.
    """

    data: DeviceData
    where: Array | np.int32
    mask: Array | None


class Batches:
    """The training set's batches, epoch by epoch, of each of which every device has its share.

    Args:
      data: the training set.
      config: says how large a batch is, and what the order of each epoch comes of.
      mesh: the devices.
      gathers: whether a step fetches its images from all over the data set. Else that is put in order once an epoch,
        and a step has a slice.

    Attributes:
      steps: in an epoch.
      specs: where the parts of a `Batch` lie, see `on_mesh`.
    """

    def __init__(self, data: DeviceData, config: Config, mesh: Mesh, *, gathers: bool) -> None:
        self.data, self.config, self.mesh, self.gathers = data, config, mesh, gathers
        self.steps = steps_per_epoch(len(data.labels), config.batch_size)
        first, mask = shares(np.arange(config.batch_size, dtype=np.int32), mesh)
        self.share, self.mask = len(first) // mesh.size, None if mask is None else spread(mask, mesh)
        in_order = DeviceData._make((SHARE, SHARE, SAME, SAME))
        self.specs = Batch._make((SAME, SHARE, SHARE) if gathers else (in_order, SAME, SHARE))
        self.permuted = on_mesh(DeviceData.permuted, mesh, (SAME, SHARE), in_order)

    def order(self, epoch: int) -> list[NDArray[np.int32]]:
        """The indices of every batch of an epoch (from 0), each [batch size]."""
        seed, batch_size = self.config.seed, self.config.batch_size
        return list(epoch_batches(len(self.data.labels), batch_size, seed=seed, epoch=epoch))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """An epoch's batches, from that step on."""
        order = self.order(epoch)
        if self.gathers:
            for indices in order[first_step:]:
                yield Batch(self.data, spread(shares(indices, self.mesh)[0], self.mesh), self.mask)
            return
        data = self.permuted(self.data, spread(in_turn(np.stack(order), self.mesh), self.mesh))
        for where in np.arange(first_step, self.steps, dtype=np.int32):
            yield Batch(data, where, self.mask)

    def read(self, batch: Batch) -> tuple[Array, Array]:
        """Within a step: the images and labels of this device's share, as `DeviceData.batch` has them."""
        where = jnp.asarray(batch.where)
        return batch.data.batch(where) if self.gathers else batch.data.slice(where, self.share)

    def images(self, dataset: ImageDataset, epoch: int, step: int) -> NDArray[np.float32]:
        """The whole batch of that step, as its images are in the data set that `data` was made of, standardised."""
        mean, std = map(np.float32, pixel_mean_and_std(dataset.train_images))
        return ((dataset.train_images[self.order(epoch)[step]].astype(np.float32) - mean) / std)[..., None]


def to_device(dataset: ImageDataset, mesh: Mesh | None = None) -> tuple[DeviceData, DeviceData]:
    """The training and the test set on every device (None: the default one), standardised by the training set."""
    mean, std = map(np.float32, pixel_mean_and_std(dataset.train_images))

    def put(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> DeviceData:
        return DeviceData(*everywhere((images, labels.astype(np.int32), mean, std), mesh))

    return put(dataset.train_images, dataset.train_labels), put(dataset.test_images, dataset.test_labels)
