"""A small ResNet-18: four stages of two basic blocks, in PyTorch, linen and NNX; of two stages in the NNX pair."""

from __future__ import annotations

from typing import Any

import flax.linen as linen
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

import jax_bn
import jax_bn.nnx
from parity_tests.parity.zoo.pair import Pair, conv, images, linear, norm, rngs

WIDTHS = (8, 12, 16, 20)
PYTORCH = {"momentum": 0.9, "unbiased_moving_var": True}  # nn.BatchNorm2d's convention, in jax_bn's words


class BasicBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, widths=WIDTHS, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.inplanes = widths[0]
        for i, planes in enumerate(widths):
            setattr(self, f"layer{i + 1}", self._stage(planes, 1 if i == 0 else 2))
        self.stages = len(widths)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[-1], num_classes)

    def _stage(self, planes: int, stride: int) -> nn.Sequential:
        first = BasicBlock(self.inplanes, planes, stride)
        self.inplanes = planes
        return nn.Sequential(first, BasicBlock(planes, planes, 1))

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class LinenBlock(linen.Module):
    filters: int
    strides: int
    norm: Any

    @linen.compact
    def __call__(self, x):
        residual = x
        y = linen.Conv(self.filters, (3, 3), self.strides, padding=((1, 1), (1, 1)), use_bias=False)(x)
        y = linen.relu(self.norm()(y))
        y = linen.Conv(self.filters, (3, 3), padding=1, use_bias=False)(y)
        y = self.norm()(y)
        if residual.shape != y.shape:
            residual = linen.Conv(self.filters, (1, 1), self.strides, use_bias=False, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)
        return linen.relu(residual + y)


class LinenResNet(linen.Module):
    widths: tuple[int, ...] = WIDTHS
    num_classes: int = 10
    native: bool = False  # Flax's own batch norm, for prediction

    @linen.compact
    def __call__(self, x, train: bool = True):
        def norm(**kwargs):
            if self.native:
                return linen.BatchNorm(use_running_average=not train, momentum=0.9, **kwargs)
            return jax_bn.BatchNorm(use_running_average=not train, **PYTORCH, **kwargs)

        x = linen.Conv(self.widths[0], (3, 3), padding="SAME", use_bias=False, name="conv_init")(x)
        x = linen.relu(norm(name="bn_init")(x))
        for i, filters in enumerate(self.widths):
            for j in range(2):
                x = LinenBlock(filters, 2 if i > 0 and j == 0 else 1, norm)(x)
        return linen.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


class NnxBlock(nnx.Module):
    def __init__(self, cin: int, cout: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(cin, cout, (3, 3), stride, padding=1, use_bias=False, rngs=rngs)
        self.bn1 = jax_bn.nnx.BatchNorm(cout, **PYTORCH, rngs=rngs)
        self.conv2 = nnx.Conv(cout, cout, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn2 = jax_bn.nnx.BatchNorm(cout, **PYTORCH, rngs=rngs)
        if stride == 1 and cin == cout:
            self.shortcut = None
        else:
            self.shortcut = nnx.Sequential(
                nnx.Conv(cin, cout, (1, 1), stride, use_bias=False, rngs=rngs),
                jax_bn.nnx.BatchNorm(cout, **PYTORCH, rngs=rngs),
            )

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class NnxResNet(nnx.Module):
    def __init__(self, widths=WIDTHS, num_classes: int = 10, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, widths[0], (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.stem_norm = jax_bn.nnx.BatchNorm(widths[0], **PYTORCH, rngs=rngs)
        blocks, cin = [], widths[0]
        for i, cout in enumerate(widths):
            for j in range(2):
                blocks.append(NnxBlock(cin, cout, 2 if i > 0 and j == 0 else 1, rngs=rngs))
                cin = cout
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(cin, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


LINEN_TABLE = [("conv1", "conv_init", conv), ("bn1", "bn_init", norm), ("fc", "Dense_0", linear)]
NNX_TABLE = [("conv1", "stem", conv), ("bn1", "stem_norm", norm), ("fc", "head", linear)]
for _i in range(8):
    _block = f"layer{_i // 2 + 1}.{_i % 2}"
    for _layer, _linen in ("conv1", "Conv_0"), ("bn1", "BatchNorm_0"), ("conv2", "Conv_1"), ("bn2", "BatchNorm_1"):
        _kind = conv if "conv" in _layer else norm
        LINEN_TABLE.append((f"{_block}.{_layer}", f"LinenBlock_{_i}/{_linen}", _kind))
        NNX_TABLE.append((f"{_block}.{_layer}", f"blocks/{_i}/{_layer}", _kind))
    if _i in (2, 4, 6):
        LINEN_TABLE.append((f"{_block}.downsample.0", f"LinenBlock_{_i}/conv_proj", conv))
        LINEN_TABLE.append((f"{_block}.downsample.1", f"LinenBlock_{_i}/norm_proj", norm))
        NNX_TABLE.append((f"{_block}.downsample.0", f"blocks/{_i}/shortcut/layers/0", conv))
        NNX_TABLE.append((f"{_block}.downsample.1", f"blocks/{_i}/shortcut/layers/1", norm))

PAIRS = [
    Pair("resnet", ResNet, LinenResNet, images(3, 16), LINEN_TABLE),
    # Every kind of block is in its first two stages: a quarter of the time of four, which the linen pair has.
    Pair(
        "resnet-nnx",
        lambda: ResNet(WIDTHS[:2]),
        lambda: NnxResNet(WIDTHS[:2], rngs=rngs()),
        images(3, 16),
        [row for row in NNX_TABLE if not row[0].startswith(("layer3", "layer4"))],
    ),
    Pair("resnet-native", ResNet, lambda: LinenResNet(native=True), images(3, 16), LINEN_TABLE, modes=("eval",)),
]
