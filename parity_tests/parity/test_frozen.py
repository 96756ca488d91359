"""What PyTorch does not train, what sets requires_grad itself, and what computes in float32 inside."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity

TOKENS = np.array([[1, 2, 3, 8], [4, 5, 6, 7]])
X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


class OwnPositions(nn.Embedding):
    """Is given the tokens, and looks up their positions, as Whisper's."""

    shift = 0

    def forward(self, ids):
        return self.weight[self.shift : self.shift + ids.shape[1]]


class Decoder(nn.Module):
    def __init__(self, frozen=True, shift=0):
        super().__init__()
        self.wte, self.wpe, self.d = nn.Embedding(9, 4), OwnPositions(6, 4), nn.Linear(4, 3)
        self.wpe.shift = shift
        self.wpe.requires_grad_(not frozen)

    def forward(self, ids):
        return self.d(self.wte(ids) + self.wpe(ids))


class LinenDecoder(linen.Module):
    is_stopped: bool = True
    each: bool = True

    @linen.compact
    def __call__(self, ids):
        positions = jnp.arange(ids.shape[1])
        positions = jnp.broadcast_to(positions, ids.shape) if self.each else positions
        y = linen.Embed(6, 4, name="wpe")(positions)
        y = jax.lax.stop_gradient(y) if self.is_stopped else y
        return linen.Dense(3, name="d")(linen.Embed(9, 4, name="wte")(ids) + y)


def checked(module, flax_module, x, **options):
    torch.manual_seed(0)
    return parity.check(module(), flax_module, x, **options)


NOTE = "not trained in PyTorch (requires_grad=False), no gradient in Flax: wpe.weight"


@pytest.mark.parametrize("each", [False, True])
def test_a_frozen_embedding_that_finds_the_positions_itself(each):
    """It is given other integers, its output has an axis less, and its gradient stops: the same function."""
    report = checked(Decoder, LinenDecoder(each=each), TOKENS)
    assert report.ok, report
    assert not report.diagnoses
    assert NOTE in report.notes


def test_what_is_frozen_on_one_side():
    """An optimiser that leaves it alone is no other function; a gradient that stops, where PyTorch trains, is one."""
    report = checked(Decoder, LinenDecoder(is_stopped=False), TOKENS)
    assert report.ok, report
    assert NOTE not in report.notes
    report = checked(lambda: Decoder(frozen=False), LinenDecoder(), TOKENS)
    assert not report.ok
    assert report.first_divergence.torch_layer == "wpe"


def test_other_positions_are_found():
    report = checked(lambda: Decoder(shift=1), LinenDecoder(), TOKENS)
    assert not report.ok
    assert report.first_divergence.torch_layer == "wpe"
    assert {d.layer for d in report.diagnoses} == {"wpe"}


class Bare(nn.Module):
    """A frozen parameter without a layer, and a frozen layer in the middle."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.rand(4), requires_grad=False)
        self.first.requires_grad_(False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) * self.scale)


class LinenBare(linen.Module):
    factor: float = 1.0

    @linen.compact
    def __call__(self, x):
        stop = jax.lax.stop_gradient
        y = stop(jnp.tanh(self.factor * linen.Dense(4, name="first")(stop(x))))
        return linen.Dense(2, name="second")(y * stop(self.param("scale", jax.nn.initializers.ones, (4,))))


def test_frozen_layers_and_parameters():
    """The gradient at the network's input stops too, which PyTorch's would not: what is said of it is that alone."""
    report = checked(Bare, LinenBare(), X)
    assert {row.quantity for row in report.layers if not row.error <= row.bound} <= {"input gradient"}
    report = checked(Bare, LinenBare(2.0), X)
    assert [(d.code, d.layer) for d in report.diagnoses][:1] == [("unexplained", "second")]


class SetsItself(nn.Module):
    """Says in training that its input needs a gradient, as Wav2Vec2 does."""

    def __init__(self, says=True):
        super().__init__()
        self.d, self.says = nn.Linear(4, 3), says

    def forward(self, x):
        x = x * 1.0
        if self.training and self.says:
            x.requires_grad = True
        return self.d(x)


class LinenDense(linen.Module):
    dtype: type | None = None
    factor: float = 1.0

    @linen.compact
    def __call__(self, x):
        return self.factor * linen.Dense(3, name="d", dtype=self.dtype)(x)


def test_a_module_that_sets_requires_grad():
    report = checked(SetsItself, LinenDense(), X)
    assert report.ok, report
    assert any(row.quantity == "input gradient" for row in report.layers)
    assert not checked(SetsItself, LinenDense(factor=1.1), X).ok


def test_a_network_in_float32_is_told_from_a_loss():
    """Whose outputs are float32 in a float64 run, that network rounds; else it is what the loss is made with."""
    report = checked(lambda: SetsItself(says=False), LinenDense(jnp.float32), X)
    assert report.ok, report
    assert [note.partition(":")[0] for note in report.notes] == [
        "Flax's network computes in float32 inside, as of dtype=float32"
    ]
    target = np.zeros((3, 3), np.float32)
    losses = (
        lambda y: ((y - torch.from_numpy(target)) ** 2).sum(),
        lambda y: ((y.astype(jnp.float32) - target) ** 2).sum(),
    )
    report = checked(lambda: SetsItself(says=False), LinenDense(), X, loss=losses)
    assert [note.partition(":")[0] for note in report.notes] == [
        "Flax's loss computes in float32 inside, as of float32 targets"
    ]
