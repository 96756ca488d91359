"""What lies between two layers: each mistake in either wing, alone and two at once; silence on correct pairs."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.diagnosis.between.activations import activation_of
from parity.diagnosis.between.chains import Source
from parity.diagnosis.between.family import describe, findings

F = torch.nn.functional
SWAP = pytest.mark.parametrize("swap", [False, True], ids=["flax", "torch"])

# PyTorch's activations, and what they are called.
ACTIVATIONS = {
    "identity": lambda x: x,
    "ReLU": F.relu,
    "exact GELU": F.gelu,
    "tanh approximation of GELU": lambda x: F.gelu(x, approximate="tanh"),
    "SiLU": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky ReLU with slope 0.01": F.leaky_relu,
    "leaky ReLU with slope 0.2": lambda x: F.leaky_relu(x, 0.2),
    "ReLU6": F.relu6,
    "ELU": F.elu,
    "ELU with alpha 0.5": lambda x: F.elu(x, 0.5),
    "CELU with alpha 2": lambda x: F.celu(x, 2.0),
    "SELU": F.selu,
    "softplus": F.softplus,
    "softplus with beta 2": lambda x: F.softplus(x, beta=2),
    "hard swish": F.hardswish,
    "hard sigmoid": F.hardsigmoid,
    "hard tanh": F.hardtanh,
    "mish": F.mish,
    "quick GELU x*sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
    "log-sigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "softmax": lambda x: torch.softmax(x, 1),
    "log-softmax": lambda x: torch.log_softmax(x, 1),
    "squared ReLU": lambda x: F.relu(x) ** 2,
    "absolute value": torch.abs,
    "exponential": torch.exp,
    "sine": torch.sin,
    "tanh shrink": F.tanhshrink,
    "softmin": lambda x: torch.softmax(-x, 1),
    "soft shrink with lambda 0.2": lambda x: F.softshrink(x, 0.2),
    "hard shrink with lambda near 0.3": lambda x: F.hardshrink(x, 0.3),
    "threshold near 0.1, 20 below": lambda x: F.threshold(x, 0.1, 20.0),
    "LeCun's 1.7159 tanh(2 x / 3)": lambda x: 1.7159 * torch.tanh(x * (2 / 3)),
}
POOLS = {
    "max2": lambda x: F.max_pool2d(x, 2),
    "avg2": lambda x: F.avg_pool2d(x, 2),
    "max3s2p1": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg3s2p1": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg3s2p1, not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg3s1p1": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "global": lambda x: x.mean((2, 3), keepdim=True),
}


def maps(shape=(6, 8, 8, 5), seed=0):
    return 2 * np.random.default_rng(seed).normal(size=shape)


def through(function, u):
    """A function of PyTorch's (channels second) of u (channels last)."""
    return np.moveaxis(function(torch.from_numpy(np.moveaxis(u, -1, 1).copy())).numpy(), 1, -1)


def sources(u):
    return [
        Source("conv2", u),
        Source("conv1", maps((len(u), 16, 16, 5), 1)),
        Source("input", maps((len(u), 32, 32, 3), 2)),
    ]


def named(given, torch_side, flax_side, swap=False, **options):
    sides = (flax_side, torch_side) if swap else (torch_side, flax_side)
    if swap and "rerun" in options:
        options["rerun"] = options["rerun"][::-1]
    return findings(given, *sides, **{"train": False, **options})


def codes(found):
    return [(finding.code, finding.charges) for finding in found]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of(name):
    u = maps()
    assert activation_of(u, through(ACTIVATIONS[name], u), 1e-9) == name
    assert activation_of(u, maps(seed=1), 1e-9) is None
    assert activation_of(u, u[:1], 1e-9) is None


@pytest.mark.parametrize("one", ["identity", "ReLU", "leaky ReLU with slope 0.2"])
@pytest.mark.parametrize("other", ACTIVATIONS)
@SWAP
def test_activation(one, other, swap):
    if one == other:
        return
    u = maps()
    found = named(sources(u), through(ACTIVATIONS[one], u), through(ACTIVATIONS[other], u), swap)
    assert codes(found) == [("activation", "activation")]
    names = [name if name != "identity" else "no activation" for name in (one, other)]
    first, second = reversed(names) if swap else names
    assert found[0].evidence == f"PyTorch applies {first}, Flax {second}"


@pytest.mark.parametrize(
    ("one", "other"), [("ReLU", "exact GELU"), ("exact GELU", "tanh approximation of GELU"), ("sigmoid", "tanh")]
)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("order", ["activation first", "pool first"])
@SWAP
def test_activation_beside_a_pool(one, other, pool, order, swap):
    u, p = maps(), POOLS[pool]
    sides = []
    for f in (ACTIVATIONS[one], ACTIVATIONS[other]):
        sides.append(through((lambda x, f=f: p(f(x))) if order == "activation first" else (lambda x, f=f: f(p(x))), u))
    assert codes(named(sources(u), *sides, swap)) == [("activation", "activation")]


@pytest.mark.parametrize("kind", [torch.softmax, torch.log_softmax])
@pytest.mark.parametrize("axis", [0, 2, 3, (2, 3)])
@SWAP
def test_softmax_axis(kind, axis, swap):
    u = maps((40, 6, 6, 5))  # more examples than are looked at of anything else

    def over(axis):
        if isinstance(axis, int):
            return through(lambda x: kind(x, axis), u)
        return through(lambda x: kind(x.flatten(2), 2).reshape(x.shape), u)

    found = named(sources(u), over(1), over(axis), swap)
    assert codes(found) == [("softmax-axis", "")]
    # Another factor inside, a sigmoid, and a softmax of something else are none.
    for wrong in (through(lambda x: kind(2 * x, 2), u), through(lambda x: kind(x**3, 2), u)):
        assert codes(named(sources(u), over(1), wrong, swap)) == [("unexplained", "")]
    assert codes(named(sources(u), over(1), through(torch.sigmoid, u), swap)) == [("activation", "activation")]


@pytest.mark.parametrize("two", [False, True], ids=["one projection", "two"])
@SWAP
def test_gate(two, swap):
    """Half of a projection times a function of the other half; or one projection times a function of another."""
    u = maps((16, 6, 12))
    a, b = u[..., :6], u[..., 6:]
    given = [Source("fc2", b), Source("fc1", a)] if two else [Source("fc1", u), Source("norm", maps((16, 6, 6), 1))]
    gelu, silu, sigmoid = (lambda x, f=f: through(f, x) for f in (F.gelu, F.silu, torch.sigmoid))
    right = a * silu(b)
    for wrong in (a * gelu(b), a * sigmoid(b), a * b, silu(a) * b, gelu(a) * b):
        assert codes(named(given, right, wrong, swap)) == [("gate", "activation")]
    if not two:
        apart = u[..., ::2] * silu(u[..., 1::2])
        assert codes(named(given, right, apart, swap)) == [("gate", "activation")]
    # Both activated, a factor, one half alone, and a sum are no other gate.
    for wrong in (silu(a) * silu(b), 1.01 * right, a + silu(b), a * silu(b) + 0.1 * b):
        assert codes(named(given, right, wrong, swap)) == [("unexplained", "")]


@SWAP
def test_concat_order(swap):
    """Three blocks, one of them of no known source; and channels that are shuffled."""
    a, b, c = maps(), maps((6, 8, 8, 4), 1), np.arctan(maps((6, 8, 8, 3), 2))
    given = [Source("conv2", a), Source("conv1", b)]
    parts = [through(F.relu, a), b, c]
    joined = np.concatenate(parts, -1)
    for order in ((1, 0, 2), (2, 1, 0), (1, 2, 0)):
        other = np.concatenate([parts[i] for i in order], -1)
        assert codes(named(given, joined, other, swap)) == [("concat-order", "")]
    # Blocks in another order of which two are unknown, or that are no whole sources; and values that are others, too.
    assert codes(named(given[:1], joined, np.concatenate([parts[i] for i in (1, 0, 2)], -1), swap)) == [
        ("unexplained", "")
    ]
    assert codes(named(given, joined, np.roll(joined, 1, -1), swap)) == [("unexplained", "")]
    wrong = np.concatenate([b, 1.01 * parts[0], c], -1)
    assert codes(named(given, joined, wrong, swap)) == [("unexplained", "")]
    wide = maps((6, 8, 8, 12), 3)
    shuffles = [wide.reshape(6, 8, 8, n, -1).swapaxes(-1, -2).reshape(wide.shape) for n in (1, 2, 3)]
    assert codes(named([Source("conv", wide)], *shuffles[:2], swap)) == [("concat-order", "")]
    assert codes(named([Source("conv", wide)], *shuffles[1:], swap)) == [("concat-order", "")]
    assert codes(named([], *shuffles[:2], swap)) == codes(named([], *shuffles[1:], swap)) == [("concat-order", "")]
    assert codes(named([Source("conv", wide)], wide, wide[..., ::-1], swap)) == [("unexplained", "")]


@SWAP
def test_a_part_that_was_joined(swap):
    """What differs in a part of the channels only is found there."""
    a, b = maps(), maps((6, 8, 8, 4), 1)
    given = [Source("conv2", a), Source("conv1", b)]
    sides = [np.concatenate([np.arctan(b), through(f, a)], -1) for f in (F.relu, F.silu)]
    assert codes(named(given, *sides, swap)) == [("activation", "activation")]
    # Where the other channels differ too, it is not all.
    sides[0][..., 0] *= 1.5
    assert codes(named(given, *sides, swap)) == [("unexplained", "")]


KINDS = [
    ("max2", "avg2", {"pool-kind"}),
    ("max3s2p1", "avg3s2p1", {"pool-kind"}),
    ("max3s2p1", "avg3s2p1, not counted", {"pool-kind"}),
    ("avg3s2p1", "avg3s2p1, not counted", {"pool-count-padding"}),
    ("max2", "max3s2p1", {"pool-kind", "padding"}),
    ("global", lambda x: x.amax((2, 3), keepdim=True), {"pool-kind"}),
    # SAME pads only behind where PyTorch's padding=1 is seen only before.
    ("max3s2p1", lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-np.inf), 3, 2), {"padding"}),
    ("avg3s2p1", lambda x: F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2), {"padding"}),
    ("max2", lambda x: F.max_pool2d(x, 2, 1), {"stride"}),
    ("avg2", lambda x: F.avg_pool2d(x, 2, 3), {"stride"}),
    ("avg2", lambda x: 4 * F.avg_pool2d(x, 2), {"pool-kind"}),
    ("max2", lambda x: x, {"pool-kind"}),
    ("max2", lambda x: x[:, :, ::2, ::2], {"pool-kind"}),
    ("max3s2p1", lambda x: F.max_pool2d(F.pad(x, (1, 0, 1, 0)), 3, 2), {"pool-count-padding"}),
]


@pytest.mark.parametrize(("one", "other", "expected"), KINDS)
@pytest.mark.parametrize(("activation", "flat"), [("identity", False), ("ReLU", True), ("exact GELU", False)])
@SWAP
def test_pool(one, other, expected, activation, flat, swap):
    if activation == "ReLU" and expected == {"pool-count-padding"} and one.startswith("max"):
        return  # behind a ReLU a zero more or less makes no difference to the maximum
    u, f = maps(), ACTIVATIONS[activation]
    sides = [through(lambda x, p=p: p(f(x)), u) for p in (POOLS[one], POOLS.get(other, other))]
    if flat:
        sides = [side.reshape(len(u), -1) for side in sides]
    found = named(sources(u), *sides, swap)
    assert {finding.code for finding in found} == expected, found
    assert all(finding.charges == "pool" for finding in found)


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize("padding", [0, 1])
@SWAP
def test_ceil_mode(size, padding, swap):
    """A row more, or one that PyTorch does not count."""
    u = maps((4, size, size, 3))
    sides = [through(lambda x, c=c: F.avg_pool2d(x, 3, 2, padding, ceil_mode=c), u) for c in (False, True)]
    found = named([Source("conv", u)], *sides, swap)
    assert found == [] if sides[0].shape == sides[1].shape else [f.code for f in found] == ["padding"]
    assert "padding" in str(describe([Source("conv", u)], sides[1]).pool)


@pytest.mark.parametrize("act", ["ReLU", "tanh"])
@pytest.mark.parametrize("kind", ["max2", "avg2"])
@SWAP
def test_activation_and_pool_at_once(act, kind, swap):
    u, other = maps(), {"max2": "avg2", "avg2": "max2"}[kind]
    one = through(lambda x: POOLS[kind](ACTIVATIONS[act](x)), u)
    two = through(lambda x: POOLS[other](F.silu(x)), u)
    assert set(codes(named(sources(u), one, two, swap))) == {("activation", "activation"), ("pool-kind", "pool")}


@pytest.mark.parametrize("activation", ["identity", "ReLU", "sigmoid"])
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("how", ["rerun", "once", "by channel", "pooled"])
@SWAP
def test_dropout(activation, p, how, swap):
    u, f, rng = maps((8, 8, 8, 16)), ACTIVATIONS[activation], np.random.default_rng(5)
    whole = through(f, u)

    def dropped():
        kept = rng.uniform(size=(8, 1, 1, 16) if how == "by channel" else u.shape) >= p
        return through(POOLS["avg2"], whole * kept / (1 - p)) if how == "pooled" else whole * kept / (1 - p)

    true = through(POOLS["avg2"], whole) if how == "pooled" else whole
    options = {} if how == "once" else {"rerun": (true, dropped())}
    if how == "pooled":
        flax = dropped()
        found = named(sources(u), true, flax, swap, rerun=(true, dropped()))
    else:
        true_again = through(f, u)
        found = named(sources(u), true_again, dropped(), swap, **options)
        assert f"1/(1 - {p:.3g})" in found[0].evidence
    assert codes(found) == [("dropout-active", "dropout")]
    assert ("PyTorch" if swap else "Flax") in found[0].evidence
    # The other mistake beside it is seen too, where the values can be followed.
    if how != "pooled":
        both = named(sources(u), through(F.silu, u), dropped(), swap, **options)
        assert set(codes(both)) == {("dropout-active", "dropout"), ("activation", "activation")}


def test_no_dropout_without_randomness():
    """A side that repeats itself does not drop out: zeros and a factor are something else."""
    u = maps()
    flax = through(F.relu, u) * 2
    assert codes(named(sources(u), through(F.relu, u), flax, rerun=(through(F.relu, u), flax))) == [("unexplained", "")]


@pytest.mark.parametrize(
    "factor", [1.01, -1.0, *(pytest.param(factor, marks=pytest.mark.thorough) for factor in (2.0, 1 / 1.7))]
)
@SWAP
def test_a_factor_is_no_activation(factor, swap):
    u = maps()
    for name in ("identity", "ReLU", "exact GELU", "tanh"):
        v = through(ACTIVATIONS[name], u)
        # The last: nobody knows what both were made of.
        for known in (sources(u), []):
            (found,) = named(known, v, factor * v, swap)
            assert (found.code, found.charges) == ("unexplained", "")
            assert f"{factor:.6g}" in found.evidence or f"{1 / factor:.6g}" in found.evidence
    # Nor is a multiple of an activation, or an activation of a multiple, one that was taken for another.
    for side in (factor * through(torch.sin, u), through(lambda x: torch.tanh(factor * x), u)):
        assert codes(named(sources(u), through(F.relu, u), side, swap)) == [("unexplained", "")]
        # Zeros that are ReLU's are not dropout's.
        known = side * (u > 0)
        assert codes(named(sources(u), through(F.relu, u), known, swap)) == [("unexplained", "")]
    # A factor that both have hides no wrong activation.
    sides = [factor * through(f, u) for f in (F.relu, F.silu)]
    assert codes(named(sources(u), *sides, swap)) == [("activation", "activation")]


@pytest.mark.parametrize(
    ("factor", "text"), [(0.25, "0.25 = 1/sqrt(16)"), (16.0, "16 = sqrt(256)"), (0.3, "0.3"), (-0.5, "-0.5")]
)
def test_a_factor_that_is_a_root_of_a_width(factor, text):
    u = maps()
    (found,) = named(sources(u), u, factor * u)
    assert found.evidence == f"PyTorch multiplies by 1, Flax by {text}"


@pytest.mark.parametrize("excess", [1e-4, 1e-6, 3e-7, 3e-8])
@SWAP
def test_a_factor_of_nearly_one_is_no_factor_of_one(excess, swap):
    """The two numbers of a sentence are never the same text."""
    u = maps()
    for known in (sources(u), []):
        (found,) = named(known, through(F.relu, u), (1 + excess) * through(F.relu, u), swap)
        numbers = re.findall(r"multiplies by (\S+), Flax by (\S+)", found.evidence)
        assert found.code == "unexplained"
        assert len(set(numbers[0])) == 2


@pytest.mark.parametrize(
    "change", [lambda v: np.roll(v, 1, -1), pytest.param(lambda v: v[..., ::-1], marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("shape", [(12, 8), (6, 7, 8), (6, 8, 8, 5)])
@SWAP
def test_another_order_without_a_flatten(shape, change, swap):
    u = maps(shape)
    v = through(F.relu, u)
    image = Source("conv", maps((len(u), 4, 4, 2), 3))
    for known in ([Source("fc", u), image], [image] if v.ndim == 4 else [Source("fc", maps(shape, 4)), image]):
        assert codes(named(known, v, change(v), swap)) == [("unexplained", "")]
    if u.ndim == 4:  # nothing is flattened either where rows and columns are exchanged
        assert codes(named([Source("conv", u)], v, v.swapaxes(1, 2), swap)) == [("unexplained", "")]
        # Behind a flatten of unknown values it is the flatten.
        flat = [np.moveaxis(x, -1, 1).reshape(6, -1) for x in (maps(seed=5), maps(seed=5).swapaxes(1, 2))]
        assert codes(named([Source("conv", u)], *flat, swap)) == [("flatten-order", "flatten")]


@pytest.mark.parametrize("shape", [(6, 4, 4, 5), (3, 2, 5, 4), (5, 7, 3)])
@pytest.mark.parametrize("pool", [False, True])
@SWAP
def test_flatten_order(shape, pool, swap):
    u = maps(shape)
    f = (lambda x: F.max_pool2d(F.relu(x), 2)) if pool and len(shape) == 4 else F.relu
    v = through(f, u)
    chw = np.moveaxis(v, -1, 1).reshape(len(v), -1)
    if v.shape[1:-1] == (1, 2):
        return
    given = sources(u)
    assert codes(named(given, chw, v.reshape(len(v), -1), swap)) == [("flatten-order", "flatten")]
    if v.ndim > 3:
        whc = np.moveaxis(v, 1, 2).reshape(len(v), -1)
        assert codes(named(given, chw, whc, swap)) == [("flatten-order", "flatten")]
    wrong = through((lambda x: F.max_pool2d(torch.tanh(x), 2)) if pool and len(shape) == 4 else torch.tanh, u)
    wrong = wrong.reshape(len(v), -1)
    found = named(given, chw, wrong, swap)
    assert {code for code, _ in codes(found)} >= {"flatten-order", "activation"}
    # What was flattened may be unknown.
    assert codes(named([], chw, v.reshape(len(v), -1), swap)) == [("flatten-order", "flatten")]


def test_flatten_of_one_place_or_channel():
    u = maps((6, 4, 4, 1))
    assert named(sources(u), np.moveaxis(u, -1, 1).reshape(6, -1), u.reshape(6, -1)) == []
    pooled = through(POOLS["global"], u)
    assert named(sources(u), pooled.reshape(6, 1), pooled) == []


@SWAP
def test_residual(swap):
    a, b = Source("bn2", maps()), Source("conv1's input", maps(seed=1))
    given = [a, b, Source("input", maps((6, 32, 32, 3), 2))]
    both = a.value + b.value
    found = named(given, through(F.relu, both), through(F.gelu, both), swap)
    assert codes(found) == [("activation", "activation")]
    found = named(given, through(F.relu, both), through(F.relu, a.value), swap)
    assert codes(found) == [("unexplained", "")]
    assert "residual branch" in found[0].evidence
    found = named(given, a.value + through(F.relu, b.value), a.value + through(F.gelu, b.value), swap)
    assert codes(found) == [("activation", "activation")]
    found = named(given, both, a.value + b.value * (maps(seed=4) > 0) * 2, swap)
    assert codes(found) == [("dropout-active", "dropout")]
    pooled = [through(lambda x, p=p: POOLS[p](F.relu(x)), both) for p in ("max2", "avg2")]
    assert codes(named(given, *pooled, swap)) == [("pool-kind", "pool")]


@SWAP
def test_gates_and_joined_channels(swap):
    x, gate = Source("conv", maps()), Source("fc", maps((6, 5), 3))
    g = gate.value[:, None, None]
    sides = [x.value * through(f, g) for f in (torch.sigmoid, F.hardsigmoid)]
    assert codes(named([gate, x], *sides, swap)) == [("activation", "activation")]
    joined = np.concatenate([maps(seed=7), x.value], axis=-1)
    given = [x, Source("skip", maps(seed=7))]
    assert codes(named(given, joined, through(F.relu, joined), swap)) == [("activation", "activation")]
    swapped = named(given, joined, np.concatenate([x.value, maps(seed=7)], axis=-1), swap)
    assert [finding.code for finding in swapped] == ["concat-order"]
    assert "joins skip (5 channels), conv (5 channels); Flax conv" in swapped[0].evidence.replace(
        "conv (5 channels), skip (5 channels); Flax skip", "skip (5 channels), conv (5 channels); Flax conv"
    )


@pytest.mark.parametrize("given", [[], [Source("input", maps((6, 32, 32, 3)))]])
@SWAP
def test_unknown_source(given, swap):
    """Nobody knows what both sides were made of, but one leads to the other."""
    u = maps()
    for one, other in (
        ("ReLU", "exact GELU"),
        ("sigmoid", "tanh"),
        ("SiLU", "mish"),
        ("ReLU", "leaky ReLU with slope 0.01"),
    ):
        found = named(given, *(through(ACTIVATIONS[name], u) for name in (one, other)), swap)
        assert codes(found) == [("activation", "activation")]
        assert one in found[0].evidence
    kept = np.random.default_rng(3).uniform(size=u.shape) > 0.25
    assert codes(named(given, u, u * kept / 0.75, swap)) == [("dropout-active", "dropout")]
    assert codes(named(given, u, maps(seed=9), swap)) == [("unexplained", "")]


@SWAP
def test_unknown_function(swap):
    u = maps()
    odd, given = u * np.arctan(u), sources(u)[:1]
    for known in (u, through(F.relu, u), np.log1p(np.abs(u))):
        (found,) = named(given, known, odd, swap)
        assert (found.code, found.charges) == ("unexplained", "")
        assert "element by element" in found.evidence
    rounded = through(lambda x: x.bfloat16().double(), u)
    assert codes(named(given, u, rounded, swap)) == [("unexplained", "")]
    assert codes(named(given, through(F.relu, u), maps(seed=8), swap)) == [("unexplained", "")]


def test_sequences():
    u = maps((5, 9, 6))
    mean, first = u.mean(axis=1), u[:, 0]
    assert codes(named([Source("block", u)], mean, first)) == [("pool-kind", "pool")]
    assert codes(named([Source("block", u)], mean, u.max(axis=1))) == [("pool-kind", "pool")]


def test_bad_numbers():
    u = maps()
    broken = u.copy()
    broken[0, 0] = np.nan
    assert named(sources(u), broken, broken.copy()) == []
    assert [finding.code for finding in named(sources(u), u, broken)] == ["unexplained"]


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from([None, *POOLS]),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.booleans(),
)
def test_correct_pairs(seed, activation, pool, size, pool_first):
    u = size * maps((3, 8, 8, 4), seed)
    f, p = ACTIVATIONS[activation], POOLS.get(pool, ACTIVATIONS["identity"])
    v = through(lambda x: f(p(x)) if pool_first else p(f(x)), u)
    noise = 1 + 1e-14 * np.random.default_rng(seed).normal(size=v.shape)
    assert named([Source("conv", u)], v, v * noise, rerun=(v, v * noise)) == []
    # ReLU and a maximum commute.
    assert (
        named(
            [Source("conv", u)],
            through(lambda x: F.relu(F.max_pool2d(x, 2)), u),
            through(lambda x: F.max_pool2d(F.relu(x), 2), u),
        )
        == []
    )


@pytest.mark.parametrize(
    ("one", "other"), [(F.relu, F.gelu), (F.gelu, lambda x: F.gelu(x, approximate="tanh")), (F.silu, torch.sigmoid)]
)
@SWAP
def test_float32(one, other, swap):
    u = maps().astype(np.float32)
    found = named(sources(u), through(one, u), through(other, u), swap, tolerance=1e-5)
    assert codes(found) == [("activation", "activation")]
    pooled = [through(lambda x, p=p: POOLS[p](one(x)), u) for p in ("max3s2p1", "avg3s2p1")]
    assert codes(named(sources(u), *pooled, swap, tolerance=1e-5)) == [("pool-kind", "pool")]
    assert named(sources(u), through(one, u), through(one, u.astype(np.float64)), swap, tolerance=1e-5) == []


def test_flax_pools(x64):
    """Flax's own: SAME, and padding counted or not."""
    u = maps((4, 8, 8, 3))
    x = jax.numpy.asarray(u)
    same = np.asarray(nn.max_pool(x, (3, 3), (2, 2), "SAME"))
    found = named([Source("conv", u)], through(POOLS["max3s2p1"], u), same)
    assert codes(found) == [("padding", "pool")]
    assert found[0].evidence == "PyTorch's pool is padded by (1, 0), Flax's by (0, 1)"
    one_each = ((1, 1), (1, 1))
    for counted, expected in ((True, []), (False, [("pool-count-padding", "pool")])):
        # Flax divides by a float32 count.
        with jax.numpy_dtype_promotion("standard"):
            flax = np.asarray(nn.avg_pool(x, (3, 3), (2, 2), one_each, count_include_pad=counted))
        assert codes(named([Source("conv", u)], through(POOLS["avg3s2p1"], u), flax)) == expected


def test_deep_and_quick():
    """Many sources, 1e5 elements."""
    u = maps((16, 28, 28, 8))
    more = [Source(f"layer{i}", maps((16, 28, 28, 8), i)) for i in range(9, 20)]
    found = named([Source("conv", u), *more], through(F.gelu, u), through(F.silu, u))
    assert codes(found) == [("activation", "activation")]
    residual = more[0].value + more[4].value
    assert codes(named(more, through(F.relu, residual), through(F.silu, residual))) == [("activation", "activation")]
