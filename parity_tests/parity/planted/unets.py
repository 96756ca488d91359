"""A small U-Net, and mistakes with its images: joined in another order, shuffled, resized or padded otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from parity_tests.parity.planted.chain import Case, images, planted

SIZE = 12
FLAX_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class How(NamedTuple):
    """How one side is written.

    Attributes:
      skip_first: whether the skip is joined before what comes from below.
      groups: of a channel shuffle in front of the second convolution; 1: none.
      down: "average", "bilinear" or "antialiased".
      up: "bilinear", "nearest" or "corners" (bilinear, corners aligned).
      pad: PyTorch's name of a mode; in front of the inner convolution.
    """

    skip_first: bool = False
    groups: int = 1
    down: str = "average"
    up: str = "bilinear"
    pad: str = "constant"


def corners(size: int, outputs: int) -> np.ndarray:
    """[outputs, size]."""
    at = np.linspace(0, size - 1, outputs)
    return np.stack([np.interp(at, np.arange(size), row) for row in np.eye(size)], axis=1)


class TorchUNet(nn.Module):
    def __init__(self, how: How, right: How) -> None:
        super().__init__()
        self.how, self.right = how, right
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 6, 3)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 10, 3, padding=1)
        self.conv4 = nn.Conv2d(18, 8, 3, padding=1)
        self.conv5 = nn.Conv2d(14, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def up(self, x, size: int, how: str):
        mode = "nearest" if how == "nearest" else "bilinear"
        return F.interpolate(x, (size, size), mode=mode, align_corners={"corners": True, "bilinear": False}.get(how))

    def down(self, x):
        if self.how.down == "average":
            return F.avg_pool2d(x, 2)
        antialias = self.how.down == "antialiased"
        return F.interpolate(x, (x.shape[2] // 2,) * 2, mode="bilinear", align_corners=False, antialias=antialias)

    def joined(self, below, skip, how: How):
        return torch.cat([skip, below] if how.skip_first else [below, skip], 1)

    def padded(self, x):
        return F.pad(x, (1, 1, 1, 1), mode=self.how.pad)

    def shuffled(self, x):
        n, c, h, w = x.shape
        return x.reshape(n, self.how.groups, c // self.how.groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    def forward(self, x):
        first = torch.tanh(self.inner(self.padded(torch.tanh(self.conv1(x)))))
        second = torch.tanh(self.conv2(self.shuffled(self.down(first))))
        third = torch.tanh(self.conv3(F.avg_pool2d(second, 2)))
        y = torch.tanh(self.conv4(self.joined(self.up(third, SIZE // 2, self.how.up), second, self.how)))
        y = torch.tanh(self.conv5(self.joined(self.up(y, SIZE, self.right.up), first, self.right)))
        return self.head(y)


class LinenUNet(linen.Module):
    how: How
    right: How

    def up(self, x, size: int, how: str):
        if how == "corners":
            matrix = jnp.asarray(corners(x.shape[1], size), x.dtype)
            return jnp.einsum("ih,jw,nhwc->nijc", matrix, matrix, x)
        return jax.image.resize(x, (len(x), size, size, x.shape[-1]), how)

    def down(self, x):
        if self.how.down == "average":
            return linen.avg_pool(x, (2, 2), (2, 2))
        shape = (len(x), x.shape[1] // 2, x.shape[2] // 2, x.shape[-1])
        return jax.image.resize(x, shape, "bilinear", antialias=self.how.down == "antialiased")

    def joined(self, below, skip, how: How):
        return jnp.concatenate([skip, below] if how.skip_first else [below, skip], -1)

    def padded(self, x):
        return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=FLAX_MODES[self.how.pad])

    def shuffled(self, x):
        groups = self.how.groups
        return x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)

    @linen.compact
    def __call__(self, x):
        def conv(name: str, width: int, padding: str = "SAME"):
            return linen.Conv(width, (1, 1) if name == "head" else (3, 3), padding=padding, name=name)

        first = jnp.tanh(conv("inner", 6, "VALID")(self.padded(jnp.tanh(conv("conv1", 6)(x)))))
        second = jnp.tanh(conv("conv2", 8)(self.shuffled(self.down(first))))
        third = jnp.tanh(conv("conv3", 10)(linen.avg_pool(second, (2, 2), (2, 2))))
        y = jnp.tanh(conv("conv4", 8)(self.joined(self.up(third, SIZE // 2, self.how.up), second, self.how)))
        y = jnp.tanh(conv("conv5", 6)(self.joined(self.up(y, SIZE, self.right.up), first, self.right)))
        return conv("head", 2)(y)


class TorchOne(TorchUNet):
    """One step of it: a convolution, what is done with its image, and another."""

    def __init__(self, how: How, step: str) -> None:
        nn.Module.__init__(self)
        self.how, self.step = how, step
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(9 if step == "joined" else 6, 4, 3)

    def forward(self, x):
        y = self.conv1(x)
        if self.step == "joined":
            return self.conv2(self.joined(y, x, self.how))
        return self.conv2(self.up(y, 17, self.how.up) if self.step == "up" else getattr(self, self.step)(y))


class LinenOne(LinenUNet):
    """The same."""

    step: str = ""

    @linen.compact
    def __call__(self, x):
        y = linen.Conv(6, (3, 3), name="conv1")(x)
        if self.step == "joined":
            y = self.joined(y, x, self.how)
        else:
            y = self.up(y, 17, self.how.up) if self.step == "up" else getattr(self, self.step)(y)
        return linen.Conv(4, (3, 3), padding="VALID", name="conv2")(y)


def made(depth: str, wing: str, right: How, wrong: How, step: str):
    """The pair, of which this wing is wrong."""

    def make():
        torch.manual_seed(0)
        first, second = (wrong, right) if wing == "torch" else (right, wrong)
        if depth == "deep":
            return planted(TorchUNet(first, right), LinenUNet(second, right), images(), train=True)
        return planted(TorchOne(first, step), LinenOne(second, right, step=step), images(), train=True)

    return make


# code, variant, what is right, what is wrong, the step, whom to charge in the U-Net
WRONG = [
    ("concat-order", "skip", How(), How(skip_first=True), "joined", "conv4"),
    ("concat-order", "shuffle", How(groups=2), How(groups=3), "shuffled", "conv2"),
    ("resize", "nearest", How(), How(up="nearest"), "up", "conv4"),
    ("resize", "corners", How(), How(up="corners"), "up", "conv4"),
    ("resize", "antialiased", How(down="bilinear"), How(down="antialiased"), "down", "conv2"),
    ("pad-mode", "reflect", How(), How(pad="reflect"), "padded", "inner"),
    ("pad-mode", "replicate", How(pad="reflect"), How(pad="replicate"), "padded", "inner"),
]


def cases() -> Iterator[Case]:
    """Every case."""
    for code, variant, right, wrong, step, layer in WRONG:
        for wing in "torch", "flax":
            for depth in "alone", "deep":
                where = ("conv2",) if depth == "alone" else (layer,)
                yield Case(code, wing, depth, variant, made(depth, wing, right, wrong, step), where)
