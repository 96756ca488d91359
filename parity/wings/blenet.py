"""BLeNet in lockstep: the pair, its batches and its gauges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def blenets(seed: int) -> tuple[Any, Any]:
    """BLeNet in either wing, PyTorch's with initial weights of this seed."""
    import torch

    import jax_bn
    import torch_bn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch_bn.BLeNet(), jax_bn.BLeNet()


def batches(batch_size: int, steps: int, seed: int) -> Iterator[tuple[NDArray, NDArray]]:
    """That many batches of standardised images [N, 1, 28, 28] and labels, from the sample, in float64."""
    import image_data

    sample = image_data.load_sample()
    mean, std = image_data.pixel_mean_and_std(sample.train_images)
    done = epoch = 0
    while done < steps:
        for indices in image_data.epoch_batches(len(sample.train_labels), batch_size, seed=seed, epoch=epoch):
            if done == steps:
                return
            x = (sample.train_images[indices].astype(np.float64) - mean) / std
            yield x[:, None], sample.train_labels[indices].astype(np.int64)
            done += 1
        epoch += 1


# A bias before a batch norm is a gauge: it shifts the batch's mean and nothing else. Its true gradient is 0, and what
# the network does depends on bias - moving_mean only. PyTorch's name of the bias -> of the moving mean.
BLENET_GAUGES = {
    "conv.0.bias": "conv.1.moving_mean",
    "conv.4.bias": "conv.5.moving_mean",
    "fc.0.bias": "fc.1.moving_mean",
    "fc.3.bias": "fc.4.moving_mean",
}
