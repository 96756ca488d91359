"""A ConvNeXt, two vision transformers (nn.MultiheadAttention, and attention written by hand) and a text model."""

from __future__ import annotations

import flax.linen as linen
import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F  # noqa: N812
from flax import nnx
from torch import nn

from parity_tests.parity.zoo.pair import (
    Pair,
    attention,
    bare,
    conv,
    embedding,
    images,
    linear,
    norm,
    rngs,
    tokens,
)


class ChannelsFirstLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    def __init__(self, dim: int, layer_scale: float = 1e-1) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x):
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        x = self.gamma * x
        return shortcut + x.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    def __init__(self, dims=(8, 12), num_classes: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 2, 2), ChannelsFirstLayerNorm(dims[0], eps=1e-6))
        self.stage1 = nn.Sequential(ConvNextBlock(dims[0]), ConvNextBlock(dims[0]))
        self.down = nn.Sequential(ChannelsFirstLayerNorm(dims[0], eps=1e-6), nn.Conv2d(dims[0], dims[1], 2, 2))
        self.stage2 = nn.Sequential(ConvNextBlock(dims[1]))
        self.norm = nn.LayerNorm(dims[1], eps=1e-6)
        self.head = nn.Linear(dims[1], num_classes)

    def forward(self, x):
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean((2, 3))))


class LinenConvNextBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        dim = x.shape[-1]
        y = linen.Conv(dim, (7, 7), padding="SAME", feature_group_count=dim, name="dwconv")(x)
        y = linen.LayerNorm(epsilon=1e-6)(y)
        y = linen.gelu(linen.Dense(4 * dim)(y), approximate=False)
        y = linen.Dense(dim)(y)
        return x + self.param("gamma", linen.initializers.constant(0.1), (dim,)) * y


class LinenConvNext(linen.Module):
    dims: tuple[int, ...] = (8, 12)

    @linen.compact
    def __call__(self, x):
        x = linen.LayerNorm(epsilon=1e-6)(linen.Conv(self.dims[0], (2, 2), (2, 2))(x))
        # The outer one is made first: it is LinenConvNextBlock_0, and called last.
        x = LinenConvNextBlock()(LinenConvNextBlock()(x))
        x = linen.Conv(self.dims[1], (2, 2), (2, 2))(linen.LayerNorm(epsilon=1e-6)(x))
        x = LinenConvNextBlock()(x)
        return linen.Dense(6)(linen.LayerNorm(epsilon=1e-6)(x.mean((1, 2))))


CONVNEXT_TABLE = [
    ("stem.0", "Conv_0", conv),
    ("stem.1", "LayerNorm_0", norm),
    ("down.0", "LayerNorm_1", norm),
    ("down.1", "Conv_1", conv),
    ("norm", "LayerNorm_2", norm),
    ("head", "Dense_0", linear),
]
for _i, _block in enumerate(("stage1.1", "stage1.0", "stage2.0")):
    CONVNEXT_TABLE += [
        (f"{_block}.dwconv", f"LinenConvNextBlock_{_i}/dwconv", conv),
        (f"{_block}.norm", f"LinenConvNextBlock_{_i}/LayerNorm_0", norm),
        (f"{_block}.pwconv1", f"LinenConvNextBlock_{_i}/Dense_0", linear),
        (f"{_block}.pwconv2", f"LinenConvNextBlock_{_i}/Dense_1", linear),
        (_block, f"LinenConvNextBlock_{_i}", bare("gamma")),
    ]


class VitBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class HandVitBlock(VitBlock):
    """Attention as timm has it: one linear layer for query, key and value."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        del self.attn
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        n, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(n, length, dim)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    def __init__(self, block=VitBlock, dim: int = 16, heads: int = 4, patch: int = 4, size: int = 12) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(0.1 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, (size // patch) ** 2 + 1, dim))
        self.blocks = nn.ModuleList([block(dim, heads) for _ in range(2)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class LinenVitBlock(linen.Module):
    heads: int = 4

    @linen.compact
    def __call__(self, x):
        y = linen.LayerNorm(epsilon=1e-5)(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=self.heads)(y, y)
        y = linen.LayerNorm(epsilon=1e-5)(x)
        y = linen.gelu(linen.Dense(2 * x.shape[-1])(y), approximate=False)
        return x + linen.Dense(x.shape[-1])(y)


class LinenHandVitBlock(linen.Module):
    heads: int = 4

    @linen.compact
    def __call__(self, x):
        n, length, dim = x.shape
        qkv = linen.Dense(3 * dim)(linen.LayerNorm(epsilon=1e-5)(x))
        q, k, v = jnp.moveaxis(qkv.reshape(n, length, 3, self.heads, dim // self.heads), 2, 0)
        weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / (dim // self.heads) ** 0.5, axis=-1)
        x = x + linen.Dense(dim)(jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, length, dim))
        y = linen.Dense(2 * dim)(linen.LayerNorm(epsilon=1e-5)(x))
        return x + linen.Dense(dim)(linen.gelu(y, approximate=False))


class LinenVit(linen.Module):
    hand: bool = False
    dim: int = 16
    patch: int = 4

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(self.dim, (self.patch, self.patch), (self.patch, self.patch), padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        cls = self.param("cls_token", linen.initializers.zeros, (1, 1, self.dim))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("pos_embed", linen.initializers.normal(0.02), (1, x.shape[1], self.dim))
        for _ in range(2):
            x = (LinenHandVitBlock if self.hand else LinenVitBlock)()(x)
        return linen.Dense(5)(linen.LayerNorm(epsilon=1e-5)(x)[:, 0])


class NnxVitBlock(nnx.Module):
    def __init__(self, dim: int, heads: int, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(heads, dim, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.fc1 = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.fc2 = nnx.Linear(2 * dim, dim, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False))


class NnxVit(nnx.Module):
    def __init__(self, dim: int = 16, heads: int = 4, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Conv(3, dim, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, dim)))
        self.pos_embed = nnx.Param(jnp.zeros((1, 10, dim)))
        self.blocks = nnx.List([NnxVitBlock(dim, heads, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(dim, 5, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = jnp.concatenate([jnp.tile(self.cls_token[...], (len(x), 1, 1)), x], axis=1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


BARE_VIT = [("", "", bare("cls_token")), ("", "", bare("pos_embed"))]
VIT_TABLE = [
    ("patch_embed", "Conv_0", conv),
    *BARE_VIT,
    ("norm", "LayerNorm_0", norm),
    ("head", "Dense_0", linear),
]
HAND_VIT_TABLE = list(VIT_TABLE)
NNX_VIT_TABLE = [("patch_embed", "embed", conv), *BARE_VIT, ("norm", "norm", norm), ("head", "head", linear)]
for _i in range(2):
    _block, _linen = f"blocks.{_i}", f"LinenVitBlock_{_i}"
    VIT_TABLE += [
        (f"{_block}.norm1", f"{_linen}/LayerNorm_0", norm),
        (f"{_block}.attn", f"{_linen}/MultiHeadDotProductAttention_0", attention(4)),
        (f"{_block}.norm2", f"{_linen}/LayerNorm_1", norm),
        (f"{_block}.mlp.0", f"{_linen}/Dense_0", linear),
        (f"{_block}.mlp.2", f"{_linen}/Dense_1", linear),
    ]
    _linen = f"LinenHandVitBlock_{_i}"
    HAND_VIT_TABLE += [
        (f"{_block}.norm1", f"{_linen}/LayerNorm_0", norm),
        (f"{_block}.qkv", f"{_linen}/Dense_0", linear),
        (f"{_block}.proj", f"{_linen}/Dense_1", linear),
        (f"{_block}.norm2", f"{_linen}/LayerNorm_1", norm),
        (f"{_block}.mlp.0", f"{_linen}/Dense_2", linear),
        (f"{_block}.mlp.2", f"{_linen}/Dense_3", linear),
    ]
    NNX_VIT_TABLE += [
        (f"{_block}.norm1", f"blocks/{_i}/norm1", norm),
        (f"{_block}.attn", f"blocks/{_i}/attn", attention(4)),
        (f"{_block}.norm2", f"blocks/{_i}/norm2", norm),
        (f"{_block}.mlp.0", f"blocks/{_i}/fc1", linear),
        (f"{_block}.mlp.2", f"blocks/{_i}/fc2", linear),
    ]


class TextModel(nn.Module):
    def __init__(self, vocabulary: int = 30, dim: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.ln = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, 24)
        self.ln_out = nn.LayerNorm(24)
        self.out = nn.Linear(24, vocabulary)

    def forward(self, ids):
        x = F.silu(self.hidden(self.ln(self.embed(ids))))
        return self.out(self.ln_out(x).mean(1))


class LinenTextModel(linen.Module):
    @linen.compact
    def __call__(self, ids, deterministic: bool = True):
        x = linen.Embed(30, 12)(ids)
        x = linen.LayerNorm(epsilon=1e-5)(x)
        x = linen.silu(linen.Dense(24)(x))
        x = linen.Dropout(0.1)(x, deterministic=deterministic)
        x = linen.LayerNorm(epsilon=1e-5)(x).mean(1)
        return linen.Dense(30)(x)


TEXT_TABLE = [
    ("embed", "Embed_0", embedding),
    ("ln", "LayerNorm_0", norm),
    ("hidden", "Dense_0", linear),
    ("ln_out", "LayerNorm_1", norm),
    ("out", "Dense_1", linear),
]

PAIRS = [
    Pair("convnext", ConvNext, LinenConvNext, images(3, 12), CONVNEXT_TABLE, flag=""),
    Pair("vit", Vit, LinenVit, images(3, 12), VIT_TABLE, flag=""),
    # jax.nn.dot_product_attention, which NNX calls, takes its softmax in float32 whatever it is given.
    Pair("vit-nnx", Vit, lambda: NnxVit(rngs=rngs()), images(3, 12), NNX_VIT_TABLE, bound=1e-6),
    Pair("vit-hand", lambda: Vit(HandVitBlock), lambda: LinenVit(True), images(3, 12), HAND_VIT_TABLE, flag=""),
    Pair("text", TextModel, LinenTextModel, tokens(7, 30), TEXT_TABLE, flag="deterministic"),
]
