"""Positions of words that count padding, or begin at another number."""

from __future__ import annotations

from collections.abc import Iterator

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from parity_tests.parity.planted.chain import Case, planted
from parity_tests.parity.planted.positions import WIDTH, LinenBlock, TorchBlock

WORDS, PADDING = 15, 1


def positions(ids, how: str, arange, cumsum):
    """As RoBERTa counts them: from 2, and 1 at padding; or as BERT."""
    if how == "words":
        shown = ids != PADDING
        return cumsum(shown) * shown + PADDING
    return arange(ids.shape[1]) + (0 * ids + (2 if how == "all from 2" else 0))


class TorchWords(nn.Module):
    def __init__(self, how: str, blocks: int) -> None:
        super().__init__()
        self.how = how
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(12, WIDTH)
        self.blocks = nn.Sequential(*(TorchBlock("before") for _ in range(blocks)))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids):
        places = positions(ids, self.how, torch.arange, lambda x: x.cumsum(1))
        return self.head(self.blocks(self.words(ids) + self.places(places)))


class LinenWords(linen.Module):
    how: str
    blocks: int

    @linen.compact
    def __call__(self, ids):
        places = positions(ids, self.how, jnp.arange, lambda x: jnp.cumsum(x, 1, dtype=ids.dtype))
        x = linen.Embed(WORDS, WIDTH, name="words")(ids) + linen.Embed(12, WIDTH, name="places")(places)
        for i in range(self.blocks):
            x = LinenBlock("before", name=f"blocks_{i}")(x)
        return linen.Dense(3, name="head")(x)


def made(wing: str, right: str, wrong: str, blocks: int):
    """The pair, of which this wing counts wrongly."""
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(2, WORDS, (4, 6)).astype(np.int32)
    ids[1, 4:] = ids[2, 2:] = PADDING
    first, second = (wrong, right) if wing == "torch" else (right, wrong)
    return planted(TorchWords(first, blocks), LinenWords(second, blocks), ids, train=False)


def cases() -> Iterator[Case]:
    """Every case."""
    for variant, right, wrong in (("padding", "words", "all from 2"), ("start", "all", "all from 2")):
        for wing in "torch", "flax":
            for depth, blocks in (("alone", 0), ("deep", 2)):
                make = lambda args=(wing, right, wrong, blocks): made(*args)  # noqa: E731
                yield Case("position-ids", wing, depth, variant, make, ("places",))
