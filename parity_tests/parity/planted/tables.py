"""A row of an embedding's table that one side does not train: PyTorch's padding_idx, or a mask by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from parity_tests.parity.planted.chain import Case, planted
from parity_tests.parity.planted.positions import WIDTH, LinenBlock, TorchBlock

WORDS, PADDING = 15, 1


def stopped(ids, y):
    """Without a gradient where the word is padding."""
    return jnp.where((ids == PADDING)[..., None], jax.lax.stop_gradient(y), y)


class TorchText(nn.Module):
    """A table, and blocks and a head behind it; a head of the table itself."""

    def __init__(self, padding: int | None, blocks: int, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
        self.blocks = nn.Sequential(*(TorchBlock("before") for _ in range(blocks)))
        if blocks:
            self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        y = self.blocks(self.words(ids))
        return self.head(y) if len(self.blocks) else y


class OwnEmbed(linen.Embed):
    """A table that stops the gradient itself."""

    def __call__(self, inputs):
        return stopped(inputs, super().__call__(inputs))


class LinenText(linen.Module):
    """The same in linen; `masked`: "", "behind" the table or "within" it."""

    masked: str
    blocks: int
    tied: bool = False

    @linen.compact
    def __call__(self, ids):
        words = (OwnEmbed if self.masked == "within" else linen.Embed)(WORDS, WIDTH, name="words")
        y = words(ids)
        y = stopped(ids, y) if self.masked == "behind" else y
        for i in range(self.blocks):
            y = LinenBlock("before", name=f"blocks_{i}")(y)
        if not self.blocks:
            return y
        return words.attend(y) if self.tied else linen.Dense(WORDS, use_bias=False, name="head")(y)


class TorchTwo(nn.Module):
    """A table and a linear layer."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH, padding_idx=padding), nn.Linear(WIDTH, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.words(ids)))


class NnxTwo(nnx.Module):
    """The same in NNX."""

    def __init__(self, masked: bool) -> None:
        rngs = nnx.Rngs(0)
        self.words, self.head = nnx.Embed(WORDS, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 3, rngs=rngs)
        self.masked = masked

    def __call__(self, ids):
        y = self.words(ids)
        return self.head(jnp.tanh(stopped(ids, y) if self.masked else y))


def words() -> np.ndarray:
    """Of two of four texts the end is padding."""
    ids = np.random.default_rng(0).integers(2, WORDS, (4, 6)).astype(np.int32)
    ids[1, 4:] = ids[2, 2:] = PADDING
    return ids


def made(torch_module: nn.Module, flax_module: Any, **options: Any):
    """The pair, with random weights, in training."""
    return planted(torch_module, flax_module, words(), train=True, **options)


def cases() -> Iterator[Case]:
    """Every case: where PyTorch has the row and Flax has not, and the other way round."""
    for wing in "torch", "flax":
        padding, masked = (None, "behind") if wing == "torch" else (PADDING, "")

        def case(depth: str, variant: str, make: Any, wing: str = wing) -> Case:
            return Case("padding-index", wing, depth, variant, make, ("words",), "backward")

        for depth, blocks in (("alone", 0), ("deep", 2)):
            make = lambda p=padding, m=masked, n=blocks: made(TorchText(p, n), LinenText(m, n))  # noqa: E731
            yield case(depth, "", make)
        yield case("deep", "tied", lambda p=padding, m=masked: made(TorchText(p, 2, True), LinenText(m, 2, True)))
        yield case("deep", "nnx", lambda p=padding, m=masked: made(TorchTwo(p), NnxTwo(bool(m))))
    yield Case(
        "padding-index",
        "torch",
        "deep",
        "within",
        lambda: made(TorchText(None, 2), LinenText("within", 2)),
        ("words",),
        "backward",
    )
