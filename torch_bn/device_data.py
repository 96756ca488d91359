"""A data set on the device, as uint8, and batches of it. `jax_bn/device_data.py` is its twin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from bn_common.config import Config
from image_data import ImageDataset, epoch_batches, pixel_mean_and_std, steps_per_epoch


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


class Batches:
    """The training set's batches, epoch by epoch, of each of which every process has its share.

    Args:
      data: the training set.
      config: says how large a batch is, and what the order of each epoch comes of.
      gathers: whether a step fetches its images from all over the data set. Else that is put in order once an epoch,
        and a step has a slice.

    Attributes:
      steps: in an epoch.
      share: this process's examples of a batch by an average process's.
    """

    def __init__(self, data: DeviceData, config: Config, *, gathers: bool) -> None:
        self.data, self.config, self.gathers = data, config, gathers
        self.steps = steps_per_epoch(len(data.labels), config.batch_size)
        self.processes, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.size = len(np.array_split(np.arange(config.batch_size), self.processes)[self.rank])
        self.share = self.size * self.processes / config.batch_size

    def order(self, epoch: int) -> list[NDArray[np.int32]]:
        """The indices of this process's share of every batch of an epoch (from 0)."""
        seed, batch_size = self.config.seed, self.config.batch_size
        batches = epoch_batches(len(self.data.labels), batch_size, seed=seed, epoch=epoch)
        return [np.array_split(batch, self.processes)[self.rank] for batch in batches]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels of an epoch's batches, from that step on, as `DeviceData.batch` has them."""
        order = self.order(epoch)
        if self.gathers:
            for indices in order[first_step:]:
                yield self.data.batch(torch.from_numpy(indices))
            return
        data = self.data.permuted(torch.from_numpy(np.concatenate(order)).to(self.data.images.device))
        for step in range(first_step, self.steps):
            yield data.slice(step, self.size)


def to_device(dataset: ImageDataset, device: torch.device) -> tuple[DeviceData, DeviceData]:
    """The training and the test set on the device, both standardised by the training set."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in pixel_mean_and_std(dataset.train_images))

    def put(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> DeviceData:
        return DeviceData(
            torch.from_numpy(images).to(device), torch.from_numpy(labels.astype(np.int64)).to(device), mean, std
        )

    return put(dataset.train_images, dataset.train_labels), put(dataset.test_images, dataset.test_labels)
