"""A data set on the device, as uint8, and batches of it. `jax_bn/device_data.py` is its twin."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from image_data import ImageDataset, pixel_mean_and_std


class DeviceData(NamedTuple):
    """A data set on the device.

    Attributes:
      images: uint8 [N, H, W].
      labels: int64 [N].
      mean, std: float32 [], of the training set's pixels (one channel is one feature).
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised images float32 [B, 1, H, W] and labels int64 [B]."""
        x = (self.images[indices].to(torch.float32) - self.mean) / self.std
        return x[:, None], self.labels[indices]

    def permuted(self, order: Tensor) -> DeviceData:
        """The same data in another order, int [N]."""
        return self._replace(images=self.images[order], labels=self.labels[order])

    def slice(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """The batch that `batch` gives of the indices from step * size on, `size` of them."""
        images, labels = (v[step * size : (step + 1) * size] for v in (self.images, self.labels))
        x = (images.to(torch.float32) - self.mean) / self.std
        return x[:, None], labels


def to_device(dataset: ImageDataset, device: torch.device) -> tuple[DeviceData, DeviceData]:
    """The training and the test set on the device, both standardised by the training set."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in pixel_mean_and_std(dataset.train_images))

    def put(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> DeviceData:
        return DeviceData(
            torch.from_numpy(images).to(device), torch.from_numpy(labels.astype(np.int64)).to(device), mean, std
        )

    return put(dataset.train_images, dataset.train_labels), put(dataset.test_images, dataset.test_labels)
