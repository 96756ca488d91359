"""Batch norm explained from its numbers: every mistake in either side, alone and in twos; silence on correct pairs."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.diagnosis.norm.family import batch_norm_findings, describe
from parity.diagnosis.norm.sources import NormSide
from parity_tests.parity.norm_simulator import Convention, Data, data, simulate

RIGHT = Convention()
PREDICTS = Convention(source="moving", weight=1.0)
SHAPES = [(16, 8), (16, 1), (3, 3), (4, 6, 3), (8, 5, 4, 3), (8, 5, 4, 1), (4, 3, 5, 2, 8), (500, 3)]

# (code, how the convention is changed)
FORWARD = [
    ("epsilon", {"epsilon": 1e-3}),
    ("epsilon", {"epsilon": 3e-4}),
    ("epsilon-outside-sqrt", {"outside": True}),
    ("variance-ddof", {"unbiased_forward": True}),
    ("affine-swapped", {"affine": "swapped"}),
    ("affine-missing", {"affine": "missing"}),
    ("affine-missing", {"affine": "scale missing"}),
    ("bias-missing", {"affine": "bias missing"}),
    ("train-uses-moving-statistics", {"source": "moving"}),
    ("train-uses-moving-statistics", {"source": "updated"}),
]
UPDATE = [
    ("statistics-frozen", {"weight": 1.0}),
    ("momentum-inverted", {"weight": 0.1}),
    ("momentum", {"weight": 0.99}),
    ("momentum", {"weight": 2 / 3}),
    ("unbiased-variance", {"unbiased": True}),
]
GRADIENT = [("stopped-statistics-gradient", {"stopped": stopped}) for stopped in ("both", "mean", "variance")]
PER_DEVICE = [
    ("per-device-statistics", change)
    for change in (
        {"source": "halves"},
        {"source": "strided halves"},
        {"source": "first half"},
        {"statistics": "halves"},
        {"statistics": "first half"},
        {"source": "halves", "statistics": "halves"},
    )
]


def codes(torch_side, flax_side, *, train=True, tolerance=1e-9):
    return [finding.code for finding in batch_norm_findings(torch_side, flax_side, train=train, tolerance=tolerance)]


def some(shape, seed=0, **options):
    return data(np.random.default_rng(seed), shape, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("initial", [None, 0, 1])
def test_every_mistake_is_named_alone_and_in_either_side(shape, initial):
    given = some(shape, initial=initial)
    right = simulate(given, RIGHT)
    divisible = PER_DEVICE if shape[0] % 2 == 0 else []
    for code, change in FORWARD + UPDATE + GRADIENT + divisible:
        wrong = simulate(given, RIGHT._replace(**change))
        assert codes(right, wrong) == [code], change
        assert codes(wrong, right) == [code], change


@pytest.mark.parametrize("shape", [(16, 8), (8, 5, 4, 3), (2, 3), (2, 2, 2, 3)], ids=str)
def test_a_fresh_layer_tells_as_much(shape):
    given = some(shape, trivial=True, initial=1)
    right, predicts = simulate(given, RIGHT), simulate(given, PREDICTS, train=False)
    for code, change in FORWARD + UPDATE + GRADIENT:
        if "affine" in change and change["affine"] != "swapped":
            assert codes(right, simulate(given, RIGHT._replace(**change))) == [], change
        elif "updated" not in change.values():
            assert codes(right, simulate(given, RIGHT._replace(**change))) == [code], change
    for code, change in (*FORWARD[:3], FORWARD[4], ("eval-uses-batch-statistics", {"source": "batch"})):
        assert codes(predicts, simulate(given, PREDICTS._replace(**change), train=False), train=False) == [code]


@pytest.mark.parametrize("shape", [(16, 8), (8, 5, 4, 3)], ids=str)
def test_two_mistakes_are_both_named(shape):
    given = some(shape)
    right = simulate(given, RIGHT)
    for (first, one), (second, other) in itertools.combinations(FORWARD[:9] + UPDATE + PER_DEVICE[:1], 2):
        moving = "moving" in (one.get("source"), other.get("source"))
        forward_unbiased = "unbiased_forward" in one or "unbiased_forward" in other
        frozen = 1.0 in (one.get("weight"), other.get("weight"))
        unbiased = "unbiased" in one or "unbiased" in other
        if set(one) & set(other):
            continue
        apart = simulate(given, RIGHT._replace(**one)), simulate(given, RIGHT._replace(**other))
        if not (moving and forward_unbiased):
            assert not {first, second} ^ set(codes(*apart)) or (frozen and unbiased), (one, other)
        # Frozen statistics keep no variance, moving ones are of no batch; who uses them leaves them as they are.
        if not (moving and forward_unbiased) and not (frozen and unbiased) and not (moving and frozen):
            both = simulate(given, RIGHT._replace(**one, **other))
            assert set(codes(right, both)) == {first, second}, (one, other)
            assert set(codes(both, right)) == {first, second}, (one, other)


@pytest.mark.parametrize("forward", [RIGHT, RIGHT._replace(epsilon=1e-3)], ids=["agrees", "differs"])
def test_a_stopped_gradient_is_judged_by_its_own_forward_pass(forward):
    given = some((8, 5, 4, 3))
    right = simulate(given, RIGHT)
    expected = [] if forward == RIGHT else ["epsilon"]
    assert codes(right, simulate(given, forward._replace(stopped="both"))) == [*expected, "stopped-statistics-gradient"]
    assert codes(right, simulate(given, forward)) == expected
    both = [simulate(given, convention._replace(stopped="both")) for convention in (RIGHT, forward)]
    assert codes(*both) == expected


@pytest.mark.parametrize("shape", [(16, 8), (4, 6, 3), (4, 5, 2, 3), (4, 3, 5, 2, 2)], ids=str)
def test_any_wrong_axes(shape):
    given = some(shape)
    right = simulate(given, RIGHT)
    every = range(len(shape))
    for axes in itertools.chain.from_iterable(itertools.combinations(every, n) for n in range(1, len(shape) + 1)):
        if axes == tuple(every[:-1]):
            continue
        wrong = simulate(given, RIGHT._replace(source=axes))
        assert codes(right, wrong) == codes(wrong, right) == ["wrong-reduction-axes"], axes
        many = simulate(given, RIGHT._replace(source=axes, epsilon=1e-3, weight=0.1, unbiased=True))
        expected = ["wrong-reduction-axes", "epsilon", "momentum-inverted", "unbiased-variance"]
        assert codes(right, many) == expected, axes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("size", "offset"), [(1, 0), (1e-2, 0), (100, 50), (1, 1e3)])
def test_prediction(shape, size, offset):
    given = some(shape, size=size, offset=offset)
    right = simulate(given, PREDICTS, train=False)
    uses_batch = ("eval-uses-batch-statistics", {"source": "batch"})
    for code, change in (*FORWARD[:3], *FORWARD[4:6], FORWARD[7], uses_batch):
        wrong = simulate(given, PREDICTS._replace(**change), train=False)
        assert codes(right, wrong, train=False) == codes(wrong, right, train=False) == [code], change
    assert codes(right, simulate(given, RIGHT), train=False) == ["eval-uses-batch-statistics"]
    assert codes(right, right._replace(new_mean=0.9 * right.new_mean), train=False) == ["unexplained"]


@pytest.mark.parametrize(("torch_var", "flax_var"), [(0.0, 1.0), (1.0, 0.0), (None, 1.0)])
def test_initial_variance(torch_var, flax_var):
    given = some((8, 5, 4, 3), initial=torch_var)
    other = given._replace(var=np.full(3, flax_var))
    assert codes(simulate(given, RIGHT), simulate(other, RIGHT)) == ["initial-variance"]
    predicts = [simulate(one, PREDICTS, train=False) for one in (given, other)]
    assert codes(*predicts, train=False) == ["initial-variance"]
    wrong = RIGHT._replace(weight=0.1, unbiased=True)
    expected = ["initial-variance", "momentum-inverted", "unbiased-variance"]
    assert codes(simulate(given, RIGHT), simulate(other, wrong)) == expected


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("lacking", "expected"),
    [(["beta"], ["bias-missing"]), (["gamma"], ["affine-missing"]), (["gamma", "beta"], ["affine-missing"])],
)
def test_a_parameter_that_only_one_side_has(lacking, expected, train):
    convention = RIGHT if train else PREDICTS
    for trivial in (True, False):
        given = some((8, 5, 4, 3), trivial=trivial)
        right = simulate(given, convention, train=train)
        without = given._replace(**dict.fromkeys(lacking))
        assert codes(right, simulate(without, convention, train=train), train=train) == expected
        both = simulate(without, convention._replace(epsilon=1e-3), train=train)
        assert codes(both, right, train=train) == [*expected, "epsilon"]
        assert codes(both, both, train=train) == []


def test_parameters_that_were_not_loaded_or_exchanged():
    given = some((8, 5, 4, 3))
    right = simulate(given, RIGHT)
    one, zero = np.ones(3), np.zeros(3)
    for change, code in (
        ({"gamma": one, "beta": zero}, "affine-missing"),
        ({"gamma": one}, "affine-missing"),
        ({"beta": zero}, "bias-missing"),
        ({"gamma": given.beta, "beta": given.gamma}, "affine-swapped"),
        ({"gamma": 2 * given.gamma}, "unexplained"),
    ):
        wrong = simulate(given._replace(**change), RIGHT)
        assert codes(right, wrong) == codes(wrong, right) == [code], change


def test_what_follows_from_the_forward_pass_is_not_named_twice():
    given = some((8, 5, 4, 3))
    right, predicts = simulate(given, RIGHT), simulate(given, PREDICTS, train=False)
    assert codes(right, predicts) == ["train-uses-moving-statistics"]
    other = simulate(given, RIGHT._replace(source="moving")), simulate(given, RIGHT._replace(weight=1.0))
    assert codes(*other) == ["train-uses-moving-statistics", "statistics-frozen"]


def test_statistics_by_themselves():
    given = some((8, 5, 4, 3))
    right = simulate(given, RIGHT)
    share = right.new_mean - 0.9 * given.mean, right.new_var - 0.9 * given.var
    for change, code in (
        ({"new_var": given.var}, "statistics-frozen"),
        ({"new_mean": given.mean}, "statistics-frozen"),
        ({"mean": None, "var": None, "new_mean": None, "new_var": None}, "statistics-frozen"),
        ({"new_mean": 0.9 * given.mean + 2 * share[0], "new_var": 0.9 * given.var + 2 * share[1]}, "momentum"),
        ({"new_var": right.new_var * np.nan}, "unexplained"),
        ({"new_mean": right.new_mean + 0.1}, "unexplained"),
    ):
        assert codes(right, right._replace(**change)) == [code], change


def test_what_fits_nothing_is_unexplained():
    right = simulate(some((8, 5, 4, 3)), RIGHT)
    for change in ({"y": np.tanh(right.y)}, {"dx": 1.01 * right.dx}, {"y": right.y * np.nan}):
        (finding,) = batch_norm_findings(right, right._replace(**change), train=True)
        assert finding.code == "unexplained"
        assert "Flax" in finding.evidence
        assert "PyTorch" not in finding.evidence


def test_evidence_holds_the_numbers():
    given = some((8, 5, 4, 3))
    right = simulate(given, RIGHT)

    def evidence(**change):
        (finding,) = batch_norm_findings(right, simulate(given, RIGHT._replace(**change)), train=True)
        return finding.evidence

    assert evidence(epsilon=1e-3) == "epsilon is 1e-05 in PyTorch, 0.001 in Flax"
    assert "by the factor m/(m-1)" in evidence(unbiased=True)  # no number: another in each layer, and one mistake
    assert "0.9 in PyTorch, 0.1 in Flax" in evidence(weight=0.1)
    assert "per image row" in evidence(source=(2,))
    assert "instance norm" in evidence(source=(1, 2))


@pytest.mark.parametrize("shape", [(16, 8), (8, 5, 4, 3)], ids=str)
@pytest.mark.parametrize("off", [lambda m, n: m / (m - 2), lambda m, n: (m + 1) / m, lambda m, n: 1.01])
def test_what_is_no_variance_of_n_minus_1(shape, off):
    """Divided by n - 2, by n + 1 for n, and off by a factor: no epsilon of all channels does that, and no n - 1."""
    given = some(shape)
    right = simulate(given, RIGHT)
    m, axes = given.x[..., 0].size, tuple(range(len(shape) - 1))
    mu, var = given.x.mean(axes), off(m, shape[0]) * given.x.var(axes)
    wrong = right._replace(y=given.gamma * (given.x - mu) / np.sqrt(var + 1e-5) + given.beta)
    assert "variance-ddof" not in codes(right, wrong)
    assert "variance-ddof" not in codes(wrong, right)
    assert codes(right, wrong)


def test_gamma_of_zero_hides_the_forward_pass_but_not_the_statistics():
    given = some((8, 5, 4, 3))
    given = given._replace(gamma=np.zeros(3))
    right = simulate(given, RIGHT)
    for change, expected in (
        ({"epsilon": 1e-3}, []),
        ({"stopped": "both"}, []),
        ({"affine": "swapped"}, ["affine-swapped"]),
        ({"affine": "bias missing"}, ["bias-missing"]),
        ({"unbiased": True}, ["unbiased-variance"]),
    ):
        assert codes(right, simulate(given, RIGHT._replace(**change))) == expected, change


def test_the_batch_statistics_as_moving_ones():
    given = some((8, 5, 4, 3))
    axes = (0, 1, 2)
    given = given._replace(mean=given.x.mean(axes), var=given.x.var(axes))
    right = simulate(given, RIGHT)
    assert describe(right, 1e-9).source.kind == "batch"
    assert describe(simulate(given, PREDICTS, train=False), 1e-9, train=False).source.kind == "moving"
    # The momentum cannot be told then, nor does it matter.
    assert codes(right, simulate(given, RIGHT._replace(weight=0.1))) == []


@pytest.mark.parametrize("shape", [(16, 8), (16, 1), (4, 6, 3), (8, 5, 4, 3)], ids=str)
@pytest.mark.parametrize("both", [True, False], ids=["both single", "one single"])
def test_sides_that_compute_in_float32(shape, both):
    single = RIGHT._replace(single=True)
    for seed in range(3):
        given = some(shape, seed)
        right = simulate(given, single if both else RIGHT)
        assert codes(right, simulate(given, single), tolerance=2e-5) == []
        for code, change in [*FORWARD[:1], *FORWARD[4:6], *FORWARD[7:9], *UPDATE[:3], *UPDATE[4:], GRADIENT[0]]:
            assert codes(right, simulate(given, single._replace(**change)), tolerance=2e-5) == [code], change


def in_numpy(given: Data, convention: Convention, train: bool, style: str) -> NormSide:
    """The same batch norm in the other ways in which frameworks compute it: folded, or with the fast variance."""
    x, axes = given.x, tuple(range(given.x.ndim - 1))
    m = x.size // x.shape[-1]
    gamma = 1.0 if given.gamma is None else given.gamma
    beta = 0.0 if given.beta is None else given.beta
    mu = x.mean(axes)
    var = np.maximum(0, np.square(x).mean(axes) - mu * mu) if style == "fast" else x.var(axes)
    mean_used, var_used = (mu, var) if train else (given.mean, given.var)
    r = 1 / np.sqrt(var_used + convention.epsilon)
    y = x * (gamma * r) + (beta - mean_used * gamma * r) if style == "folded" else (x - mean_used) * (r * gamma) + beta
    new_mean, new_var, dx = given.mean, given.var, given.dy * gamma * r
    if train:
        a, k = convention.weight, m / (m - 1) if convention.unbiased else 1.0
        new_mean, new_var = a * given.mean + (1 - a) * mu, a * given.var + (1 - a) * k * var
        g, x_hat = given.dy * gamma, (x - mu) * r
        dx = r * (g - g.mean(axes) - x_hat * (g * x_hat).mean(axes))
    return NormSide(x, y, given.gamma, given.beta, given.mean, given.var, new_mean, new_var, given.dy, dx)


@st.composite
def correct_pairs(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.sampled_from([2, 3, 4, 8, 100])), *draw(st.lists(st.integers(1, 3), max_size=3)))
    shape = (*shape, draw(st.sampled_from([1, 2, 3, 8])))
    given = data(
        rng,
        shape,
        trivial=draw(st.booleans()),
        size=draw(st.sampled_from([1e-4, 1e-2, 1.0, 100.0])),
        offset=draw(st.sampled_from([0.0, 0.0, 10.0, 1e3])),
        initial=draw(st.sampled_from([None, 0, 1])),
    )
    special = draw(st.sampled_from(["", "", "constant", "dead", "zero gamma", "no gamma", "no beta", "flat dy"]))
    if special in ("constant", "dead"):
        given.x[..., 0] = 1000.0 if special == "constant" else 0.0
    given = given._replace(
        gamma=None if special == "no gamma" else given.gamma * (special != "zero gamma"),
        beta=None if special == "no beta" else given.beta,
        dy=np.ones(shape) if special == "flat dy" else given.dy,
    )
    convention = Convention(
        epsilon=draw(st.sampled_from([1e-5, 1e-3, 1e-12, 2.3e-4])),
        weight=draw(st.sampled_from([0.9, 0.99, 0.1, 0.0, 1.0, 2 / 3])),
        unbiased=draw(st.booleans()),
    )
    return given, convention, draw(st.booleans())


@settings(max_examples=60)
@given(correct_pairs())
def test_a_correct_pair_is_silence(pair):
    given, convention, train = pair
    used = convention if train else convention._replace(source="moving", weight=1.0)
    right = simulate(given, used, train=train)
    for style in ("plain", "folded", "fast"):
        other = in_numpy(given, convention, train, style)
        for sides in ((right, other), (other, right)):
            assert batch_norm_findings(*sides, train=train) == []
        assert describe(other, 1e-9, train=train) is not None


@settings(max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["batch", "halves", "first half", "moving", (1,), (2,), (3,), (1, 2)]),
    st.sampled_from(["held", "swapped", "bias missing"]),
    st.booleans(),
    st.sampled_from(["", "both", "mean"]),
)
def test_the_same_odd_behaviour_on_both_sides_is_silence(seed, source, affine, unbiased, stopped):
    odd = Convention(1e-3, False, source, unbiased, affine, 0.99, unbiased, stopped=stopped)
    given = some((4, 3, 2, 3), seed)
    side = simulate(given, odd)
    assert batch_norm_findings(side, side, train=True) == []
    # And a real difference is named for what it is, not for what both do.
    assert codes(side, simulate(given, odd._replace(epsilon=1e-5))) == ["epsilon"]
    assert codes(side, simulate(given, odd._replace(weight=0.9))) == ["momentum"]


def flax_batch_norm(given, momentum, train):
    layer = nn.BatchNorm(use_running_average=not train, momentum=momentum, dtype=jnp.float64)
    variables = {
        "params": {"scale": jnp.asarray(given.gamma), "bias": jnp.asarray(given.beta)},
        "batch_stats": {"mean": jnp.asarray(given.mean), "var": jnp.asarray(given.var)},
    }

    def apply(x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    # Flax promotes to float32 at least, which strict promotion refuses for float64.
    with jax.numpy_dtype_promotion("standard"):
        y, pull, updated = jax.vjp(apply, jnp.asarray(given.x), has_aux=True)
        dx = pull(jnp.asarray(given.dy))[0]
    stats = updated["batch_stats"]
    arrays = y, given.gamma, given.beta, given.mean, given.var, stats["mean"], stats["var"], given.dy
    return NormSide(given.x, *(np.asarray(v) for v in arrays), np.asarray(dx))


def torch_batch_norm(given, train):
    layer = torch.nn.BatchNorm2d(3, dtype=torch.float64).train(train)
    with torch.no_grad():
        for tensor, value in (
            (layer.weight, given.gamma),
            (layer.bias, given.beta),
            (layer.running_mean, given.mean),
            (layer.running_var, given.var),
        ):
            tensor.copy_(torch.tensor(value))
    x = torch.tensor(given.x.transpose(0, 3, 1, 2), requires_grad=True)
    y = layer(x)
    y.backward(torch.tensor(given.dy.transpose(0, 3, 1, 2)))
    y, dx = (v.detach().numpy().transpose(0, 2, 3, 1) for v in (y, x.grad))
    stats = layer.running_mean.numpy(), layer.running_var.numpy()
    return NormSide(given.x, y, given.gamma, given.beta, given.mean, given.var, *stats, given.dy, dx)


@pytest.mark.parametrize(
    ("momentum", "expected"),
    [
        (0.9, ["unbiased-variance"]),
        (0.99, ["momentum", "unbiased-variance"]),
        (0.1, ["momentum-inverted", "unbiased-variance"]),
    ],
)
@pytest.mark.usefixtures("x64")
def test_the_frameworks_own_layers(momentum, expected):
    given = some((8, 5, 4, 3), offset=3.0)
    sides = torch_batch_norm(given, True), flax_batch_norm(given, momentum, True)
    assert codes(*sides) == expected
    predicting = torch_batch_norm(given, False), flax_batch_norm(given, momentum, False)
    assert codes(*predicting, train=False) == []


def test_bad_shapes_are_refused():
    right = simulate(some((4, 3)), RIGHT)
    with pytest.raises(ValueError, match="the shape of Flax's y is"):
        batch_norm_findings(right, right._replace(y=right.y[1:]), train=True)
    with pytest.raises(ValueError, match="the shape of Flax's x is"):
        batch_norm_findings(right, simulate(some((5, 3)), RIGHT), train=True)
