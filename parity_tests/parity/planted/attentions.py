"""Attention by hand, alone and in a small transformer, and the ways to write it wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from parity_tests.parity.planted.chain import Case, planted

WIDTH, LENGTH, WORDS = 12, 6, 20
WHERE = {"alone": ("proj",), "deep": ("blocks.1.attention.proj",)}


class How(NamedTuple):
    """One way of writing it.

    Attributes:
      heads: how many.
      split: how one projection's channels are read: "3hd" and so on; "" for three projections.
      order: of query, key and value in one projection.
      few: heads of key and value; 0: as many.
      repeated: "each" or "all", where these are fewer.
      rotary: "halves", "pairs" or "".
      scale: "root" (1/sqrt(d)), or a number.
      causal: on which diagonal the mask ends; None: none.
      padding: "hidden", "seen" or "inverted".
      axis: of the softmax of [N, H, Q, K].
    """

    heads: int = 3
    split: str = "3hd"
    order: str = "qkv"
    few: int = 0
    repeated: str = "each"
    rotary: str = ""
    scale: Any = "root"
    causal: int | None = 0
    padding: str = "hidden"
    axis: int = -1

    def keep(self, shown: np.ndarray | Any, arange: Any, ones: Any) -> Any:
        """[N, 1, Q, K] of bool."""
        places = arange(shown.shape[1])
        last = shown.shape[1] if self.causal is None else self.causal
        keep = ((places[None] - places[:, None]) <= last)[None, None]
        visible = {"hidden": shown, "inverted": ~shown, "seen": ones(shown)}[self.padding]
        return keep & visible[:, None, None]

    def factor(self, size: int) -> float:
        return size**-0.5 if self.scale == "root" else float(self.scale)


def angles(length: int, size: int) -> np.ndarray:
    """[L, 1, d/2]."""
    return np.outer(np.arange(length), 10000.0 ** (-np.arange(0, size, 2) / size))[:, None]


def turned(x, how: str, xp, join, stack):
    """Rotary embeddings of [N, L, H, d]."""
    if not how:
        return x
    angle = angles(x.shape[1], x.shape[-1])
    cos, sin = xp(np.cos(angle)), xp(np.sin(angle))
    half = x.shape[-1] // 2
    a, b = (x[..., :half], x[..., half:]) if how == "halves" else (x[..., ::2], x[..., 1::2])
    both = a * cos - b * sin, a * sin + b * cos
    return join(both) if how == "halves" else stack(both).reshape(x.shape)


def parts(y, how: How, move):
    """Query, key and value [N, L, H, d] of one projection."""
    sizes = {"3": 3, "h": how.heads, "d": y.shape[-1] // 3 // how.heads}
    y = y.reshape(*y.shape[:2], *(sizes[letter] for letter in how.split))
    y = move(y, tuple(2 + how.split.index(letter) for letter in "3hd"))
    return [y[how.order.index(letter)] for letter in "qkv"]


class TorchAttention(nn.Module):
    def __init__(self, how: How) -> None:
        super().__init__()
        self.how = how
        if how.split:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            few = WIDTH // how.heads * (how.few or how.heads)
            self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, few), nn.Linear(WIDTH, few)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, shown):
        how, (n, length, _) = self.how, x.shape
        if how.split:
            q, k, v = parts(self.qkv(x), how, lambda y, axes: y.permute(axes[0], 0, 1, *axes[1:]))
        else:
            q, k, v = (f(x).reshape(n, length, -1, WIDTH // how.heads) for f in (self.q, self.k, self.v))
        if how.few:
            times = how.heads // how.few
            again = (lambda y: y.repeat_interleave(times, 2)) if how.repeated == "each" else (
                lambda y: y.repeat(1, 1, times, 1))  # fmt: skip
            k, v = again(k), again(v)
        q, k = (
            turned(y, how.rotary, x.new_tensor, lambda b: torch.cat(b, -1), lambda b: torch.stack(b, -1))
            for y in (q, k)
        )
        logits = torch.einsum("nqhd,nkhd->nhqk", q, k) * how.factor(q.shape[-1])
        weights = logits.masked_fill(~how.keep(shown, torch.arange, torch.ones_like), -1e30).softmax(how.axis)
        return self.proj(torch.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, length, -1))


class LinenAttention(linen.Module):
    how: How

    @linen.compact
    def __call__(self, x, shown):
        how, (n, length, _) = self.how, x.shape
        if how.split:
            y = linen.Dense(3 * WIDTH, name="qkv")(x)
            q, k, v = parts(y, how, lambda y, axes: y.transpose(axes[0], 0, 1, *axes[1:]))
        else:
            few = WIDTH // how.heads * (how.few or how.heads)
            made = [linen.Dense(size, name=name)(x) for name, size in (("q", WIDTH), ("k", few), ("v", few))]
            q, k, v = (y.reshape(n, length, -1, WIDTH // how.heads) for y in made)
        if how.few:
            times = how.heads // how.few
            again = (lambda y: jnp.repeat(y, times, 2)) if how.repeated == "each" else (
                lambda y: jnp.tile(y, (1, 1, times, 1)))  # fmt: skip
            k, v = again(k), again(v)
        q, k = (
            turned(y, how.rotary, lambda a: jnp.asarray(a, x.dtype), lambda b: jnp.concatenate(b, -1),
                   lambda b: jnp.stack(b, -1))
            for y in (q, k)
        )  # fmt: skip
        logits = jnp.einsum("nqhd,nkhd->nhqk", q, k) * how.factor(q.shape[-1])
        weights = jax.nn.softmax(jnp.where(how.keep(shown, jnp.arange, jnp.ones_like), logits, -1e30), axis=how.axis)
        return linen.Dense(WIDTH, name="proj")(jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, length, -1))


class TorchBlock(nn.Module):
    def __init__(self, how: How) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = TorchAttention(how)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, shown):
        x = x + self.attention(self.norm1(x), shown)
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class LinenBlock(linen.Module):
    how: How

    @linen.compact
    def __call__(self, x, shown):
        x = x + LinenAttention(self.how, name="attention")(linen.LayerNorm(epsilon=1e-5, name="norm1")(x), shown)
        y = linen.Dense(2 * WIDTH, name="fc1")(linen.LayerNorm(epsilon=1e-5, name="norm2")(x))
        return x + linen.Dense(WIDTH, name="fc2")(linen.gelu(y, approximate=False))


class TorchTransformer(nn.Module):
    """Word 0 is padding; the second of three blocks is written in this way."""

    def __init__(self, how: How, right: How) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([TorchBlock(h) for h in (right, how, right)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x, ids != 0)
        return self.head(self.norm(x))


class LinenTransformer(linen.Module):
    how: How
    right: How

    @linen.compact
    def __call__(self, ids):
        x = linen.Embed(WORDS, WIDTH, name="words")(ids)
        for i, how in enumerate((self.right, self.how, self.right)):
            x = LinenBlock(how, name=f"blocks_{i}")(x, ids != 0)
        return linen.Dense(WORDS, name="head")(linen.LayerNorm(epsilon=1e-5, name="norm")(x))


def inputs(seed: int = 0):
    """Ids [N, L] whose last ones are padding, in two of four sentences."""
    ids = np.random.default_rng(seed).integers(1, WORDS, (4, LENGTH)).astype(np.int32)
    ids[1, 4:] = ids[2, 3:] = 0
    return ids


def made(depth: str, wing: str, right: How, wrong: How):
    """The pair, of which this wing is wrong."""

    def make():
        torch.manual_seed(0)
        first, second = (wrong, right) if wing == "torch" else (right, wrong)
        if depth == "deep":
            module, flax_module = TorchTransformer(first, right), LinenTransformer(second, right)
            return planted(module, flax_module, inputs(), train=False)
        x = np.random.default_rng(0).normal(size=(4, LENGTH, WIDTH)).astype(np.float32)
        given = (x, inputs() != 0)
        return planted(TorchAttention(first), LinenAttention(second), given, train=False, flax_inputs=given)

    return make


# code, variant, what is right, what is wrong
WRONG = [
    ("attention-mask", "none", How(), How(causal=None)),
    ("attention-mask", "one-off", How(split=""), How(split="", causal=1)),
    ("attention-mask", "padding-seen", How(causal=None), How(causal=None, padding="seen")),
    ("attention-mask", "padding-inverted", How(causal=None), How(causal=None, padding="inverted")),
    ("attention-scale", "missing", How(), How(scale=1)),
    ("attention-scale", "width", How(rotary="halves"), How(rotary="halves", scale=WIDTH**-0.5)),
    ("attention-scale", "another", How(split="", causal=None), How(split="", causal=None, scale=0.3)),
    ("attention-heads", "count", How(), How(heads=2)),
    ("attention-heads", "split", How(), How(split="h3d")),
    ("attention-heads", "order", How(causal=None), How(causal=None, order="vqk")),
    ("attention-heads", "rotary", How(rotary="halves"), How(rotary="pairs")),
    ("attention-heads", "repeated", How(6, "", few=3), How(6, "", few=3, repeated="all")),
    ("softmax-axis", "queries", How(causal=None, padding="seen"), How(causal=None, padding="seen", axis=-2)),
    ("softmax-axis", "heads", How(split="", causal=None), How(split="", causal=None, axis=1)),
]


def cases() -> Iterator[Case]:
    """Every case."""
    for code, variant, right, wrong in WRONG:
        for wing in "torch", "flax":
            for depth, where in WHERE.items():
                yield Case(code, wing, depth, variant, made(depth, wing, right, wrong), where)
