"""Mistakes between the layers: activations, pools, dropout, the order of norm and activation, the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from parity_tests.parity.planted.chain import (
    Case,
    LinenChain,
    TorchChain,
    deep_linen,
    deep_torch,
    flax_norm,
    function,
    images,
    layer,
    native_norm,
    planted,
    vectors,
)
from parity_tests.parity.zoo.others import own_norm

# wing, variant, PyTorch's, Flax's
ACTIVATIONS: list[tuple[str, str, Any, Callable]] = [
    ("flax", "tanh-gelu", nn.GELU(), linen.gelu),
    ("torch", "tanh-gelu", nn.GELU(approximate="tanh"), lambda x: linen.gelu(x, approximate=False)),
    ("flax", "silu-for-sigmoid", nn.Sigmoid(), linen.silu),
    ("torch", "silu-for-sigmoid", F.silu, linen.sigmoid),
    ("torch", "leaky", nn.LeakyReLU(0.01), linen.relu),
    ("flax", "slope", nn.LeakyReLU(0.2), linen.leaky_relu),
    ("torch", "relu6", lambda x: F.relu6(30 * x) / 30, linen.relu),
    ("flax", "elu", nn.ReLU(), linen.elu),
    ("torch", "forgotten", nn.Identity(), linen.relu),
    ("flax", "forgotten", nn.ReLU(), lambda x: x),
    ("flax", "tanh", torch.sigmoid, jnp.tanh),
    ("torch", "hardswish", nn.Hardswish(), linen.silu),
    ("flax", "softplus", nn.ReLU(), linen.softplus),
    ("torch", "mish", nn.Mish(), linen.gelu),
    ("flax", "celu-alpha", nn.ELU(0.5), linen.elu),
]


def _called(torch_part: Any, name: str, following: str) -> tuple[str, ...]:
    """Whom to charge: the module where it is one, otherwise what follows."""
    return (name,) if isinstance(torch_part, nn.Module) else (following,)


def activations() -> Iterator[Case]:
    for i, (wing, variant, torch_part, flax_part) in enumerate(ACTIVATIONS):

        def alone(torch_part=torch_part, flax_part=flax_part):
            torch.manual_seed(0)
            module = TorchChain({"fc1": nn.Linear(6, 12), "act": torch_part, "fc2": nn.Linear(12, 4)})
            parts = (layer(linen.Dense, 12), function(flax_part), layer(linen.Dense, 4))
            return planted(module, LinenChain(parts), 2 * vectors(6), train=True)

        def deep(torch_part=torch_part, flax_part=flax_part, name=f"act{2 + i % 4}"):
            torch.manual_seed(0)
            module = deep_torch(**{name: torch_part})
            return planted(module, deep_linen(**{name: function(flax_part)}), images(), train=True)

        following = {"act2": "pool2", "act3": "pool3", "act4": "drop", "act5": "head"}[f"act{2 + i % 4}"]
        charged = _called(torch_part, f"act{2 + i % 4}", following)
        if charged[0] == "drop":
            charged = ("drop", "fc2")
        if charged[0].startswith("pool"):
            charged = (*charged, {"pool2": "conv3", "pool3": "fc1"}[charged[0]])
        alone_charged = _called(torch_part, "act", "fc2")
        if isinstance(torch_part, nn.Identity):  # no module to charge, or one; as you like
            alone_charged, charged = ("act", "fc2"), ("act2", "act3", "act4", "act5", "conv3", "fc1", "fc2", "head")
        yield Case("activation", wing, "alone", variant, alone, alone_charged)
        yield Case("activation", wing, "deep", variant, deep, charged)


def _torch_gate(first, second, f):
    return lambda x: (lambda parts: parts[first] * f(parts[second]))(x.chunk(2, -1))


def _flax_gate(first, second, f):
    return function(lambda x: (lambda parts: parts[first] * f(parts[second]))(jnp.split(x, 2, -1)))


def gates() -> Iterator[Case]:
    """GEGLU for SwiGLU; the activation of the first half for that of the second."""

    def make(wing: str, depth: str, wrong: tuple):
        def build():
            torch.manual_seed(0)
            torch_functions = {"gelu": F.gelu, "silu": F.silu}
            flax_functions = {"gelu": lambda x: linen.gelu(x, approximate=False), "silu": linen.silu}
            first, second = (wrong, (0, 1, "silu")) if wing == "torch" else ((0, 1, "silu"), wrong)
            torch_part = _torch_gate(*first[:2], torch_functions[first[2]])
            flax_part = _flax_gate(*second[:2], flax_functions[second[2]])
            if depth == "alone":
                module = TorchChain({"fc1": nn.Linear(6, 24), "act": torch_part, "fc2": nn.Linear(12, 4)})
                parts = (layer(linen.Dense, 24), flax_part, layer(linen.Dense, 4))
                return planted(module, LinenChain(parts), vectors(6), train=True)
            module = deep_torch(fc1=nn.Linear(72, 32), act4=torch_part)
            return planted(module, deep_linen(fc1=layer(linen.Dense, 32), act4=flax_part), images(), train=True)

        return build

    for variant, wrong in (("geglu", (0, 1, "gelu")), ("exchanged", (1, 0, "silu"))):
        for wing in ("torch", "flax"):
            yield Case("gate", wing, "alone", variant, make(wing, "alone", wrong), ("fc2",))
            yield Case("gate", wing, "deep", variant, make(wing, "deep", wrong), ("drop", "fc2"))


def softmaxes() -> Iterator[Case]:
    """Over the examples, as PyTorch's softmax without `dim` is of three axes; over rows for channels."""

    def make(wing: str, depth: str):
        def build():
            torch.manual_seed(0)
            if depth == "alone":
                first, second = (0, -1) if wing == "torch" else (-1, 0)
                module = TorchChain(
                    {"fc1": nn.Linear(6, 12), "act": lambda x: torch.softmax(x, first), "fc2": nn.Linear(12, 4)}
                )
                soft = function(lambda x: jax.nn.softmax(x, axis=second))
                return planted(module, LinenChain((layer(linen.Dense, 12), soft, layer(linen.Dense, 4))), vectors(6))
            module = deep_torch(act1=lambda x: torch.softmax(x, 2 if wing == "torch" else 1))
            soft = function(lambda x: jax.nn.softmax(x, axis=1 if wing == "flax" else -1))
            return planted(module, deep_linen(act1=soft), images(), train=True)

        return build

    for wing in ("torch", "flax"):
        yield Case("softmax-axis", wing, "alone", "examples", make(wing, "alone"), ("fc2",))
        yield Case("softmax-axis", wing, "deep", "rows", make(wing, "deep"), ("conv2",))


def max_pool(*args: Any, **kwargs: Any) -> Callable:
    return function(lambda x: linen.max_pool(x, *args, **kwargs))


def avg_pool(*args: Any, **kwargs: Any) -> Callable:
    return function(lambda x: linen.avg_pool(x, *args, **kwargs))


TWO, ONES = (2, 2), ((1, 1), (1, 1))
# code, wing, variant, PyTorch's, Flax's, pool2 or pool3 (6x6 -> 3x3 behind it)
POOLS: list[tuple[str, str, str, Any, Callable]] = [
    ("pool-kind", "flax", "", nn.MaxPool2d(2), avg_pool(TWO, TWO)),
    ("pool-kind", "torch", "", nn.AvgPool2d(2), max_pool(TWO, TWO)),
    ("pool-kind", "torch", "functional", lambda x: F.avg_pool2d(x, 2), max_pool(TWO, TWO)),
    ("pool-count-padding", "flax", "", nn.AvgPool2d(3, 2, padding=1),
     avg_pool((3, 3), TWO, ONES, count_include_pad=False)),
    ("pool-count-padding", "torch", "", nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
     avg_pool((3, 3), TWO, ONES)),
    ("pool-count-padding", "torch", "functional", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
     avg_pool((3, 3), TWO, ONES)),
    ("padding", "flax", "pool-same", nn.MaxPool2d(3, 2, padding=1), max_pool((3, 3), TWO, "SAME")),
]  # fmt: skip
# Pools whose output has another shape; all that follows takes the mean over the image
POOL_STRIDES: list[tuple[str, str, str, Any, Callable]] = [
    ("stride", "flax", "pool", nn.MaxPool2d(2), function(lambda x: linen.max_pool(x, TWO))),
    ("stride", "torch", "avg-pool", nn.AvgPool2d(2, 1), avg_pool(TWO, TWO)),
]


def pools() -> Iterator[Case]:
    for code, wing, variant, torch_part, flax_part in POOLS:

        def alone(torch_part=torch_part, flax_part=flax_part):
            torch.manual_seed(0)
            module = TorchChain(
                {"conv1": nn.Conv2d(3, 5, 3, padding=1), "pool": torch_part, "conv2": nn.Conv2d(5, 4, 3)}
            )
            parts = (layer(linen.Conv, 5, (3, 3)), flax_part, layer(linen.Conv, 4, (3, 3), padding="VALID"))
            return planted(module, LinenChain(parts), images(3, 8), train=False)

        def deep(torch_part=torch_part, flax_part=flax_part):
            torch.manual_seed(0)
            module = deep_torch(pool2=torch_part, act2=nn.Tanh())
            return planted(module, deep_linen(pool2=flax_part, act2=function(jnp.tanh)), images(), train=True)

        yield Case(code, wing, "alone", variant, alone, _called(torch_part, "pool", "conv2"))
        yield Case(code, wing, "deep", variant, deep, _called(torch_part, "pool2", "conv3"))
    for code, wing, variant, torch_part, flax_part in POOL_STRIDES:

        def alone(torch_part=torch_part, flax_part=flax_part):
            torch.manual_seed(0)
            module = TorchChain(
                {"conv1": nn.Conv2d(3, 5, 3, padding=1), "pool": torch_part, "conv2": nn.Conv2d(5, 4, 3)}
            )
            parts = (layer(linen.Conv, 5, (3, 3)), flax_part, layer(linen.Conv, 4, (3, 3), padding="VALID"))
            return planted(module, LinenChain(parts), images(3, 8), train=False)

        def deep(torch_part=torch_part, flax_part=flax_part):
            torch.manual_seed(0)
            mean = {"flatten": lambda x: x.mean((2, 3)), "fc1": nn.Linear(8, 16)}
            module = deep_torch(pool2=torch_part, **mean)
            flat = function(lambda x: x.mean((1, 2)))
            return planted(module, deep_linen(pool2=flax_part, flatten=flat), images(), train=True)

        yield Case(code, wing, "alone", variant, alone, ("pool",))
        yield Case(code, wing, "deep", variant, deep, ("pool2",))


def norm_after_activation() -> Iterator[Case]:
    order = ["conv1", "act1", "bn1"]
    names = list(deep_torch().order)
    wrong = order + names[3:]

    def make(wing: str, train: bool, depth: str):
        def build():
            torch.manual_seed(0)
            changed: dict[str, Any] = {"torch": {}, "flax": {}}
            if depth == "alone":
                right = ["conv1", "bn1", "act1"]
                changed["torch"]["order"] = order if wing == "torch" else right
                changed["flax"]["order"] = order if wing == "flax" else right
            else:
                changed[wing]["order"] = wrong
            norm = own_norm if train else native_norm
            return planted(
                deep_torch(norm, **changed["torch"]), deep_linen(flax_norm, **changed["flax"]), images(), train=train
            )

        return build

    for wing in ("torch", "flax"):
        for train in (True, False):
            for depth in ("alone", "deep"):
                mode = "train" if train else "eval"
                yield Case("norm-after-activation", wing, depth, mode, make(wing, train, depth), ("bn1", "act1"))


def dropout() -> Iterator[Case]:
    def torch_functional():
        torch.manual_seed(0)
        return planted(deep_torch(native_norm, drop=lambda x: F.dropout(x, 0.5)), deep_linen(), images(), train=False)

    def torch_module():
        class Always(nn.Dropout):
            def train(self, mode: bool = True):
                return super().train(True)

        torch.manual_seed(0)
        return planted(deep_torch(native_norm, drop=Always(0.3).train()), deep_linen(), images(), train=False)

    def flax_always():
        torch.manual_seed(0)
        part = layer(linen.Dropout, 0.5, deterministic=False)
        return planted(deep_torch(native_norm), deep_linen(drop=part), images(), train=False)

    def alone(wing: str):
        def make():
            torch.manual_seed(0)
            drop = {"torch": lambda x: F.dropout(x, 0.2), "flax": nn.Dropout(0.2)}[wing]
            module = TorchChain({"fc1": nn.Linear(20, 30), "act": nn.ReLU(), "drop": drop, "fc2": nn.Linear(30, 4)})
            inactive = lambda x, train: linen.Dropout(0.2, deterministic=not train)(x)  # noqa: E731
            part = layer(linen.Dropout, 0.2, deterministic=False) if wing == "flax" else inactive
            parts = (layer(linen.Dense, 30), function(linen.relu), part, layer(linen.Dense, 4))
            return planted(module, LinenChain(parts), vectors(20, 16), train=False)

        return make

    yield Case("dropout-active", "torch", "deep", "functional", torch_functional, ("fc2",))
    yield Case("dropout-active", "torch", "deep", "module", torch_module, ("drop",))
    yield Case("dropout-active", "flax", "deep", "", flax_always, ("drop",))
    yield Case("dropout-active", "torch", "alone", "", alone("torch"), ("fc2",))
    yield Case("dropout-active", "flax", "alone", "", alone("flax"), ("drop",))


def inputs() -> Iterator[Case]:
    """The first layer is charged."""
    x = np.random.default_rng(0).uniform(0, 255, size=(8, 3, 12, 12)).astype(np.float32)
    last = np.moveaxis(x, 1, -1)

    def given(torch_x, flax_x, depth):
        def make():
            torch.manual_seed(0)
            if depth == "alone":
                module = TorchChain({"conv1": nn.Conv2d(torch_x.shape[1], 4, 3, padding=1)})
                flax_module = LinenChain((layer(linen.Conv, 4, (3, 3)),))
            else:
                module, flax_module = deep_torch(), deep_linen()
            return planted(module, flax_module, torch_x, train=True, flax_inputs=(flax_x,))

        return make

    def inside(wing: str):
        def make():
            torch.manual_seed(0)
            if wing == "torch":
                return planted(deep_torch(first=lambda x: x / 255), deep_linen(), x, train=True)
            return planted(deep_torch(), deep_linen(first=function(lambda x: x / 255.0)), x, train=True)

        return make

    charged = ("conv1",)
    for depth in ("alone", "deep"):
        yield Case("input-scale", "flax", depth, "given", given(x, last / 255, depth), charged)
        yield Case("input-scale", "torch", depth, "given", given(x / 255, last, depth), charged)
        reshaped = x.reshape(last.shape)
        yield Case("input-layout", "flax", depth, "reshaped", given(x / 255, reshaped / 255, depth), charged)
        yield Case(
            "input-layout", "torch", depth, "reshaped", given(last.reshape(x.shape) / 255, last / 255, depth), charged
        )
        hw = last.swapaxes(1, 2)
        yield Case("input-layout", "flax", depth, "hw-swapped", given(x / 255, hw / 255, depth), charged)
    cube = np.random.default_rng(1).normal(size=(4, 6, 6, 6)).astype(np.float32)
    yield Case("input-layout", "flax", "alone", "cube", given(cube, cube, "alone"), charged)
    yield Case("input-scale", "torch", "deep", "inside", inside("torch"), charged)
    yield Case("input-scale", "flax", "deep", "inside", inside("flax"), charged)


def cases() -> Iterator[Case]:
    """All of them."""
    yield from activations()
    yield from gates()
    yield from softmaxes()
    yield from pools()
    yield from norm_after_activation()
    yield from dropout()
    yield from inputs()
