"""Norms before the branches of a network of sums, or behind the sums."""

from __future__ import annotations

from collections.abc import Iterator

import flax.linen as linen
import torch
from torch import nn

from parity_tests.parity.planted.chain import Case, planted, vectors

WIDTH = 12


class TorchBlock(nn.Module):
    """x + f(norm(x)), or norm(x + f(x)), or x + norm(f(x)), or norm(x + f(x) / 2)."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def branch(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))

    def forward(self, x):
        if self.where == "before":
            return x + self.branch(self.norm(x))
        if self.where == "inside":
            return x + self.norm(self.branch(x))
        return self.norm(x + self.branch(x) * (0.5 if self.where == "half" else 1))


class TorchBlocks(nn.Module):
    def __init__(self, where: str, count: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.Sequential(*(TorchBlock(where) for _ in range(count)))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class LinenBlock(linen.Module):
    where: str

    @linen.compact
    def __call__(self, x):
        def branch(y):
            return linen.Dense(WIDTH, name="fc2")(linen.tanh(linen.Dense(20, name="fc1")(y)))

        norm = linen.LayerNorm(epsilon=1e-5, name="norm")
        if self.where == "before":
            return x + branch(norm(x))
        if self.where == "inside":
            return x + norm(branch(x))
        return norm(x + branch(x) * (0.5 if self.where == "half" else 1))


class LinenBlocks(linen.Module):
    where: str
    count: int

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(WIDTH, name="stem")(x)
        for i in range(self.count):
            x = LinenBlock(self.where, name=f"blocks_{i}")(x)
        return linen.Dense(4, name="head")(x)


def made(first: str, second: str, count: int):
    """PyTorch's norms stand there, Flax's there."""
    torch.manual_seed(0)
    return planted(TorchBlocks(first, count), LinenBlocks(second, count), vectors(6), train=True)


def cases() -> Iterator[Case]:
    """Post-norm where the other side has pre-norm, and the other way round."""
    for wing in "torch", "flax":
        for depth, count in (("alone", 1), ("deep", 3)):
            for variant, wrong, right in (("post", "behind", "before"), ("pre", "before", "behind")):
                sides = (wrong, right) if wing == "torch" else (right, wrong)
                make = lambda sides=sides, count=count: made(*sides, count)  # noqa: E731
                yield Case("norm-position", wing, depth, variant, make, ("blocks.0.norm",))
