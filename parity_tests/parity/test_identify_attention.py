"""Attention by hand between its projections: each mistake in either wing, silence on correct pairs, near misses."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity
from parity.diagnosis.between.chains import Source
from parity.diagnosis.between.family import findings

F = torch.nn.functional
SWAP = pytest.mark.parametrize("swap", [False, True], ids=["flax", "torch"])
N, LENGTH, HEADS, SIZE = 4, 7, 3, 4
WIDTH = HEADS * SIZE


def projected(length=LENGTH, width=3 * WIDTH, seed=0):
    return np.random.default_rng(seed).normal(size=(N, length, width))


def heads(u, count=HEADS, split="3hd"):
    """Query, key and value [N, H, L, d]."""
    sizes = {"3": 3, "h": count, "d": u.shape[-1] // 3 // count}
    y = torch.from_numpy(u).reshape(*u.shape[:2], *(sizes[letter] for letter in split))
    return y.permute(2 + split.index("3"), 0, 2 + split.index("h"), 1, 2 + split.index("d"))


def attended(q, k, v, **options):
    y = F.scaled_dot_product_attention(q, k, v, **options)
    return y.transpose(1, 2).reshape(*y.transpose(1, 2).shape[:2], -1).numpy()


def weighted(q, k, v, weights):
    """The same with weights of one's own, a function of q k^T / sqrt(d)."""
    y = weights(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5) @ v
    return y.transpose(1, 2).reshape(*y.transpose(1, 2).shape[:2], -1).numpy()


def codes(sources, first, second, swap=False, masks=()):
    found = findings(sources, *((second, first) if swap else (first, second)), train=False, masks=masks)
    return [finding.code for finding in found]


def given(u):
    return [Source("the output of qkv", u), Source("the output of norm", projected(u.shape[1], WIDTH, 1))]


def triangle(diagonal, queries=LENGTH, keys=LENGTH):
    return torch.ones(queries, keys, dtype=torch.bool).tril(diagonal)


IDS = np.array([[3, 4, 5, 6, 3, 5, 9], [2, 4, 5, 0, 0, 0, 0], [7, 4, 5, 3, 8, 0, 0], [6, 4, 0, 0, 0, 0, 0]])
SHOWN = torch.from_numpy(IDS != 0)[:, None, None]
MASKS = {
    "none": (None, triangle(0)),
    "one ahead": (triangle(0), triangle(1)),
    "the other way round": (triangle(0), triangle(0).T),
    "a window": (triangle(0), triangle(0) & ~triangle(-3)),
    "a window one off": (triangle(0) & ~triangle(-3), triangle(0) & ~triangle(-2)),
    "padding seen": (SHOWN, None),
    "padding inverted": (SHOWN, torch.where(SHOWN, -1e30, 0.0)),
    "padding seen, causal": (SHOWN & triangle(0), triangle(0)),
}


@pytest.mark.parametrize("name", MASKS)
@SWAP
def test_mask(name, swap):
    u = projected()
    sides = [
        attended(*heads(u), attn_mask=m if m is None or m.dtype == torch.bool else m.double()) for m in MASKS[name]
    ]
    ids, shown = Source("input 1", IDS), Source("input 1", IDS != 0)
    lengths = Source("input 2", (IDS != 0).sum(1))
    for masks in [[ids], [shown], [lengths]] if "padding" in name else [[], [ids]]:
        assert codes(given(u), *sides, swap, masks) == ["attention-mask"]


@SWAP
def test_the_corner_of_the_causal_mask(swap):
    """With more keys than queries the diagonal begins in the first corner or ends in the last."""
    kv, q = projected(9, 2 * WIDTH, 2), projected(LENGTH, WIDTH, 3)
    sources = [Source("the output of v", kv[..., WIDTH:]), Source("the output of k", kv[..., :WIDTH]),
               Source("the output of q", q)]  # fmt: skip
    three = [torch.from_numpy(s.value).reshape(N, -1, HEADS, SIZE).transpose(1, 2) for s in sources[::-1]]
    sides = [attended(*three, attn_mask=triangle(corner, LENGTH, 9)) for corner in (0, 2)]
    assert codes(sources, *sides, swap) == ["attention-mask"]


@SWAP
def test_queries_of_another_text_than_the_keys(swap):
    """In cross-attention the last projections before the result are as long as the other text."""
    made = {name: projected(length, WIDTH, seed) for seed, (name, length) in enumerate(
        (("q", LENGTH), ("self", LENGTH), ("k", 9), ("v", 9)))}  # fmt: skip
    q, _, k, v = (torch.from_numpy(a).reshape(N, -1, HEADS, SIZE).transpose(1, 2) for a in made.values())
    sources = [Source(f"the output of {name}", a) for name, a in reversed(made.items())]
    sources.append(Source("the output of qkv", projected(9)))
    assert codes(sources, attended(q, k, v), attended(q, k, v, scale=1.0), swap) == ["attention-scale"]
    alike = attended(q, k, v)[:, ::-1]  # nothing that attention of these gives
    assert codes(sources, attended(q, k, v), alike, swap) == ["unexplained"]


@SWAP
def test_keys_and_values_of_one_projection(swap):
    """Of the Perceiver: queries of the latents, keys and values side by side of the other text."""
    both, q = projected(9, 2 * WIDTH, 2), projected(LENGTH, WIDTH, 3)
    parts = q, both[..., :WIDTH], both[..., WIDTH:]
    sources = [Source("the output of to_kv", both), Source("the output of to_q", q)]
    for order in sources, sources[::-1]:
        q, k, v = (torch.from_numpy(a).reshape(N, -1, HEADS, SIZE).transpose(1, 2) for a in parts)
        right = attended(q, k, v)
        assert codes(order, right, attended(q, k, v, scale=0.3), swap) == ["attention-scale"]
        assert codes(order, right, attended(q, v, k), swap) == ["attention-heads"]
        assert codes(order, right, weighted(q, k, v, lambda a: a.softmax(-2)), swap) == ["softmax-axis"]
        assert codes(order, right, weighted(q, k, v, lambda a: a.softmax(1)), swap) == ["softmax-axis"]
        other = attended(*(a.reshape(N, -1, 2, 6).transpose(1, 2) for a in map(torch.from_numpy, parts)))
        assert codes(order, right, other, swap) == ["attention-heads"]
        assert codes(order, right, right[:, ::-1], swap) == ["unexplained"]


@SWAP
def test_what_is_no_mask(swap):
    """A bias that grows with the distance, and weights dropped at random."""
    u, rng = projected(), np.random.default_rng(5)
    right = attended(*heads(u), attn_mask=triangle(0))
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    bias = torch.where(triangle(0), -0.25 * distance, -torch.inf).double()
    assert codes(given(u), right, attended(*heads(u), attn_mask=bias), swap) == ["unexplained"]
    kept = torch.from_numpy(rng.uniform(size=(N, HEADS, LENGTH, LENGTH)) > 0.3)
    dropped = weighted(*heads(u), lambda a: a.masked_fill(~triangle(0), -torch.inf).softmax(-1) * kept)
    assert codes(given(u), right, dropped, swap) == ["unexplained"]


@SWAP
def test_correct_pairs(swap):
    """The same in another order of adding, and a mask of zeros and ones against one of large negative numbers."""
    u = projected()
    right = attended(*heads(u), attn_mask=triangle(0))
    noise = 1 + 1e-14 * np.random.default_rng(1).normal(size=right.shape)
    assert codes(given(u), right, right * noise, swap) == []
    added = attended(*heads(u), attn_mask=torch.where(triangle(0), 0.0, -1e9).double())
    assert codes(given(u), right, added, swap) == []


@pytest.mark.parametrize("scale", [1.0, WIDTH**-0.5, 1 / SIZE, 0.3141592653589793])
@SWAP
def test_scale(scale, swap):
    u = projected()
    for mask in None, triangle(0):
        sides = [attended(*heads(u), attn_mask=mask, scale=s) for s in (None, scale)]
        (found,) = findings(given(u), *sides[:: -1 if swap else 1], train=False)
        assert found.code == "attention-scale"
        assert f"{scale:.6g}" in found.evidence
        assert "1/sqrt(4)" in found.evidence
    # A mask left out beside it is seen, too.
    assert codes(given(u), attended(*heads(u)), sides[1], swap) == ["attention-scale", "attention-mask"]


@SWAP
def test_what_is_no_scale(swap):
    """Another factor for each head, and products that are capped."""
    u = projected()
    right = attended(*heads(u))
    factors = torch.tensor([0.5, 1.0, 2.0]).double()[:, None, None]
    assert codes(given(u), right, weighted(*heads(u), lambda a: (factors * a).softmax(-1)), swap) == ["unexplained"]
    capped = weighted(*heads(u), lambda a: (2 * torch.tanh(a / 2)).softmax(-1))
    assert codes(given(u), right, capped, swap) == ["unexplained"]


def rotated(x, how, frequencies):
    """[N, H, L, d], by halves or by neighbouring pairs."""
    angle = torch.outer(torch.arange(x.shape[2]).double(), frequencies)
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.stack(x.chunk(2, -1), -1) if how == "halves" else x.unflatten(-1, (-1, 2))
    y = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return torch.cat(y.unbind(-1), -1) if how == "halves" else y.flatten(-2)


def frequencies(base):
    return base ** (-torch.arange(0, SIZE, 2).double() / SIZE)


@pytest.mark.parametrize("split", ["h3d", "3dh", "d3h", "hd3", "dh3"])
@SWAP
def test_split(split, swap):
    u = projected()
    for mask in None, triangle(0):
        sides = [attended(*heads(u, split=s), attn_mask=mask) for s in ("3hd", split)]
        assert codes(given(u), *sides, swap) == ["attention-heads"]


@SWAP
def test_heads(swap):
    """Another number of heads; query, key and value in another order; heads joined in another order."""
    u = projected()
    q, k, v = heads(u)
    right = attended(q, k, v)
    assert codes(given(u), right, attended(*heads(u, 2)), swap) == ["attention-heads"]
    assert codes(given(u), right, attended(k, v, q), swap) == ["attention-heads"]
    assert codes(given(u), right, attended(k, q, v), swap) == ["attention-heads"]
    joined = right.reshape(N, LENGTH, HEADS, SIZE).swapaxes(2, 3).reshape(right.shape)
    assert codes(given(u), right, joined, swap) == ["attention-heads"]
    # With the scale of the other number of heads, that is two.
    both = attended(*heads(u, 2), scale=1.0)
    assert set(codes(given(u), right, both, swap)) == {"attention-heads", "attention-scale"}


@pytest.mark.parametrize("base", [1e4, 5e5])
@SWAP
def test_rotary(base, swap):
    u = projected()
    q, k, v = heads(u)
    sides = [attended(*(rotated(x, how, frequencies(base)) for x in (q, k)), v) for how in ("halves", "pairs")]
    assert codes(given(u), *sides, swap) == ["attention-heads"]
    # None at all, or another base, is told, and is none of the heads.
    assert codes(given(u), sides[0], attended(q, k, v), swap) == ["unexplained"]
    other = attended(*(rotated(x, "halves", frequencies(1e3)) for x in (q, k)), v)
    found, *_ = findings(given(u), *(other, sides[0])[:: -1 if swap else 1], train=False)
    assert found.code == "unexplained"
    assert "with base 1000" in found.evidence


@SWAP
def test_shared_keys_and_values(swap):
    """Two heads of keys and values for four of queries."""
    made = {name: projected(LENGTH, width, seed) for seed, (name, width) in enumerate((("q", 16), ("k", 8), ("v", 8)))}
    q, k, v = (torch.from_numpy(a).reshape(N, LENGTH, -1, SIZE).transpose(1, 2) for a in made.values())
    sides = [attended(q, *(f(x) for x in (k, v))) for f in
             (lambda x: x.repeat_interleave(2, 1), lambda x: x.repeat(1, 2, 1, 1))]  # fmt: skip
    sources = [Source(f"the output of {name}", a) for name, a in reversed(made.items())]
    assert codes(sources, *sides, swap) == ["attention-heads"]
    assert codes(sources, sides[0], attended(q, k.repeat_interleave(2, 1), v.repeat(1, 2, 1, 1)), swap) == [
        "unexplained"
    ]


@SWAP
def test_what_is_no_other_heads(swap):
    """Channels in no order at all, and rotary embeddings of other frequencies."""
    u = projected()
    q, k, v = heads(u)
    shuffled = np.random.default_rng(1).permutation(WIDTH)
    right = attended(q, k, v)
    assert codes(given(u), right, attended(q, k, v)[..., shuffled], swap) == ["unexplained"]
    odd = attended(*(rotated(x, "pairs", torch.tensor([1.0, 0.3]).double()) for x in (q, k)), v)
    rotary = attended(*(rotated(x, "halves", frequencies(1e4)) for x in (q, k)), v)
    assert codes(given(u), rotary, odd, swap) == ["unexplained"]


@SWAP
def test_axis(swap):
    u = projected()
    sides = [weighted(*heads(u), lambda a, axis=axis: a.softmax(axis)) for axis in (-1, -2, 1)]
    assert codes(given(u), sides[0], sides[1], swap) == ["softmax-axis"]
    assert codes(given(u), sides[0], sides[2], swap) == ["softmax-axis"]
    assert codes(given(u), sides[1], sides[2], swap) == ["softmax-axis"]


@SWAP
def test_what_is_no_other_axis(swap):
    """A softmax over queries and keys at once, and a sigmoid."""
    u = projected()
    right = weighted(*heads(u), lambda a: a.softmax(-1))
    whole = weighted(*heads(u), lambda a: a.flatten(-2).softmax(-1).reshape(a.shape))
    assert codes(given(u), right, whole, swap) == ["unexplained"]
    assert codes(given(u), right, weighted(*heads(u), torch.sigmoid), swap) == ["unexplained"]


class Library(nn.Module):
    """nn.MultiheadAttention, which hides what its mask says; Flax's shows it."""

    def __init__(self, diagonal=1, padding=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.diagonal, self.padding = diagonal, padding

    def forward(self, x, shown):
        hidden = None if self.diagonal is None else torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(self.diagonal)
        y = self.attention(x, x, x, attn_mask=hidden, key_padding_mask=~shown if self.padding else None)
        return y[0]


class LinenLibrary(linen.Module):
    inverted: bool = False
    biased: float = 0.0

    @linen.compact
    def __call__(self, x, shown):
        mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None] & shown[:, None, None]
        mask = ~mask if self.inverted else mask
        x = x + self.biased * jnp.roll(x, 1, 1)
        return linen.MultiHeadDotProductAttention(HEADS)(x, mask=mask)


@pytest.mark.parametrize(
    ("module", "flax_module", "expected"),
    [
        (Library(), LinenLibrary(), []),
        (Library(diagonal=None), LinenLibrary(), ["attention-mask"]),
        (Library(diagonal=2), LinenLibrary(), ["attention-mask"]),
        (Library(padding=False), LinenLibrary(), ["attention-mask"]),
        (Library(), LinenLibrary(biased=0.5), ["unexplained"]),
    ],
)
def test_a_librarys_attention(module, flax_module, expected):
    """Its projections are inside; where it is given something else, that is told and no mask."""
    x = np.random.default_rng(0).normal(size=(N, LENGTH, WIDTH)).astype(np.float32)
    given = (x, IDS != 0)
    report = parity.check(module, flax_module, *given, flax_inputs=given, train=False)
    assert [d.code for d in report.diagnoses] == expected
    assert report.ok == (not expected)
