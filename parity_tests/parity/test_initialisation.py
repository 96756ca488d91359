"""New networks of both sides: what is drawn alike is silent, what is not is said in words that are true."""

import math
import random

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity
from parity.diagnosis.initialisation import chance
from parity.diagnosis.initialisation.draws import Drawn
from parity.diagnosis.initialisation.schemes import Fans, words
from parity.report.cards import answer
from parity_tests.parity.planted.chain import images, vectors
from parity_tests.parity.planted.initial import RIGHT, LinenDeep, NnxDeep, TorchDeep, of_flax, torch_layer

X = images(3, 6, 2)
EVERY = {"conv1": ("he", "zeros"), "conv2": ("cut", "normal"), "fc1": ("lecun", "uniform"), "fc2": ("normal", "zeros")}
OTHERS = {"conv1": ("he of fan_out", "cut"), "conv2": ("uniform", "zeros"), "fc1": ("glorot", "zeros")}


def named(report):
    return [(d.code, d.layers) for d in report.diagnoses]


@pytest.mark.parametrize("ways", [EVERY, RIGHT | OTHERS], ids=["first", "others"])
@pytest.mark.parametrize("is_nnx", [False, True])
def test_what_is_drawn_alike_is_silent(ways, is_nnx):
    """Whichever way: bounds that were too narrow, or other numbers of a tensor on the other side, would be an alarm."""
    made = (lambda rngs: NnxDeep(ways, rngs=rngs)) if is_nnx else LinenDeep(ways)
    report = parity.check_initialisation(lambda: TorchDeep(ways), made, X, seeds=16)
    assert report.ok, report
    assert answer(report) == "The two begin alike: nothing differs by more than chance explains."
    assert len(report.layers) == 12
    assert {row.phase for row in report.layers} == {"initialisation"}
    assert any(note.startswith("16 new networks a side") for note in report.notes)


class Defaults(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.fc1, self.fc2 = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, ids):
        return self.fc2(torch.relu(self.fc1(self.table(ids))))


class FlaxDefaults(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(50, 32, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, ids):
        return self.fc2(nnx.relu(self.fc1(self.table(ids))))


def test_the_frameworks_own_ways_are_told_each_once():
    ids = np.random.default_rng(0).integers(0, 50, (2, 3))
    report = parity.check_initialisation(Defaults, FlaxDefaults, ids)
    assert named(report) == [
        ("initialisation", ["table"]),
        ("initialisation", ["fc1", "fc2"]),
        ("initialisation", ["fc1", "fc2"]),
    ]
    table, weight, bias = (d.evidence for d in report.diagnoses)
    assert table.endswith("is in PyTorch normal, variance 1; in Flax normal, variance 1/features")
    assert "PyTorch uniform, variance 1/(3 fan_in)" in weight
    assert weight.endswith("in Flax truncated normal, variance 1/fan_in (LeCun)")
    assert bias.endswith("in Flax 0 throughout")
    told = report.to_dict()["details"]["tensors"][1]
    assert told["name"] == "fc1.weight"
    assert told["PyTorch"]["std"] == pytest.approx(1 / math.sqrt(3 * 32), rel=0.02)
    assert told["Flax"]["extreme"] == pytest.approx(2 / 0.8796, rel=0.02)
    assert report.first_divergence.phase == "initialisation"


PYTORCH = "variance 1/(3 fan_in) (PyTorch's own: within 1/sqrt(fan_in))"


def test_a_bias_of_few_numbers_is_told_as_the_others_are():
    """Of eight numbers several variances are near; the three layers have one sentence."""

    class Three(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(24, 8, 1))

    class FlaxThree(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(24, (3, 3))(linen.Conv(8, (3, 3))(x))
            return linen.Conv(8, (1, 1))(x)

    report = parity.check_initialisation(Three, FlaxThree(), X)
    assert named(report) == [("initialisation", ["0", "1", "2"])] * 2
    assert all("PyTorch uniform, variance 1/(3 fan_in)" in d.evidence for d in report.diagnoses)


def of_plain_numbers(numbers):
    return Drawn(np.zeros(numbers.shape), np.zeros(numbers.shape, bool), numbers)


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lambda rng, n: rng.normal(size=n) / 8, "normal, variance 1/fan_in (LeCun)"),
        (lambda rng, n: rng.normal(size=n) / 8 * 1.4142, "normal, variance 2/fan_in (He, Kaiming)"),
        (lambda rng, n: rng.uniform(-1, 1, n) / 8, f"uniform, {PYTORCH}"),
        (lambda rng, n: rng.normal(size=n) * 0.02, "normal, std 0.02"),
        (lambda rng, n: 3 + rng.uniform(-2, 2, size=n), "uniform, mean 3, std 1.15"),
        (lambda rng, n: rng.exponential(size=n), "of another shape, mean 1, variance 1"),
    ],
)  # fmt: skip
def test_words(draw, expected):
    numbers = draw(np.random.default_rng(0), 50_000)
    assert words(of_plain_numbers(numbers), Fans(64, 256)) == expected


def test_words_of_few_numbers_leave_open_what_they_do_not_show():
    rng = np.random.default_rng(0)
    assert words(of_plain_numbers(rng.normal(size=500)), Fans()) == "normal, cut off or not, variance 1"
    assert words(of_plain_numbers(rng.normal(size=20)), Fans()).startswith("of an unknown shape")


DRAWS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy": lambda rng, n: rng.standard_cauchy(size=n),
    "coin": lambda rng, n: rng.choice([-1.0, 1.0], size=n),
    "several": lambda rng, n: rng.normal(size=n) * np.where(np.arange(n) % 2, 0.01, 1.0),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_false_alarm_is_as_rare_as_is_said(name):
    """Of 4000 pairs from one distribution no more than 1 % are as improbable as 1 %; not 5 standard errors more."""
    rng = np.random.default_rng(0)
    for count in 4, 50:
        alarms = [chance.improbability(DRAWS[name](rng, count), DRAWS[name](rng, count)) > 2 for _ in range(4000)]
        assert np.mean(alarms) <= 0.01 + 5 * math.sqrt(0.01 * 0.99 / 4000)


def test_what_is_said_to_be_seen_is_seen():
    """A factor half as large again as the least, and a cut with as many numbers as are said to be enough."""
    rng = np.random.default_rng(0)
    bound = chance.bound(10)
    for count in 100, 3000:
        factor = chance.unseen_ratio(count, 10) ** 1.5
        seen = [
            chance.improbability(rng.normal(size=count), factor * rng.normal(size=count)) > bound for _ in range(20)
        ]
        assert all(seen)
        slight = chance.unseen_ratio(count, 10) ** 0.3
        assert chance.improbability(rng.normal(size=count), slight * rng.normal(size=count)) < bound
    count = chance.least_cut(10)
    for _ in range(20):
        many = rng.normal(size=3 * count)
        cut = many[np.abs(many) < 2][:count] / 0.8796
        assert chance.improbability(cut, rng.normal(size=count)) > bound


class Scaled(nn.Module):
    """A vector that is one draw, n times."""

    def __init__(self):
        super().__init__()
        self.fc = torch_layer(nn.Linear(4, 300), ("glorot", "zeros"))
        nn.init.constant_(self.fc.bias, torch.randn(()).item())

    def forward(self, x):
        return self.fc(x)


def test_one_draw_that_is_repeated_is_one_number():
    def repeated(key, shape, dtype=jnp.float32):
        return jnp.broadcast_to(linen.initializers.normal(1.0)(key, (), dtype), shape)

    flax = linen.Dense(300, **(of_flax(("glorot", "zeros")) | {"bias_init": repeated}))
    report = parity.check_initialisation(Scaled, flax, vectors(4))
    assert report.ok, report
    assert report.details["tensors"][1]["PyTorch"]["numbers"] == 32


@pytest.mark.parametrize("share", [0.6, 0.1])
def test_zeros_that_are_drawn_are_no_zeros_that_stay(share):
    """Some of them stand at one place in all eight networks by chance, and on the other side at another."""

    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch_layer(nn.Linear(100, 50), ("normal", "zeros"))
            with torch.no_grad():
                self.fc.weight *= torch.rand(50, 100) > share

        def forward(self, x):
            return self.fc(x)

    def sparse(key, shape, dtype=jnp.float32):
        where = jax.random.uniform(jax.random.fold_in(key, 1), shape) > share
        return linen.initializers.normal(0.02)(key, shape, dtype) * where

    flax = linen.Dense(50, kernel_init=sparse)
    assert parity.check_initialisation(Sparse, flax, vectors(100), seeds=8).ok


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(12, 16, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class FlaxCell(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.RNN(linen.OptimizedLSTMCell(16), name="rnn")(x)


def test_a_cell():
    """Flax draws what goes around as an orthogonal matrix; PyTorch has two biases, whose sum is no known shape."""
    x = np.zeros((2, 3, 12), np.float32)
    report = parity.check_initialisation(Cell, FlaxCell(), x, flax_inputs=[x])
    told = [d.evidence.partition(" is in PyTorch ")[2] for d in report.diagnoses]
    assert told == [
        "uniform, std 0.144; in Flax truncated normal, std 0.288",
        "uniform, std 0.144; in Flax orthogonal, std 0.25",
        "a sum of two tensors, std 0.202; in Flax 0 throughout",
    ]


def test_an_orthogonal_matrix():
    """Of the same variance and nearly the same shape as a normal one, in either wing; and the same on both sides."""

    def made(way):
        layer = torch_layer(nn.Linear(64, 64), ("normal", "zeros"))
        way(layer.weight)
        return layer

    orthogonal, normal = linen.initializers.orthogonal(), linen.initializers.normal(1 / 8)
    for way, kernel, expected in (
        (nn.init.orthogonal_, orthogonal, []),
        (nn.init.orthogonal_, normal, ["initialisation"]),
        (lambda w: nn.init.normal_(w, std=1 / 8), orthogonal, ["initialisation"]),
    ):
        report = parity.check_initialisation(
            lambda way=way: made(way), linen.Dense(64, kernel_init=kernel), vectors(64), seeds=8
        )
        assert [d.code for d in report.diagnoses] == expected
        assert all("orthogonal, variance 1/fan_in" in d.evidence for d in report.diagnoses)


def test_the_fans_of_a_transposed_convolution():
    """PyTorch counts what comes of one input; the words count as Flax's layout does, the bias's too."""
    x = np.zeros((1, 6, 5, 5), np.float32)
    flax = linen.ConvTranspose(10, (3, 3), padding="VALID")
    report = parity.check_initialisation(lambda: nn.ConvTranspose2d(6, 10, 3), flax, x)
    assert ["PyTorch uniform, variance 1/(3 fan_out); in" in d.evidence for d in report.diagnoses] == [True, True]


class Padded(nn.Module):
    def __init__(self, padding):
        super().__init__()
        self.table = nn.Embedding(20, 8, padding_idx=padding)

    def forward(self, ids):
        return self.table(ids)


class FlaxTable(linen.Module):
    @linen.compact
    def __call__(self, ids):
        return linen.Embed(20, 8, embedding_init=linen.initializers.normal(1.0), name="table")(ids)


def test_a_row_that_is_always_zero():
    ids = np.arange(6).reshape(2, 3)
    assert parity.check_initialisation(lambda: Padded(None), FlaxTable(), ids).ok
    report = parity.check_initialisation(lambda: Padded(0), FlaxTable(), ids)
    assert named(report) == [("initialisation", ["table"])]
    assert "but 8 of 160 numbers never change" in report.diagnoses[0].evidence


def test_a_moving_variance_that_starts_elsewhere():
    class FromZero(nn.BatchNorm2d):
        def reset_running_stats(self):
            super().reset_running_stats()
            self.running_var.zero_()

    report = parity.check_initialisation(
        lambda: nn.Sequential(torch_layer(nn.Conv2d(3, 8, 1), ("glorot", "zeros")), FromZero(8)),
        lambda rngs: nnx.Sequential(
            nnx.Conv(3, 8, (1, 1), rngs=rngs, **of_flax(("glorot", "zeros"))), nnx.BatchNorm(8, rngs=rngs)
        ),
        X,
    )
    assert named(report) == [("initial-variance", ["1"])]
    assert "0 throughout in PyTorch, 1 throughout in Flax" in report.diagnoses[0].evidence


def test_what_one_side_only_has_is_told():
    report = parity.check_initialisation(
        lambda: torch_layer(nn.Linear(24, 16), ("glorot", "zeros")),
        linen.Dense(16, use_bias=False, kernel_init=linen.initializers.xavier_uniform()),
        vectors(24),
    )
    assert not report.ok
    assert named(report) == [("no-partner", [""])]
    assert "PyTorch's bias has no partner in Flax" in report.diagnoses[0].evidence


def test_generators_go_on_where_they_were():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    parity.check_initialisation(lambda: nn.Linear(6, 4), linen.Dense(4), vectors(6), seeds=8)
    after = torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002
    assert torch.equal(expected[0], after[0])
    assert expected[1:] == after[1:]


def seeded():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


@pytest.mark.parametrize(
    ("factory", "flax", "options", "error", "text"),
    [
        (
            nn.Linear(6, 4),
            linen.Dense(4),
            {},
            TypeError,
            "torch_factory is Linear, which draws nothing anew; allowed: ",
        ),
        (lambda: 3, linen.Dense(4), {}, TypeError, "torch_factory makes int; allowed: "),
        (seeded, linen.Dense(4), {}, ValueError, "torch_factory makes the same weights 8 times; allowed: "),
        (nn.Flatten, 3, {}, TypeError, "flax is int; allowed: a linen module"),
        (lambda: nn.Linear(6, 4), nnx.Linear(6, 4, rngs=nnx.Rngs(0)), {}, ValueError, "flax is Linear, an nnx.Module"),
        (
            lambda: nn.Linear(6, 4),
            lambda: nnx.Linear(6, 4, rngs=nnx.Rngs(0)),
            {},
            ValueError,
            "makes an nnx.Module without rngs; allowed: ",
        ),
        (lambda: nn.Linear(6, 4), lambda rngs: rngs, {}, TypeError, "flax makes Rngs; allowed: "),
        (
            lambda: nn.Linear(6, 4),
            lambda rngs: nnx.Linear(6, 4, rngs=nnx.Rngs(0)),
            {},
            ValueError,
            "flax_module_or_factory makes the same weights 8 times",
        ),
        (lambda: nn.Linear(6, 4), linen.Dense(4), {"seeds": 7}, ValueError, "seeds is 7; allowed: an integer >= 8"),
        (lambda: nn.Linear(6, 4), linen.Dense(4), {"seeds": True}, ValueError, "seeds is True; allowed: an integer"),
    ],
)
def test_what_is_refused(factory, flax, options, error, text):
    with pytest.raises(error) as caught:
        parity.check_initialisation(factory, flax, vectors(6), **({"seeds": 8} | options))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
