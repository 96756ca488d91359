"""What every peer of the training step is given, and what it gives back: weights, batches, a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from image_data import load_sample, pixel_mean_and_std

LEARNING_RATE, MOMENTUM, EPSILON = 1e-3, 0.9, 1e-5
"""Of Adam; of the moving statistics, the weight of the old value; of batch norm."""
NUM_CLASS, SAMPLE_SIZE = 10, 28
RESIDENT_BATCHES, RESIDENT_PIXELS = 10, 10 * 256 * 28 * 28


class Affine(NamedTuple):
    """A convolution, weight [out, in, 5, 5], or a linear layer, weight [out, in]; bias [out]."""

    weight: NDArray
    bias: NDArray


class Norm(NamedTuple):
    """A batch norm, each [C]."""

    gamma: NDArray
    beta: NDArray
    mean: NDArray
    var: NDArray


class Weights(NamedTuple):
    """BLeNet's, float32, in PyTorch's layout; linear3 takes the images flattened as [C, H, W]."""

    conv1: Affine
    norm1: Norm
    conv2: Affine
    norm2: Norm
    linear3: Affine
    norm3: Norm
    linear4: Affine
    norm4: Norm
    linear5: Affine


def draw_weights(fig_size: int, seed: int = 0) -> Weights:
    """The same in every process. No number is one that a library begins with by itself: each has to be carried over."""
    rng, f = np.random.default_rng(seed), pooled_size(fig_size)

    def affine(*shape: int) -> Affine:
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return Affine(*(rng.uniform(-bound, bound, s).astype(np.float32) for s in (shape, shape[:1])))

    def norm(c: int) -> Norm:
        drawn = rng.uniform(0.5, 1.5, c), rng.normal(0, 0.1, c), rng.normal(0, 0.1, c), rng.uniform(0.5, 1.5, c)
        return Norm(*(v.astype(np.float32) for v in drawn))

    return Weights(
        conv1=affine(6, 1, 5, 5),
        norm1=norm(6),
        conv2=affine(16, 6, 5, 5),
        norm2=norm(16),
        linear3=affine(120, 16 * f * f),
        norm3=norm(120),
        linear4=affine(84, 120),
        norm4=norm(84),
        linear5=affine(NUM_CLASS, 84),
    )


def pooled_size(fig_size: int) -> int:
    """Height and width of what is flattened."""
    return (fig_size // 2 - 4) // 2


def channels_last(weights: Weights) -> Weights:
    """Kernels [5, 5, in, out] and [in, out], with linear3 behind images flattened as [H, W, C]."""
    changed: dict[str, Any] = {}
    for name, layer in weights._asdict().items():
        if isinstance(layer, Affine):
            weight = layer.weight
            if name == "linear3":
                f = math.isqrt(weight.shape[1] // 16)
                weight = weight.reshape(-1, 16, f, f).transpose(0, 2, 3, 1).reshape(weight.shape)
            kernel = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
            changed[name] = Affine(np.ascontiguousarray(kernel), layer.bias)
    return weights._replace(**changed)


def linen_variables(weights: Weights) -> dict[str, Any]:
    """What a linen module with these layers in this order calls them."""
    params: dict[str, Any] = {}
    batch_stats: dict[str, Any] = {}
    names = "Conv_0", "BatchNorm_0", "Conv_1", "BatchNorm_1", "Dense_0", "BatchNorm_2", "Dense_1", "BatchNorm_3"
    layers: tuple[Affine | Norm, ...] = channels_last(weights)
    for name, layer in zip((*names, "Dense_2"), layers, strict=True):
        if isinstance(layer, Norm):
            params[name] = {"scale": layer.gamma, "bias": layer.beta}
            batch_stats[name] = {"mean": layer.mean, "var": layer.var}
        else:
            params[name] = {"kernel": layer.weight, "bias": layer.bias}
    return {"params": params, "batch_stats": batch_stats}


class Batch(NamedTuple):
    """Standardised images float32 [B, H, W] of one channel, and labels int32 [B]."""

    x: NDArray
    labels: NDArray


class Data(NamedTuple):
    """A data set, and the indices of some batches of it.

    Attributes:
      images: uint8 [N, H, W].
      labels: int32 [N].
      mean, std: of the pixels.
      indices: int32 [number of batches, B].
    """

    images: NDArray
    labels: NDArray
    mean: float
    std: float
    indices: NDArray

    def batches(self) -> list[Batch]:
        """Ready to be placed on a device."""
        pixels = (self.images.astype(np.float32) - np.float32(self.mean)) / np.float32(self.std)
        return [Batch(pixels[i], self.labels[i]) for i in self.indices]


def load_data(batch_size: int, fig_size: int) -> Data:
    """The sample of Fashion-MNIST, its pixels repeated for larger images, and ten batches (fewer of large ones)."""
    count = max(2, min(RESIDENT_BATCHES, RESIDENT_PIXELS // (batch_size * fig_size**2)))
    sample, times = load_sample(), fig_size // SAMPLE_SIZE
    keep = slice(None if times == 1 else count * batch_size)
    mean, std = pixel_mean_and_std(sample.train_images)
    images = sample.train_images[keep].repeat(times, 1).repeat(times, 2)
    indices = np.random.default_rng(1).integers(0, len(images), (count, batch_size), np.int32)
    return Data(images, sample.train_labels[keep].astype(np.int32), float(mean), float(std), indices)


class Network(NamedTuple):
    """A peer's network with Adam, as functions that hide where it keeps its state; one is either trained or predicts.

    Attributes:
      place: the batches, on the device, as `train_step` and `predict` take them, one after the other.
      train_step: a step on what `place` has given; returns before it is finished where the library does. What `place`
        puts together into one is trained on in one call.
      losses: waits for what `train_step` has returned, and reads the loss before each step.
      predict: logits of a batch, likewise; None if there is nothing of its own to measure.
      wait: until what either has returned is there.
    """

    place: Callable[[Data], Sequence[Any]]
    train_step: Callable[[Any], Any]
    losses: Callable[[Any], list[float]]
    predict: Callable[[Any], Any] | None
    wait: Callable[[Any], object]
