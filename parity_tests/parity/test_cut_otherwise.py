"""The verdict is about the function: the two sides may be cut otherwise inside."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import parity

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
TOKENS = np.array([[1, 2, 3], [4, 5, 6]])


class PadsByHand(nn.Module):
    """As TensorFlow pads, in front of a convolution that does not."""

    def __init__(self, padding=(0, 1, 0, 1)):
        super().__init__()
        self.c, self.a, self.b, self.padding = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3, 2), nn.Conv2d(4, 2, 1), padding

    def forward(self, x):
        return self.b(torch.relu(self.a(F.pad(torch.relu(self.c(x)), self.padding))))


class PadsByArgument(linen.Module):
    last: float = 1.0

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(5, (1, 1))(x))
        return linen.Conv(2, (1, 1))(self.last * linen.relu(linen.Conv(4, (3, 3), 2)(x)))


class NormWithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return F.silu(super().forward(x))


class NormThenActivation(linen.Module):
    epsilon: float = 1e-5

    @linen.compact
    def __call__(self, x, train):
        norm = linen.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=self.epsilon)
        return linen.Conv(4, (3, 3))(linen.silu(norm(linen.Conv(6, (3, 3))(x))))


def norm_net():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), NormWithActivation(6), nn.Conv2d(6, 4, 3, padding=1))


class Positions(nn.Module):
    """Looks up the positions for one example, and adds them to all."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe, self.d = nn.Embedding(9, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.d(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])[None]))


class PositionsOfEach(linen.Module):
    shift: int = 0

    @linen.compact
    def __call__(self, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) + self.shift
        return linen.Dense(3)(linen.Embed(9, 4)(ids) + linen.Embed(6, 4)(positions))


@pytest.mark.parametrize(
    ("torch_net", "flax_net", "x", "where", "train"),
    [
        pytest.param(PadsByHand, PadsByArgument, IMAGES, "a", False, id="padding"),
        pytest.param(PadsByHand, PadsByArgument, IMAGES, "a", True, id="padding-in-training"),
        # In training the variance that PyTorch keeps is another.
        pytest.param(norm_net, NormThenActivation, IMAGES, "1", False, id="norm-with-activation"),
        pytest.param(Positions, PositionsOfEach, TOKENS, "wpe", True, id="positions"),
    ],
)
def test_the_same_function(torch_net, flax_net, x, where, train):
    torch.manual_seed(0)
    report = parity.check(torch_net(), flax_net(), x, train=train)
    assert report.ok, report
    assert f"the same function, cut otherwise at {where}" in report.notes
    # No row says that it differs, where nothing does; and one that is beyond its bound says why.
    told = {row.torch_layer: report.verdict(row) for row in report.layers if not row.ok}
    assert set(told.values()) <= {"cut otherwise"}
    assert set(told) <= {*where.split(", ")}


@pytest.mark.parametrize(
    ("torch_net", "flax_net", "x"),
    [
        pytest.param(lambda: PadsByHand((1, 0, 1, 0)), PadsByArgument, IMAGES, id="other-padding"),
        pytest.param(PadsByHand, lambda: PadsByArgument(1.01), IMAGES, id="a-factor-besides"),
        pytest.param(norm_net, lambda: NormThenActivation(1e-3), IMAGES, id="epsilon"),
        pytest.param(Positions, lambda: PositionsOfEach(1), TOKENS, id="positions"),
    ],
)
def test_another_function_is_none_that_is_cut_otherwise(torch_net, flax_net, x):
    torch.manual_seed(0)
    report = parity.check(torch_net(), flax_net(), x, train=False)
    assert not report.ok
    assert not any("the same function" in note for note in report.notes)


class Learned(nn.Module):
    """Makes the same of a row of its own for all examples, or for each; and a layer behind that."""

    def __init__(self, each=False):
        super().__init__()
        self.row, self.each = nn.Embedding(1, 4), each
        self.time, self.d = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        n = len(x) if self.each else 1
        return self.d(torch.tanh(x) * self.time(self.row(torch.zeros(n, dtype=torch.long))))


class LinenLearned(linen.Module):
    each: bool = False
    slope: float = 1.0

    @linen.compact
    def __call__(self, x):
        row = linen.Embed(1, 4, name="row")(jnp.zeros(len(x) if self.each else 1, int))
        return linen.Dense(3, name="d")(jnp.tanh(self.slope * x) * linen.Dense(4, name="time")(row))


ROWS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
BOTH = pytest.mark.parametrize("each", [False, True], ids=["each-in-flax", "each-in-torch"])


@BOTH
def test_what_is_the_same_for_all_examples_is_compared_once(each):
    """Forward, and its gradients added up: nothing differs, and a mistake beside it comes first."""
    torch.manual_seed(0)
    report = parity.check(Learned(each), LinenLearned(not each), ROWS)
    assert report.ok, report
    assert "the same function, cut otherwise at row, time" in report.notes
    assert max(row.error for row in report.layers) < 1e-12
    report = parity.check(Learned(each), LinenLearned(not each, slope=2.0), ROWS)
    assert (report.first_divergence.torch_layer, report.first_divergence.quantity) == ("d", "input")
    assert np.isfinite(report.first_divergence.error)
    assert {d.layer for d in report.diagnoses} == {"d"}


@BOTH
def test_a_mistake_where_it_is_the_same_for_all_examples(each):
    """The layer's own weights are still looked at, in single-layer mode too."""
    torch.manual_seed(0)
    module, flax_module = Learned(each), LinenLearned(not each)
    variables = parity.to_flax(module, flax_module, inputs=[ROWS])
    variables["params"]["time"]["kernel"] = variables["params"]["time"]["kernel"].T
    report = parity.check(module, flax_module, ROWS, variables=variables)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("kernel-transposed", "time")]


class EachItsOwn(linen.Module):
    """Adds to the positions what counts the examples: it isn't the same for all."""

    @linen.compact
    def __call__(self, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) + jnp.arange(len(ids))[:, None]
        return linen.Dense(3)(linen.Embed(9, 4)(ids) + linen.Embed(6, 4)(positions))


def test_what_is_not_the_same_for_all_examples():
    torch.manual_seed(0)
    report = parity.check(Positions(), EachItsOwn(), TOKENS)
    assert not report.ok
    assert (report.first_divergence.torch_layer, report.first_divergence.quantity) == ("wpe", "input")
    assert {d.layer for d in report.diagnoses} == {"wpe"}


class ReZero(nn.Module):
    """A branch that counts nothing yet: its factor and its last layer are 0."""

    def __init__(self):
        super().__init__()
        self.i, self.l1, self.l2, self.o = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.a = nn.Parameter(torch.zeros(8))
        nn.init.zeros_(self.l2.weight)
        nn.init.zeros_(self.l2.bias)

    def forward(self, x):
        x = self.i(x)
        return self.o(x + self.a * self.l2(F.gelu(self.l1(x))))


class LinenReZero(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8, name="i")(x)
        h = linen.Dense(8, name="l2")(linen.relu(linen.Dense(8, name="l1")(x)))
        return linen.Dense(3, name="o")(x + self.param("a", linen.initializers.zeros, (8,)) * h)


def test_what_the_output_does_not_feel_is_not_cut_otherwise():
    """GELU for ReLU where nothing comes through: outputs and gradients agree, and say nothing of it."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    report = parity.check(ReZero(), LinenReZero(), x)
    assert [d.code for d in report.diagnoses] == ["activation"]


class Causal(nn.Module):
    """Convolutions over time that see only what was before: padded on both sides and cut off, or padded by hand."""

    def __init__(self, by_hand=False, eps=1e-5):
        super().__init__()
        pads = [0, 0] if by_hand else [2, 4]
        self.a, self.b = nn.Conv1d(3, 4, 3, padding=pads[0]), nn.Conv1d(4, 4, 3, padding=pads[1], dilation=2)
        self.norm, self.d, self.by_hand = nn.BatchNorm1d(4, eps=eps), nn.Linear(4, 2), by_hand

    def forward(self, x):
        for layer, pad in (self.a, 2), (self.b, 4):
            x = layer(F.pad(x, (pad, 0))) if self.by_hand else layer(x)[..., :-pad]
        return self.d(torch.relu(self.norm(x)).mean(-1))


class FlaxCausal(linen.Module):
    factor: float = 1.0
    momentum: float = 0.9
    padding: str = "CAUSAL"

    @linen.compact
    def __call__(self, x, train):
        for dilation in 1, 2:
            x = linen.Conv(4, (3,), kernel_dilation=dilation, padding=self.padding)(x)
        norm = linen.BatchNorm(use_running_average=not train, momentum=self.momentum)
        return linen.Dense(2)(self.factor * linen.relu(norm(x)).mean(1))


SERIES = np.random.default_rng(0).normal(size=(6, 3, 12)).astype(np.float32)
CAUSAL = pytest.mark.parametrize("by_hand", [False, True], ids=["cut off", "by hand"])


@CAUSAL
@pytest.mark.parametrize(
    ("options", "momentum", "factor", "train", "codes"),
    [
        ({}, 0.9, 1.0, False, []),
        ({}, 0.9, 1.0, True, ["unbiased-variance"]),
        ({}, 0.1, 1.0, True, ["momentum-inverted", "unbiased-variance"]),
        ({"eps": 1e-3}, 0.9, 1.0, False, ["epsilon"]),
        ({}, 0.9, 0.8, False, ["unexplained"]),
    ],
    ids=["eval", "train", "momentum", "epsilon", "a factor behind it"],
)
def test_beside_a_mistake(by_hand, options, momentum, factor, train, codes):
    """A place that is cut otherwise is no mistake, and hides none, whatever else differs."""
    torch.manual_seed(0)
    report = parity.check(Causal(by_hand, **options), FlaxCausal(factor, momentum), SERIES, train=train)
    assert [d.code for d in report.diagnoses] == codes
    assert any("cut otherwise at a, b" in note for note in report.notes)


@CAUSAL
def test_padding_that_is_a_mistake(by_hand):
    torch.manual_seed(0)
    report = parity.check(Causal(by_hand), FlaxCausal(padding="SAME"), SERIES, train=False)
    assert {d.code for d in report.diagnoses} == {"padding"}
    assert not any("cut otherwise" in note for note in report.notes)


class Bags(nn.Module):
    """The sparse features of a recommender."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.EmbeddingBag(9, 4, mode="sum"), nn.EmbeddingBag(9, 4, mode="sum")
        self.head, self.last = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, ids):
        return self.last(torch.relu(self.head(torch.cat([self.a(ids), self.b(ids)], 1))))


class EmbeddingsThatAreAdded(linen.Module):
    pool: object = jnp.sum
    act: object = linen.relu

    @linen.compact
    def __call__(self, ids):
        a, b = (self.pool(linen.Embed(9, 4, name=name)(ids), axis=1) for name in "ab")
        return linen.Dense(2, name="last")(self.act(linen.Dense(6, name="head")(jnp.concatenate([a, b], 1))))


def test_bags_of_embeddings_hide_no_mistake():
    """They are cut otherwise one beside the other: what is compared behind the first is the second."""
    ids = np.random.default_rng(0).integers(0, 9, (5, 3))
    assert parity.check(Bags(), EmbeddingsThatAreAdded(), ids).ok
    report = parity.check(Bags(), EmbeddingsThatAreAdded(act=linen.silu), ids)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("activation", "last")]
    (found,) = parity.check(Bags(), EmbeddingsThatAreAdded(pool=jnp.mean), ids).diagnoses
    assert (found.code, found.layer) == ("unexplained", "head")
