"""The networks that mistakes are planted in: chains of named parts in PyTorch, linen and NNX, and what a case is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

import parity
from parity_tests.parity.planted import flax_norms, torch_norms
from parity_tests.parity.zoo.others import own_norm
from parity_tests.parity.zoo.pair import behind_flatten, conv, linear, linen_variables, norm, randomise, rngs

BATCH, SIZE = 8, 12


class TorchChain(nn.Module):
    """Parts in order: layers, or functions."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        super().__init__()
        self.order = list(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


class LinenChain(linen.Module):
    """Parts in order: functions of (x, train) that make their layer. The layers have Flax's own names."""

    parts: tuple[Callable, ...]

    @linen.compact
    def __call__(self, x, train: bool):
        for part in self.parts:
            x = part(x, train)
        return x


class NnxChain(nnx.Module):
    """Parts in order: layers, or functions."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.order = tuple(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def layer(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable:
    """A linen layer without a flag as a part."""
    return lambda x, train: make(*args, **kwargs)(x)


def function(f: Callable) -> Callable:
    return lambda x, train: f(x)


def flax_norm(x, train):
    return linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)


def hand_norm(make: Callable[..., linen.Module], **kwargs: Any) -> Callable:
    return lambda x, train: make(**kwargs)(x, train)


def native_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels)


TorchNorm = Callable[[int], nn.Module]


def deep_torch(make_norm: TorchNorm = own_norm, **changed: Any) -> TorchChain:
    """Three blocks of convolution, norm and activation, two pools, and three linear layers."""
    parts: dict[str, Any] = {
        "conv1": nn.Conv2d(3, 6, 3, padding=1),
        "bn1": make_norm(6),
        "act1": nn.ReLU(),
        "conv2": nn.Conv2d(6, 6, 3, padding=1),
        "bn2": make_norm(6),
        "act2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "conv3": nn.Conv2d(6, 8, 3, padding=1),
        "bn3": make_norm(8),
        "act3": nn.ReLU(),
        "pool3": nn.AvgPool2d(2),
        "flatten": lambda x: torch.flatten(x, 1),
        "fc1": nn.Linear(8 * 3 * 3, 16),
        "act4": nn.ReLU(),
        "drop": nn.Dropout(0.5),
        "fc2": nn.Linear(16, 16),
        "act5": nn.Sigmoid(),
        "head": nn.Linear(16, 5),
    }
    return TorchChain(_in_order(parts, changed))


def deep_linen(make_norm: Callable = flax_norm, **changed: Any) -> LinenChain:
    parts: dict[str, Any] = {
        "conv1": layer(linen.Conv, 6, (3, 3)),
        "bn1": make_norm,
        "act1": function(linen.relu),
        "conv2": layer(linen.Conv, 6, (3, 3), padding=1),
        "bn2": make_norm,
        "act2": function(linen.relu),
        "pool2": function(lambda x: linen.max_pool(x, (2, 2), (2, 2))),
        "conv3": layer(linen.Conv, 8, (3, 3), padding="SAME"),
        "bn3": make_norm,
        "act3": function(linen.relu),
        "pool3": function(lambda x: linen.avg_pool(x, (2, 2), (2, 2))),
        "flatten": function(lambda x: x.reshape(x.shape[0], -1)),
        "fc1": layer(linen.Dense, 16),
        "act4": function(linen.relu),
        "drop": lambda x, train: linen.Dropout(0.5, deterministic=not train)(x),
        "fc2": layer(linen.Dense, 16),
        "act5": function(linen.sigmoid),
        "head": layer(linen.Dense, 5),
    }
    return LinenChain(tuple(_in_order(parts, changed).values()))


def deep_nnx(**changed: Any) -> NnxChain:
    made = rngs()
    parts: dict[str, Any] = {
        "conv1": nnx.Conv(3, 6, (3, 3), rngs=made),
        "bn1": nnx.BatchNorm(6, momentum=0.9, rngs=made),
        "act1": nnx.relu,
        "conv2": nnx.Conv(6, 6, (3, 3), padding=1, rngs=made),
        "bn2": nnx.BatchNorm(6, momentum=0.9, rngs=made),
        "act2": nnx.relu,
        "pool2": lambda x: nnx.max_pool(x, (2, 2), (2, 2)),
        "conv3": nnx.Conv(6, 8, (3, 3), padding="SAME", rngs=made),
        "bn3": nnx.BatchNorm(8, momentum=0.9, rngs=made),
        "act3": nnx.relu,
        "pool3": lambda x: nnx.avg_pool(x, (2, 2), (2, 2)),
        "flatten": lambda x: x.reshape(x.shape[0], -1),
        "fc1": nnx.Linear(72, 16, rngs=made),
        "act4": nnx.relu,
        "drop": nnx.Dropout(0.5, rngs=made),
        "fc2": nnx.Linear(16, 16, rngs=made),
        "act5": nnx.sigmoid,
        "head": nnx.Linear(16, 5, rngs=made),
    }
    return NnxChain(_in_order(parts, changed))


def _in_order(parts: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """`changed` replaces parts; `first=` goes before all, `order=` says the names in order (others are left out)."""
    order = changed.pop("order", list(parts))
    if "first" in changed:
        order = ["first", *order]
    parts = parts | changed
    return {name: parts[name] for name in order}


DEEP_TABLE = [
    ("conv1", "Conv_0", conv),
    ("bn1", "BatchNorm_0", norm),
    ("conv2", "Conv_1", conv),
    ("bn2", "BatchNorm_1", norm),
    ("conv3", "Conv_2", conv),
    ("bn3", "BatchNorm_2", norm),
    ("fc1", "Dense_0", behind_flatten(8, 3, 3)),
    ("fc2", "Dense_1", linear),
    ("head", "Dense_2", linear),
]
NNX_DEEP_TABLE = [(name, name, kind) for name, _, kind in DEEP_TABLE]


class Planted(NamedTuple):
    """Arguments of `parity.check`, or of what is asked in its place."""

    torch_module: nn.Module
    flax_module: Any
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    check: Callable[..., Any] = parity.check


class Case(NamedTuple):
    """One planted mistake.

    Attributes:
      code: what it must be called.
      wing: the side that is wrong.
      depth: "alone", "deep" (a chain of three blocks), "resnet".
      variant: how it is planted, where there are several ways.
      make: makes it.
      layers: PyTorch's names of the layers that may be charged; empty: any.
      phase: of the first divergence; None: any.
      also: codes that may be named beside it, because they are true too.
    """

    code: str
    wing: str
    depth: str
    variant: str
    make: Callable[[], Planted]
    layers: tuple[str, ...] = ()
    phase: str | None = "forward"
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.code, self.wing, self.depth, self.variant) if part)


def images(channels: int = 3, size: int = SIZE, batch: int = BATCH, seed: int = 0):
    return np.random.default_rng(seed).normal(size=(batch, channels, size, size)).astype(np.float32)


def vectors(width: int, batch: int = BATCH, seed: int = 0):
    return np.random.default_rng(seed).normal(size=(batch, width)).astype(np.float32)


def planted(torch_module: nn.Module, flax_module: Any, x, *, seed: int = 1, fresh: bool = False, **options) -> Planted:
    """The case, its PyTorch side randomised."""
    if not fresh:
        randomise(torch_module, seed)
    return Planted(torch_module, flax_module, x if isinstance(x, tuple) else (x,), options)


def deep_variables(module: nn.Module) -> dict[str, Any]:
    return linen_variables(module, DEEP_TABLE)


def changed_variables(variables: dict[str, Any], path: str, change: Callable) -> dict[str, Any]:
    """The variables with the array at "params/Conv_0/kernel" changed by a function of a numpy array."""
    head, _, rest = path.partition("/")
    if not rest:
        return variables | {head: jnp.asarray(np.ascontiguousarray(change(np.asarray(variables[head]))))}
    return variables | {head: changed_variables(variables[head], rest, change)}


def change_torch(module: nn.Module, name: str, change: Callable) -> None:
    """The same for a tensor of a state_dict."""
    with torch.no_grad():
        tensor = module.state_dict()[name]
        tensor.copy_(torch.from_numpy(np.array(change(tensor.numpy()))))


__all__ = ["flax_norms", "torch_norms"]
