"""Other layers, other ways to say train, other shapes of an output, and batch norms written by hand in either wing."""

from __future__ import annotations

from typing import Any

import flax.linen as linen
import jax.numpy as jnp
import torch
import torch.nn.functional as F  # noqa: N812
from flax import nnx
from torch import nn

import torch_bn
from parity_tests.parity.zoo.pair import (
    Pair,
    behind_flatten,
    conv,
    conv_transpose,
    conv_transpose_gradient,
    features,
    images,
    linear,
    norm,
    rngs,
)


def own_norm(channels: int, dims: int = 4) -> torch_bn.BatchNorm:
    """Flax's convention in PyTorch: biased, momentum 0.9 the weight of the old value, from 1."""
    return torch_bn.BatchNorm(num_features=channels, num_dims=dims, initial_moving_var=1.0)


class Conv1dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(4, 8, 5, stride=2, padding=2)
        self.n1 = own_norm(8, 3)
        self.c2 = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.n2 = own_norm(8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = F.leaky_relu(self.n1(self.c1(x)), 0.1)
        x = F.elu(self.n2(self.c2(x)))
        return self.fc(x.mean(-1))


class LinenConv1dNet(linen.Module):
    @linen.compact
    def __call__(self, x, is_training):
        x = linen.Conv(8, (5,), (2,), padding=((2, 2),))(x)
        x = linen.leaky_relu(linen.BatchNorm(not is_training, momentum=0.9)(x), 0.1)
        x = linen.Conv(8, (3,), kernel_dilation=(2,), feature_group_count=2)(x)
        x = linen.elu(linen.BatchNorm(not is_training, momentum=0.9)(x))
        return linen.Dense(3)(x.mean(1))


class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(4, 8),
            nn.SiLU(),
            nn.MaxPool2d(3, 2, padding=1),
            nn.Conv2d(8, 12, 3),
            nn.GroupNorm(1, 12),
            nn.Hardswish(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(12 * 2 * 2, 5),
        )

    def forward(self, x):
        return self.net(x)


class LinenGroupNormNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.silu(linen.GroupNorm(4, epsilon=1e-5)(linen.Conv(8, (3, 3))(x)))
        x = linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        x = linen.hard_swish(linen.GroupNorm(1, epsilon=1e-5)(linen.Conv(12, (3, 3), padding="VALID")(x)))
        x = linen.avg_pool(x, (2, 2), (2, 2))
        return linen.Dense(5)(x.reshape(len(x), -1))


class Decoder(nn.Module):
    def __init__(self, last: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8 * 3 * 3)
        self.up1 = nn.ConvTranspose2d(8, 6, 4, 2, 1)
        self.bn = own_norm(6)
        self.up2 = nn.ConvTranspose2d(6, 3, 2, 2)

    def forward(self, z):
        x = F.relu(self.fc(z)).view(-1, 8, 3, 3)
        x = F.relu(self.bn(self.up1(x)))
        return torch.tanh(self.up2(x))


class LinenDecoder(linen.Module):
    gradient: bool = False  # transpose_kernel, PyTorch's reading of a transposed convolution

    @linen.compact
    def __call__(self, z, train: bool = False):
        x = linen.relu(linen.Dense(72)(z)).reshape(-1, 8, 3, 3).transpose(0, 2, 3, 1)
        x = linen.ConvTranspose(6, (4, 4), (2, 2), padding="SAME", transpose_kernel=self.gradient)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = linen.ConvTranspose(3, (2, 2), (2, 2), padding="VALID", transpose_kernel=self.gradient)(x)
        return jnp.tanh(x)


def decoder_table(up):
    return [
        ("fc", "Dense_0", linear),
        ("up1", "ConvTranspose_0", up),
        ("bn", "BatchNorm_0", norm),
        ("up2", "ConvTranspose_1", up),
    ]


class HandTorchNorm(nn.Module):
    """Batch norm as many write it."""

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            with torch.no_grad():
                self.running_mean.mul_(1 - self.momentum).add_(self.momentum * mean)
                self.running_var.mul_(1 - self.momentum).add_(self.momentum * var)
        else:
            mean, var = self.running_mean, self.running_var
        mean, var, weight, bias = (v[None, :, None, None] for v in (mean, var, self.weight, self.bias))
        return (x - mean) / (var + self.eps).sqrt() * weight + bias


class HandLinenNorm(linen.Module):
    """The same in Flax, with the names of the papers."""

    momentum: float = 0.9
    eps: float = 1e-5

    @linen.compact
    def __call__(self, x, train: bool):
        shape = (x.shape[-1],)
        gamma = self.param("gamma", linen.initializers.ones, shape)
        beta = self.param("beta", linen.initializers.zeros, shape)
        moving_mean = self.variable("batch_stats", "moving_mean", jnp.zeros, shape)
        moving_var = self.variable("batch_stats", "moving_var", jnp.ones, shape)
        mean, var = moving_mean.value, moving_var.value
        if train:
            axes = tuple(range(x.ndim - 1))
            mean, var = x.mean(axes), x.var(axes)
            if not self.is_initializing():
                moving_mean.value = self.momentum * moving_mean.value + (1 - self.momentum) * mean
                moving_var.value = self.momentum * moving_var.value + (1 - self.momentum) * var
        return gamma * (x - mean) / jnp.sqrt(var + self.eps) + beta


def hand_names(state):
    """`norm`, with the names of HandLinenNorm."""
    names = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_var"}
    return {f"{c}/{names[n]}": v for (c, n), v in ((tuple(k.split("/")), v) for k, v in norm(state).items())}


class SmallNet(nn.Module):
    """conv, norm, ReLU, pool, flatten, linear; the norm is given."""

    def __init__(self, make_norm: Any = own_norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = make_norm(6)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.conv(x))))
        return self.fc(self.drop(x.flatten(1)))


def _small(x, train: bool, batch_norm: Any = None):
    batch_norm = batch_norm or (lambda: linen.BatchNorm(use_running_average=not train, momentum=0.9))
    x = linen.relu(batch_norm()(linen.Conv(6, (3, 3))(x)))
    x = linen.max_pool(x, (2, 2), strides=(2, 2))
    x = linen.Dropout(0.3)(x.reshape(x.shape[0], -1), deterministic=not train)
    return linen.Dense(5)(x)


class LinenTrain(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        return _small(x, train)


class LinenTraining(linen.Module):
    @linen.compact
    def __call__(self, x, *, training):
        return _small(x, training)


class LinenIsTraining(linen.Module):
    @linen.compact
    def __call__(self, x, is_training: bool):
        return _small(x, is_training)


class LinenDeterministic(linen.Module):
    @linen.compact
    def __call__(self, x, deterministic: bool = True):
        return _small(x, not deterministic)


class LinenUseRunningAverage(linen.Module):
    @linen.compact
    def __call__(self, x, use_running_average: bool):
        return _small(x, not use_running_average)


class LinenTrainAttribute(linen.Module):
    train: bool = True

    @linen.compact
    def __call__(self, x):
        return _small(x, self.train)


class LinenDeterministicAttribute(linen.Module):
    deterministic: bool | None = None

    @linen.compact
    def __call__(self, x, deterministic: bool | None = None):
        return _small(x, not linen.merge_param("deterministic", self.deterministic, deterministic))


class LinenHand(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        return _small(x, train, lambda: lambda x: HandLinenNorm()(x, train))


class LinenSetup(linen.Module):
    """Layers made in setup, under their own names."""

    def setup(self) -> None:
        self.body_conv = linen.Conv(6, (3, 3))
        self.body_norm = linen.BatchNorm(momentum=0.9)
        self.classifier = linen.Dense(5)

    def __call__(self, x, train: bool):
        x = linen.relu(self.body_norm(self.body_conv(x), use_running_average=not train))
        x = linen.max_pool(x, (2, 2), strides=(2, 2))
        # C, H, W here too: the weights of the linear layer need no other order
        return self.classifier(x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1))


class NnxTrainArgument(nnx.Module):
    """NNX with a flag in the call, as linen has it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.fc = nnx.Linear(96, 5, rngs=rngs)

    def __call__(self, x, train: bool):
        x = nnx.relu(self.norm(self.conv(x), use_running_average=not train))
        return self.fc(nnx.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))


class TwoHeads(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named = named
        self.trunk = nn.Linear(7, 16)
        self.policy = nn.Linear(16, 4)
        self.value = nn.Linear(16, 1)

    def forward(self, x, y):
        h = torch.tanh(self.trunk(x) + y)
        out = {"policy": self.policy(h), "value": self.value(h)}
        return out if self.named else (out["policy"], out["value"])


class LinenTwoHeads(linen.Module):
    named: bool

    @linen.compact
    def __call__(self, x, y):
        h = linen.tanh(linen.Dense(16, name="body")(x) + y)
        policy, value = linen.Dense(4, name="actor")(h), linen.Dense(1, name="critic")(h)
        return {"policy": policy, "value": value} if self.named else (policy, value)


HEADS_TABLE = [("trunk", "body", linear), ("policy", "actor", linear), ("value", "critic", linear)]


def _two_inputs(rng, batch):
    return tuple(rng.normal(size=(batch, n)).astype("float32") for n in (7, 16))


CONV1D_TABLE = [
    ("c1", "Conv_0", conv),
    ("n1", "BatchNorm_0", norm),
    ("c2", "Conv_1", conv),
    ("n2", "BatchNorm_1", norm),
    ("fc", "Dense_0", linear),
]
GROUP_TABLE = [
    ("net.0", "Conv_0", conv),
    ("net.1", "GroupNorm_0", norm),
    ("net.4", "Conv_1", conv),
    ("net.5", "GroupNorm_1", norm),
    ("net.9", "Dense_0", behind_flatten(12, 2, 2)),
]
FLATTENED = behind_flatten(6, 4, 4)
SMALL_TABLE = [("conv", "Conv_0", conv), ("norm", "BatchNorm_0", norm), ("fc", "Dense_0", FLATTENED)]
HAND_TABLE = [("conv", "Conv_0", conv), ("norm", "HandLinenNorm_0", hand_names), ("fc", "Dense_0", FLATTENED)]
SETUP_TABLE = [("conv", "body_conv", conv), ("norm", "body_norm", norm), ("fc", "classifier", linear)]
NNX_TABLE = [("conv", "conv", conv), ("norm", "norm", norm), ("fc", "fc", FLATTENED)]

FLAGS = [
    (LinenTrain, "train"),
    (LinenTraining, "training"),
    (LinenIsTraining, "is_training"),
    (LinenDeterministic, "deterministic"),
    (LinenUseRunningAverage, "use_running_average"),
    (LinenTrainAttribute, "self.train"),
    (LinenDeterministicAttribute, "deterministic"),
]
PAIRS = [
    Pair("conv1d", Conv1dNet, LinenConv1dNet, features(4, 20), CONV1D_TABLE, flag="is_training"),
    Pair("group-norm", GroupNormNet, LinenGroupNormNet, images(3, 12), GROUP_TABLE, flag=""),
    Pair("decoder", Decoder, LinenDecoder, features(6), decoder_table(conv_transpose)),
    Pair(
        "decoder-gradient",
        Decoder,
        lambda: LinenDecoder(gradient=True),
        features(6),
        decoder_table(conv_transpose_gradient),
    ),
    *(Pair(f"flag-{cls.__name__}", SmallNet, cls, images(3, 8), SMALL_TABLE, flag=flag) for cls, flag in FLAGS),
    Pair("hand-torch", lambda: SmallNet(HandTorchNorm), LinenTrain, images(3, 8), SMALL_TABLE),
    Pair("hand-linen", SmallNet, LinenHand, images(3, 8), HAND_TABLE),
    Pair("hand-both", lambda: SmallNet(HandTorchNorm), LinenHand, images(3, 8), HAND_TABLE),
    Pair("setup-permutes-first", SmallNet, LinenSetup, images(3, 8), SETUP_TABLE),
    Pair("nnx-train-argument", SmallNet, lambda: NnxTrainArgument(rngs()), images(3, 8), NNX_TABLE),
    Pair("two-inputs-tuple", lambda: TwoHeads(False), lambda: LinenTwoHeads(False), _two_inputs, HEADS_TABLE, flag=""),
    Pair("two-inputs-dict", lambda: TwoHeads(True), lambda: LinenTwoHeads(True), _two_inputs, HEADS_TABLE, flag=""),
]
