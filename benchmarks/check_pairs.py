"""The pairs of `benchmarks.check`: PyTorch's module, Flax's, and inputs in PyTorch's layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Pair = tuple[nn.Module, linen.Module, tuple[NDArray[Any], ...]]


class ReadmeNet(linen.Module):
    """The README's, with its mistake."""

    @linen.compact
    def __call__(self, x, train: bool):
        """[N, 8, 8, 3] -> [N, 10]."""
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Conv(8, (3, 3))(x))
        x = linen.max_pool(linen.gelu(x), (2, 2), (2, 2))
        return linen.Dense(10)(x.reshape(len(x), -1))


def _readme() -> Pair:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(128, 10)), ReadmeNet(), _images(8, 3, 8, 8)


UNET = (16, 32, 64, 128)


class UNet(nn.Module):
    """25 layers: 18 convolutions of which 3 are transposed, and 7 group norms; skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_double(a, b) for a, b in zip((3, *UNET), UNET, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in itertools.pairwise(UNET))
        self.join = nn.ModuleList(_double(2 * a, a) for a in UNET[:-1])
        self.head = nn.Conv2d(UNET[0], 2, 1)

    def forward(self, x):
        """[N, 3, H, W] -> [N, 2, H, W]."""
        skips = []
        for i, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for i in reversed(range(len(self.up))):
            x = self.join[i](torch.cat([self.up[i](x), skips[i]], 1))
        return self.head(x)


def _double(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1), nn.SiLU()
    )


class Double(linen.Module):
    """Two convolutions."""

    features: int

    @linen.compact
    def __call__(self, x):
        """[N, H, W, C] -> [N, H, W, features]."""
        x = linen.silu(linen.GroupNorm(num_groups=4, epsilon=1e-5)(linen.Conv(self.features, (3, 3))(x)))
        return linen.silu(linen.Conv(self.features, (3, 3))(x))


class LinenUNet(linen.Module):
    """Its twin."""

    def setup(self):
        """By the names that PyTorch's has."""
        self.down = [Double(b) for b in UNET]
        self.up = [linen.ConvTranspose(a, (2, 2), (2, 2), padding="VALID", transpose_kernel=True) for a in UNET[:-1]]
        self.join = [Double(a) for a in UNET[:-1]]
        self.head = linen.Conv(2, (1, 1))

    def __call__(self, x):
        """[N, H, W, 3] -> [N, H, W, 2]."""
        skips = []
        for i, block in enumerate(self.down):
            x = block(linen.max_pool(x, (2, 2), (2, 2)) if i else x)
            skips.append(x)
        for i in reversed(range(len(self.up))):
            x = self.join[i](jnp.concatenate([self.up[i](x), skips[i]], axis=-1))
        return self.head(x)


class Encoder(nn.Module):
    """A transformer of BERT-base's size: post-norm blocks of attention and two linear layers."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(layers))

    def forward(self, ids):
        """[N, L] -> [N, L, width]."""
        x = self.norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        return x


class EncoderBlock(nn.Module):
    """Attention, then two linear layers, each added and normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        """[N, L, width] -> [N, L, width]."""
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class LinenEncoder(linen.Module):
    """Its twin."""

    layers: int
    width: int
    heads: int
    vocabulary: int

    @linen.compact
    def __call__(self, ids):
        """[N, L] -> [N, L, width]."""
        x = linen.Embed(self.vocabulary, self.width, name="tokens")(ids)
        x = x + linen.Embed(512, self.width, name="positions")(jnp.arange(ids.shape[1]))[None]
        x = linen.LayerNorm(epsilon=1e-12, name="norm")(x)
        for i in range(self.layers):
            x = LinenEncoderBlock(self.heads, name=f"blocks_{i}")(x)
        return x


class LinenEncoderBlock(linen.Module):
    """Attention, then two linear layers, each added and normalised."""

    heads: int

    @linen.compact
    def __call__(self, x):
        """[N, L, width] -> [N, L, width]."""
        width = x.shape[-1]
        y = linen.MultiHeadDotProductAttention(self.heads, name="attention")(x, x)
        x = linen.LayerNorm(epsilon=1e-12, name="norm1")(x + y)
        y = linen.gelu(linen.Dense(4 * width, name="up")(x), approximate=False)
        return linen.LayerNorm(epsilon=1e-12, name="norm2")(x + linen.Dense(width, name="down")(y))


RESNET = ((3, 64), (4, 128), (6, 256), (3, 512))


class ResNet(nn.Module):
    """ResNet-50 (He et al., 2016, table 1), the stride in the 3x3 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        blocks, channels = [], 64
        for stage, (count, width) in enumerate(RESNET):
            for i in range(count):
                blocks.append(Bottleneck(channels, width, 2 if stage and not i else 1))
                channels = 4 * width
        self.blocks, self.fc = nn.ModuleList(blocks), nn.Linear(channels, 1000)

    def forward(self, x):
        """[N, 3, H, W] -> [N, 1000]."""
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, and a projection where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.projects = stride > 1 or channels != 4 * width
        if self.projects:
            self.conv4, self.bn4 = nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)

    def forward(self, x):
        """[N, C, H, W] -> [N, 4 width, H / stride, W / stride]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
        return torch.relu(y + (self.bn4(self.conv4(x)) if self.projects else x))


class LinenResNet(linen.Module):
    """Its twin."""

    @linen.compact
    def __call__(self, x, train: bool):
        """[N, H, W, 3] -> [N, 1000]."""
        x = linen.Conv(64, (7, 7), (2, 2), padding=3, use_bias=False, name="conv1")(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="bn1")(x))
        x = linen.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        number = 0
        for stage, (count, width) in enumerate(RESNET):
            for i in range(count):
                x = LinenBottleneck(width, 2 if stage and not i else 1, name=f"blocks_{number}")(x, train)
                number += 1
        return linen.Dense(1000, name="fc")(x.mean((1, 2)))


class LinenBottleneck(linen.Module):
    """1x1, 3x3, 1x1, and a projection where the shape changes."""

    width: int
    stride: int

    @linen.compact
    def __call__(self, x, train: bool):
        """[N, H, W, C] -> [N, H / stride, W / stride, 4 width]."""

        def layer(y, number, features, size, stride=1):
            y = linen.Conv(
                features, (size, size), (stride, stride), padding=size // 2, use_bias=False, name=f"conv{number}"
            )(y)
            return linen.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=f"bn{number}")(y)

        y = linen.relu(layer(x, 1, self.width, 1))
        y = layer(linen.relu(layer(y, 2, self.width, 3, self.stride)), 3, 4 * self.width, 1)
        if y.shape != x.shape:
            x = layer(x, 4, 4 * self.width, 1, self.stride)
        return linen.relu(x + y)


def _images(*shape: int) -> tuple[NDArray[Any], ...]:
    return (np.random.default_rng(0).normal(size=shape).astype(np.float32),)


def _encoder() -> Pair:
    layers, width, heads, vocabulary = 12, 768, 12, 30522
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, 64))
    return Encoder(layers, width, heads, vocabulary), LinenEncoder(layers, width, heads, vocabulary), (ids,)


PAIRS: dict[str, Callable[[], Pair]] = {
    "readme": _readme,
    "unet": lambda: (UNet(), LinenUNet(), _images(2, 3, 32, 32)),
    "transformer": _encoder,
    "resnet50": lambda: (ResNet(), LinenResNet(), _images(2, 3, 224, 224)),
}
