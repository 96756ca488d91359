"""An output of the network, a hidden state, that one side takes before a layer and the other behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import flax.linen as linen
import torch
from torch import nn

from parity_tests.parity.planted.chain import (
    Case,
    TorchChain,
    deep_linen,
    deep_torch,
    function,
    images,
    layer,
    planted,
    vectors,
)


class TorchReturns(nn.Module):
    """A chain that returns what one of its parts gives, too."""

    def __init__(self, chain: TorchChain, part: str) -> None:
        super().__init__()
        self.chain, self.part = chain, part

    def forward(self, x):
        hidden = None
        for name in self.chain.order:
            x = getattr(self.chain, name)(x)
            hidden = x if name == self.part else hidden
        return x, hidden


class LinenReturns(linen.Module):
    """The same in linen; the part by its number."""

    parts: tuple[Callable, ...]
    part: int

    @linen.compact
    def __call__(self, x, train: bool):
        hidden = None
        for i, part in enumerate(self.parts):
            x = part(x, train)
            hidden = x if i == self.part else hidden
        return x, hidden


def alone(early: str):
    """Before a layer norm, or behind it."""
    torch.manual_seed(0)
    parts = {"fc1": nn.Linear(6, 8), "act": nn.Tanh(), "norm": nn.LayerNorm(8), "fc2": nn.Linear(8, 4)}
    made = (
        layer(linen.Dense, 8), function(linen.tanh), layer(linen.LayerNorm, epsilon=1e-5), layer(linen.Dense, 4)
    )  # fmt: skip
    names = ("act", "norm")
    torch_part, flax_part = names if early == "torch" else names[::-1]
    return planted(
        TorchReturns(TorchChain(parts), torch_part),
        LinenReturns(made, list(parts).index(flax_part)),
        vectors(6),
        train=False,
    )


def deep(early: str):
    """Before the batch norm of the second of three blocks, or behind it."""
    torch.manual_seed(0)
    chain, names = deep_torch(), ("conv2", "bn2")
    torch_part, flax_part = names if early == "torch" else names[::-1]
    return planted(
        TorchReturns(chain, torch_part),
        LinenReturns(deep_linen().parts, chain.order.index(flax_part)),
        images(),
        train=True,
    )


def cases() -> Iterator[Case]:
    """Every case."""
    for wing in "torch", "flax":
        yield Case("output-taken-early", wing, "alone", "norm", lambda wing=wing: alone(wing))
        yield Case("output-taken-early", wing, "deep", "norm", lambda wing=wing: deep(wing))
