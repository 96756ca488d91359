"""A data set on the devices, as uint8, and batches of it. `torch_bn/device_data.py` is its twin."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from numpy.typing import NDArray

from image_data import ImageDataset, pixel_mean_and_std
from jax_bn.mesh import everywhere


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


def to_device(dataset: ImageDataset, mesh: Mesh | None = None) -> tuple[DeviceData, DeviceData]:
    """The training and the test set on every device (None: the default one), standardised by the training set."""
    mean, std = map(np.float32, pixel_mean_and_std(dataset.train_images))

    def put(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> DeviceData:
        return DeviceData(*everywhere((images, labels.astype(np.int32), mean, std), mesh))

    return put(dataset.train_images, dataset.train_labels), put(dataset.test_images, dataset.test_labels)
