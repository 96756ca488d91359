"""A perceptron with batch norm, a small VGG with dropout, BLeNet, and the frameworks' batch norms as they are."""

from __future__ import annotations

import itertools

import flax.linen as linen
from flax import nnx
from torch import nn

import jax_bn
import jax_bn.nnx
import torch_bn
from parity_tests.parity.zoo.pair import Pair, behind_flatten, conv, features, images, linear, norm, rngs

PYTORCH = {"momentum": 0.9, "unbiased_moving_var": True}


class Mlp(nn.Module):
    def __init__(self, sizes=(12, 32, 32, 5)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for cin, cout in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(cin, cout, bias=False), nn.BatchNorm1d(cout), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))

    def forward(self, x):
        return self.net(x)


class LinenMlp(linen.Module):
    hidden: tuple[int, ...] = (32, 32)
    classes: int = 5

    @linen.compact
    def __call__(self, x, training: bool):
        for width in self.hidden:
            x = linen.Dense(width, use_bias=False)(x)
            x = linen.relu(jax_bn.BatchNorm(use_running_average=not training, **PYTORCH)(x))
        return linen.Dense(self.classes)(x)


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear1 = nnx.Linear(12, 32, use_bias=False, rngs=rngs)
        self.bn1 = jax_bn.nnx.BatchNorm(32, **PYTORCH, rngs=rngs)
        self.linear2 = nnx.Linear(32, 32, use_bias=False, rngs=rngs)
        self.bn2 = jax_bn.nnx.BatchNorm(32, **PYTORCH, rngs=rngs)
        self.out = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.linear1(x)))
        x = nnx.relu(self.bn2(self.linear2(x)))
        return self.out(x)


MLP_TABLE = [
    ("net.0", "Dense_0", linear),
    ("net.1", "BatchNorm_0", norm),
    ("net.3", "Dense_1", linear),
    ("net.4", "BatchNorm_1", norm),
    ("net.6", "Dense_2", linear),
]
NNX_MLP_TABLE = [
    ("net.0", "linear1", linear),
    ("net.1", "bn1", norm),
    ("net.3", "linear2", linear),
    ("net.4", "bn2", norm),
    ("net.6", "out", linear),
]


class Vgg(nn.Module):
    def __init__(self, cfg=(6, 6, "M", 10, 10, "M"), size: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for v in cfg:
            if v == "M":
                layers.append(nn.MaxPool2d(2, 2))
                size //= 2
            else:
                layers += [nn.Conv2d(channels, v, 3, padding=1), nn.BatchNorm2d(v), nn.ReLU(True)]
                channels = v
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * size * size, 40),
            nn.ReLU(True),
            nn.Dropout(0.5),
            nn.Linear(40, 40),
            nn.ReLU(True),
            nn.Dropout(0.5),
            nn.Linear(40, 10),
        )

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class LinenVgg(linen.Module):
    cfg: tuple = (6, 6, "M", 10, 10, "M")

    @linen.compact
    def __call__(self, x, *, train: bool):
        for v in self.cfg:
            if v == "M":
                x = linen.max_pool(x, (2, 2), (2, 2))
            else:
                x = linen.Conv(v, (3, 3))(x)
                x = linen.relu(jax_bn.BatchNorm(use_running_average=not train, **PYTORCH)(x))
        x = x.reshape((x.shape[0], -1))
        for _ in range(2):
            x = linen.relu(linen.Dense(40)(x))
            x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(10)(x)


class NnxVgg(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        layers, channels = [], 3
        for v in (6, 6, "M", 10, 10, "M"):
            if v == "M":
                layers.append(lambda x: nnx.max_pool(x, (2, 2), (2, 2)))
            else:
                layers.append(nnx.Conv(channels, v, (3, 3), rngs=rngs))
                layers.append(jax_bn.nnx.BatchNorm(v, **PYTORCH, rngs=rngs))
                layers.append(nnx.relu)
                channels = v
        self.features = nnx.Sequential(*layers)
        self.fc1 = nnx.Linear(90, 40, rngs=rngs)
        self.fc2 = nnx.Linear(40, 40, rngs=rngs)
        self.fc3 = nnx.Linear(40, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.features(x)
        x = x.reshape(x.shape[0], -1)
        x = self.dropout(nnx.relu(self.fc1(x)))
        x = self.dropout(nnx.relu(self.fc2(x)))
        return self.fc3(x)


VGG_TABLE = [("classifier.0", "Dense_0", behind_flatten(10, 3, 3))]
VGG_TABLE += [("classifier.3", "Dense_1", linear), ("classifier.6", "Dense_2", linear)]
NNX_VGG_TABLE = [("classifier.0", "fc1", behind_flatten(10, 3, 3))]
NNX_VGG_TABLE += [("classifier.3", "fc2", linear), ("classifier.6", "fc3", linear)]
for _i, _place in enumerate((0, 3, 7, 10)):
    VGG_TABLE.append((f"features.{_place}", f"Conv_{_i}", conv))
    VGG_TABLE.append((f"features.{_place + 1}", f"BatchNorm_{_i}", norm))
    NNX_VGG_TABLE.append((f"features.{_place}", f"features/layers/{_place}", conv))
    NNX_VGG_TABLE.append((f"features.{_place + 1}", f"features/layers/{_place + 1}", norm))

BLENET_TABLE = [
    ("conv.0", "Conv_0", conv),
    ("conv.1", "BatchNorm_0", norm),
    ("conv.4", "Conv_1", conv),
    ("conv.5", "BatchNorm_1", norm),
    ("fc.0", "Dense_0", behind_flatten(16, 2, 2)),
    ("fc.1", "BatchNorm_2", norm),
    ("fc.3", "Dense_1", linear),
    ("fc.4", "BatchNorm_3", norm),
    ("fc.6", "Dense_2", linear),
]

ALONE = [("", "", norm)]
PAIRS = [
    Pair("mlp", Mlp, LinenMlp, features(12), MLP_TABLE, flag="training"),
    Pair("mlp-nnx", Mlp, lambda: NnxMlp(nnx.Rngs(0)), features(12), NNX_MLP_TABLE),
    Pair("vgg", Vgg, LinenVgg, images(3, 12), VGG_TABLE),
    Pair("vgg-nnx", Vgg, lambda: NnxVgg(rngs()), images(3, 12), NNX_VGG_TABLE),
    Pair(
        "blenet",
        lambda: torch_bn.BLeNet(channels=2, fig_size=16, num_class=7),
        lambda: jax_bn.BLeNet(channels=2, fig_size=16, num_class=7),
        images(2, 16),
        BLENET_TABLE,
    ),
    Pair(
        "own-batch-norm",
        lambda: torch_bn.BatchNorm(num_features=5, num_dims=4),
        lambda: jax_bn.BatchNorm(momentum=0.9, initial_moving_var=0.0),
        images(5, 6),
        ALONE,
        flag="use_running_average",
    ),
    Pair(
        "own-and-linen-batch-norm",
        lambda: torch_bn.BatchNorm(num_features=5, num_dims=4),
        lambda: linen.BatchNorm(momentum=0.9),
        images(5, 6, 4),
        ALONE,
        flag="use_running_average",
    ),
    Pair(
        "native-and-own-batch-norm",
        lambda: nn.BatchNorm2d(5),
        lambda: jax_bn.BatchNorm(**PYTORCH),
        images(5, 6),
        ALONE,
        flag="use_running_average",
    ),
    Pair(
        "native-batch-norm",
        lambda: nn.BatchNorm2d(5),
        lambda: linen.BatchNorm(momentum=0.9),
        images(5, 6),
        ALONE,
        modes=("eval",),
        flag="use_running_average",
    ),
    Pair(
        "native-batch-norm-nnx",
        lambda: nn.BatchNorm1d(5),
        lambda: nnx.BatchNorm(5, momentum=0.9, rngs=nnx.Rngs(0)),
        features(5),
        ALONE,
        modes=("eval",),
    ),
]
