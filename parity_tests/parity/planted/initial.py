"""New networks that do not begin alike: another gain or fan, a normal that is cut off, a bias of zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as linen
import torch
from flax import nnx
from flax.linen import initializers
from torch import nn

import parity
from parity_tests.parity.planted.chain import Case, Planted, images, vectors

CUT = 0.02 / 0.87962566103423978
"""Of the normal that is cut off, so that what is left has a deviation of 0.02; both frameworks take the former."""

# Name -> the same in both frameworks.
WAYS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "glorot": (nn.init.xavier_uniform_, initializers.xavier_uniform()),
    "he": (nn.init.kaiming_normal_, initializers.variance_scaling(2.0, "fan_in", "normal")),
    "he of fan_out": (
        lambda w: nn.init.kaiming_normal_(w, mode="fan_out"),
        initializers.variance_scaling(2.0, "fan_out", "normal"),
    ),
    "lecun": (
        lambda w: nn.init.kaiming_uniform_(w, nonlinearity="linear"),
        initializers.variance_scaling(1.0, "fan_in", "uniform"),
    ),
    "normal": (lambda w: nn.init.normal_(w, std=0.02), initializers.normal(0.02)),
    "cut": (lambda w: nn.init.trunc_normal_(w, 0, CUT, -2 * CUT, 2 * CUT), initializers.truncated_normal(CUT)),
    "uniform": (
        lambda w: nn.init.uniform_(w, -0.02 * 3**0.5, 0.02 * 3**0.5),
        lambda key, shape, dtype: initializers.uniform(0.04 * 3**0.5)(key, shape, dtype) - 0.02 * 3**0.5,
    ),
    "zeros": (nn.init.zeros_, initializers.zeros),
}
LAYERS = "conv1", "conv2", "fc1", "fc2"
RIGHT = dict.fromkeys(LAYERS, ("glorot", "zeros"))
Ways = Mapping[str, tuple[str, str]]


def torch_layer(layer: Any, ways: tuple[str, str]) -> Any:
    WAYS[ways[0]][0](layer.weight)
    WAYS[ways[1]][0](layer.bias)
    return layer


def of_flax(ways: tuple[str, str]) -> dict[str, Any]:
    return {"kernel_init": WAYS[ways[0]][1], "bias_init": WAYS[ways[1]][1]}


class TorchDeep(nn.Module):
    """Two convolutions, a norm, two linear layers."""

    def __init__(self, ways: Ways = RIGHT) -> None:
        super().__init__()
        self.conv1 = torch_layer(nn.Conv2d(3, 8, 3, padding=1), ways["conv1"])
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = torch_layer(nn.Conv2d(8, 12, 3, padding=1), ways["conv2"])
        self.fc1, self.fc2 = (
            torch_layer(nn.Linear(12, 48), ways["fc1"]),
            torch_layer(nn.Linear(48, 10), ways["fc2"]),
        )

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x)))))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


class LinenDeep(linen.Module):
    """The same in linen."""

    ways: Any = None

    @linen.compact
    def __call__(self, x, train: bool = False):
        ways = {name: of_flax(way) for name, way in (self.ways or RIGHT).items()}
        x = linen.Conv(8, (3, 3), name="conv1", **ways["conv1"])(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train, name="norm")(x))
        x = linen.relu(linen.Conv(12, (3, 3), name="conv2", **ways["conv2"])(x))
        x = linen.relu(linen.Dense(48, name="fc1", **ways["fc1"])(x.mean((1, 2))))
        return linen.Dense(10, name="fc2", **ways["fc2"])(x)


class NnxDeep(nnx.Module):
    """The same in NNX."""

    def __init__(self, ways: Ways = RIGHT, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs, **of_flax(ways["conv1"]))
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = nnx.Conv(8, 12, (3, 3), rngs=rngs, **of_flax(ways["conv2"]))
        self.fc1 = nnx.Linear(12, 48, rngs=rngs, **of_flax(ways["fc1"]))
        self.fc2 = nnx.Linear(48, 10, rngs=rngs, **of_flax(ways["fc2"]))

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.norm(self.conv1(x)))))
        return self.fc2(nnx.relu(self.fc1(x.mean((1, 2)))))


def asked(torch_factory: Any, flax: Any, x: Any) -> Planted:
    return Planted(torch_factory, flax, (x,), {}, parity.check_initialisation)


def alone(first: tuple[str, str], second: tuple[str, str]) -> Planted:
    """One linear layer, PyTorch's drawn in the first way, Flax's in the second."""
    made = lambda: torch_layer(nn.Linear(24, 16), first)  # noqa: E731
    return asked(made, linen.Dense(16, **of_flax(second)), vectors(24))


def deep(first: Ways, second: Ways, is_nnx: bool = False) -> Planted:
    made = (lambda rngs: NnxDeep(second, rngs=rngs)) if is_nnx else LinenDeep(second)
    return asked(lambda: TorchDeep(first), made, images(3, 6, 2))


# Variant -> right, wrong.
ALONE = {
    "gain": (("glorot", "zeros"), ("he", "zeros")),
    "cut off": (("normal", "zeros"), ("cut", "zeros")),
    "shape": (("normal", "zeros"), ("uniform", "zeros")),
    "bias": (("glorot", "zeros"), ("glorot", "normal")),
    "fan": (("he", "zeros"), ("he of fan_out", "zeros")),
}


def cases() -> Iterator[Case]:
    """Every case."""
    wrong = RIGHT | {"conv2": ("he", "zeros")}
    for wing in "torch", "flax":
        is_torch = wing == "torch"
        for variant, (ok, bad) in ALONE.items():
            pair = (bad, ok) if is_torch else (ok, bad)
            yield Case(CODE, wing, "alone", variant, lambda pair=pair: alone(*pair), ("",), CODE)
        ways = (wrong, RIGHT) if is_torch else (RIGHT, wrong)
        yield Case(CODE, wing, "deep", "", lambda ways=ways: deep(*ways), ("conv2",), CODE)
        yield Case(CODE, wing, "deep", "nnx", lambda ways=ways: deep(*ways, True), ("conv2",), CODE)


CODE = "initialisation"
