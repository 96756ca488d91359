"""Attention cut otherwise: query, key, value and out as four layers, as one, or the first three in one matrix."""

import warnings

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity
from parity import weights

D, HEADS, LENGTH = 12, 3, 5
X = np.random.default_rng(0).normal(size=(2, LENGTH, D)).astype(np.float32)


class Conv1D(nn.Module):
    """GPT-2's: the matrix is [in, out]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Fused(nn.Module):
    def __init__(self, order="blocks", linear=nn.Linear):
        super().__init__()
        self.qkv, self.proj, self.order = linear(D, 3 * D), nn.Linear(D, D), order

    def forward(self, x):
        y = self.qkv(x)
        if self.order == "heads":  # GPT-NeoX's
            q, k, v = y.unflatten(-1, (HEADS, 3, -1)).unbind(-2)
        elif self.order == "turns":
            q, k, v = y.unflatten(-1, (HEADS, -1, 3)).unbind(-1)
        else:
            q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in y.chunk(3, -1))
        if self.order == "kqv":
            q, k = k, q
        return self.proj(attend(*(part.transpose(1, 2) for part in (q, k, v))))


class Separate(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        layers = self.q_proj, self.k_proj, self.v_proj
        return self.out_proj(attend(*(layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in layers)))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(D, HEADS, batch_first=True)
        nn.init.normal_(self.attn.in_proj_bias)
        nn.init.normal_(self.attn.out_proj.bias)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


TORCH = {
    "fused": Fused,
    "fused, head by head": lambda: Fused("heads"),
    "fused, by turns": lambda: Fused("turns"),
    "fused, key first": lambda: Fused("kqv"),
    "fused, [in, out]": lambda: Fused(linear=Conv1D),
    "separate": Separate,
    "whole": Whole,
}


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D, 1e-6), attention()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(torch.tanh(self.up(x)))


def torch_net(kind):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(TORCH[kind]) for _ in range(2)), nn.Linear(D, 4))


class FlaxAttention(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x):
        if self.kind == "whole":
            return linen.MultiHeadDotProductAttention(HEADS, name="attn")(x)
        if self.kind == "fused":
            q, k, v = jnp.split(linen.Dense(3 * D, name="qkv")(x), 3, -1)
        elif self.kind == "fused, head by head":
            q, k, v = jnp.moveaxis(linen.Dense(3 * D, name="qkv")(x).reshape(*x.shape[:2], HEADS, 3, -1), -2, 0)
        elif self.kind == "fused, an axis each":
            q, k, v = jnp.moveaxis(linen.DenseGeneral((3, HEADS, D // HEADS), name="qkv")(x), 2, 0)
        else:
            q, k, v = (linen.Dense(D, name=name)(x) for name in ("query", "key", "value"))
        q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in (q, k, v))
        return linen.Dense(D, name="out")(linen.dot_product_attention(q, k, v).reshape(x.shape))


class FlaxBlock(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x):
        x = x + FlaxAttention(self.kind, name="attention")(linen.LayerNorm(name="norm")(x))
        return x + linen.Dense(D, name="down")(jnp.tanh(linen.Dense(2 * D, name="up")(x)))


class FlaxNet(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(FlaxBlock(self.kind)(FlaxBlock(self.kind)(x)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 2 * D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(jnp.tanh(self.up(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second, self.head = NnxBlock(rngs), NnxBlock(rngs), nnx.Linear(D, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.second(self.first(x)))


FLAX = ["whole", "separate", "fused", "fused, head by head", "fused, an axis each"]


def flax_net(kind):
    return NnxNet(nnx.Rngs(0)) if kind == "nnx" else FlaxNet(kind)


def applied(module, variables, x):
    if isinstance(module, nnx.Module):
        module = nnx.merge(*nnx.split(module))
        nnx.update(module, variables)
        return module(x)
    return module.apply(variables, x)


PAIRS = [(t, f) for t in TORCH for f in (*FLAX, "nnx")]
# A fused matrix on both sides fits as it is: which rows are the queries no shape says, and nothing is moved.
PAIRS = [(t, f) for t, f in PAIRS if not (t.startswith("fused") and f.startswith("fused"))]
USUAL = {("fused", "whole"), ("separate", "nnx"), ("whole", "separate"), ("whole", "fused, an axis each")}
USUAL |= {("separate", "fused, head by head"), ("fused, [in, out]", "separate"), ("fused, key first", "whole")}
PAIRS = [pytest.param(*pair, marks=[] if pair in USUAL else pytest.mark.thorough) for pair in PAIRS]


@pytest.mark.parametrize(("t", "f"), PAIRS)
def test_attention_is_carried_both_ways(t, f):
    mine, theirs = torch_net(t), flax_net(f)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables = weights.to_flax(mine, theirs, inputs=[X], flax_inputs=[X])
        state = weights.to_torch(variables, torch_net(t), flax_module=theirs, inputs=[X], flax_inputs=[X])
    truth = mine(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(applied(theirs, variables, jnp.asarray(X)), truth, rtol=0, atol=1e-5)
    assert state.keys() == mine.state_dict().keys()
    for name, v in mine.state_dict().items():
        assert torch.equal(state[name], v), name


@pytest.mark.parametrize(("t", "f"), PAIRS)
def test_check_compares_attention_that_is_cut_otherwise(t, f):
    report = parity.check(torch_net(t), flax_net(f), X, flax_inputs=[X])
    assert report.ok, str(report)


def exchanged(variables, first, second):
    """Two layers' variables of the first block exchanged, as a conversion by hand may do."""

    def swap(tree):
        if first in tree:
            return {**tree, first: tree[second], second: tree[first]}
        return {name: swap(v) if isinstance(v, dict) else v for name, v in tree.items()}

    return swap(jax.tree.map(np.asarray, variables))


@pytest.mark.parametrize(("t", "f"), [("fused", "whole"), ("separate", "whole"), ("whole", "separate")])
def test_key_and_value_exchanged_behind_a_cut_are_named(t, f):
    mine = torch_net(t)
    variables = exchanged(weights.to_flax(mine, flax_net(f), inputs=[X], flax_inputs=[X]), "key", "value")
    report = parity.check(mine, flax_net(f), X, flax_inputs=[X], variables=variables)
    assert not report.ok
    told = " ".join(d.evidence for d in report.diagnoses)
    assert "key holds PyTorch's" in told, str(report)
    assert {d.code for d in report.diagnoses} == {"weight-order"}, str(report)


def test_a_mistake_beside_a_cut_is_named():
    class Wrong(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = x + linen.MultiHeadDotProductAttention(HEADS)(linen.LayerNorm(1e-2)(x))
            return linen.Dense(4)(x)

    class Right(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention, self.head = nn.LayerNorm(D, 1e-6), Fused(), nn.Linear(D, 4)

        def forward(self, x):
            return self.head(x + self.attention(self.norm(x)))

    torch.manual_seed(0)
    report = parity.check(Right(), Wrong(), X, flax_inputs=[X])
    assert [d.code for d in report.diagnoses] == ["epsilon"], str(report)


def test_a_cut_that_no_numbers_show_is_told():
    """Without a run nothing is cut; where the networks differ, too, it is a guess, and said to be one."""

    class NoAttention(linen.Module):
        @linen.compact
        def __call__(self, x):
            q, k, v = (linen.Dense(D, name=name)(x) for name in ("query", "key", "value"))
            return linen.Dense(D, name="out")(q * jnp.sin(k) + v)

    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"(?s)qkv.weight is left over.*it may be that query, key and value are cut from qkv"
    ):
        weights.to_flax(Fused().state_dict(), linen.MultiHeadDotProductAttention(HEADS), inputs=[X], flax_inputs=[X])
    with pytest.warns(weights.ParityWarning, match="query, key and value are cut from qkv.* as it is guessed"):
        weights.to_flax(Fused(), NoAttention(), inputs=[X], flax_inputs=[X])
    report = parity.check(Fused(), NoAttention(), X, flax_inputs=[X])
    assert not report.ok
    assert any("guessed" in note for note in report.notes)
