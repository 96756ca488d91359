"""Correct pairs that are hard to pair: other orders, layers used twice, unusual calls, layers nobody calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as linen
import jax.numpy as jnp
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from parity_tests.parity.zoo.others import own_norm
from parity_tests.parity.zoo.pair import Pair, conv, features, images, linear, norm


class Branches(nn.Module):
    """Two branches of one shape; Flax calls the second first."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Conv2d(3, 6, 3, padding=1)
        self.shortcut = nn.Conv2d(3, 6, 1)
        self.bn_main, self.bn_shortcut = own_norm(6), own_norm(6)

    def forward(self, x):
        return F.relu(self.bn_main(self.main(x)) + self.bn_shortcut(self.shortcut(x)))


class LinenBranches(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        def batch_norm(name):
            return linen.BatchNorm(use_running_average=not train, momentum=0.9, name=name)

        side = batch_norm("bn_side")(linen.Conv(6, (1, 1), name="side")(x))
        trunk = batch_norm("bn_trunk")(linen.Conv(6, (3, 3), name="trunk")(x))
        return linen.relu(trunk + side)


BRANCHES = [("main", "trunk", conv), ("bn_main", "bn_trunk", norm)]
BRANCHES += [("shortcut", "side", conv), ("bn_shortcut", "bn_side", norm)]


class Twins(nn.Module):
    """Two layers of one shape, called in another order in Flax: nothing but a map says which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return torch.tanh(self.left(x)) * self.right(x)


class LinenTwins(linen.Module):
    @linen.compact
    def __call__(self, x):
        gate = linen.Dense(5, name="b")(x)
        return jnp.tanh(linen.Dense(5, name="a")(x)) * gate


class Recurrent(nn.Module):
    """One layer called three times, another never."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.inp, self.cell, self.act = nn.Linear(4, 8), nn.Linear(8, 8), nn.Tanh()

    def forward(self, x):
        h = self.inp(x)
        for _ in range(3):
            h = self.act(self.cell(h))
        return h


class LinenRecurrent(linen.Module):
    def setup(self) -> None:
        self.step, self.first = linen.Dense(8), linen.Dense(8)

    def __call__(self, x):
        h = self.first(x)
        for _ in range(3):
            h = jnp.tanh(self.step(h))
        return h


class LinenMode(linen.Module):
    """Told train from eval by a word."""

    @linen.compact
    def __call__(self, x, mode: str):
        x = linen.Dense(8)(x)
        return linen.Dense(3)(linen.relu(linen.BatchNorm(use_running_average=mode == "predict", momentum=0.9)(x)))


def call_mode(module: Any, variables: Any, x: Any, train: bool) -> Any:
    return module.apply(variables, x, mode="fit" if train else "predict", mutable=["batch_stats"])


def mode_torch() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), own_norm(8, 2), nn.ReLU(), nn.Linear(8, 3))


def sequential() -> linen.Module:
    return linen.Sequential([linen.Dense(8), linen.relu, linen.LayerNorm(epsilon=1e-5), linen.Dense(3)])


class Wide(nn.Module):
    """Linear layers on images' last axis, a scale and a shift of its own, subtraction, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 7)
        self.scale = nn.Parameter(torch.full((7,), 1.5))
        self.shift = nn.Parameter(torch.linspace(-1, 1, 7))

    def forward(self, x):
        return torch.softmax(self.fc(x) * self.scale - self.shift, -1)


class LinenWide(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(7)(x)
        scale = self.param("scale", linen.initializers.ones, (7,))
        shift = self.param("shift", linen.initializers.zeros, (7,))
        return linen.softmax(x * scale - shift)


def own_parameters(state: Any) -> Any:
    return {"params/scale": state["scale"], "params/shift": state["shift"]}


def _same(inputs: Any) -> Any:
    return inputs


LINEARS: Callable[[str], list] = lambda names: [(a, b, linear) for a, b in (p.split(":") for p in names.split())]  # noqa: E731
PAIRS = [
    Pair("branches", Branches, LinenBranches, images(3, 7, 5), BRANCHES),
    Pair(
        "twins-with-a-map",
        Twins,
        LinenTwins,
        features(6),
        LINEARS("left:a right:b"),
        flag="",
        options={"layer_map": {"left": "a"}},
    ),
    Pair("layer-called-thrice", Recurrent, LinenRecurrent, features(4), LINEARS("inp:first cell:step"), flag=""),
    Pair(
        "linen-sequential",
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)),
        sequential,
        features(4),
        [("0", "layers_0", linear), ("2", "layers_2", norm), ("3", "layers_3", linear)],
        flag="",
    ),
    Pair(
        "channels-last-linear",
        Wide,
        LinenWide,
        features(4, 3, 5),
        [("fc", "Dense_0", linear), ("", "", own_parameters)],
        flag="",
        flax_inputs=_same,
    ),
]
