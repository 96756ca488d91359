"""Tables that PyTorch keeps in a parameter and does not train, and Flax has in its code: sinusoids of positions."""

import warnings

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity

IDS = np.array([[1, 2, 3, 8], [4, 5, 6, 7]])


def sinusoids(rows, size, base=1e4):
    angles = np.arange(rows)[:, None] / base ** (2 * (np.arange(size) // 2) / size)
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], -1)


class Positions(nn.Embedding):
    def __init__(self, rows, size):
        super().__init__(rows, size)
        self.weight = nn.Parameter(torch.tensor(sinusoids(rows, size), dtype=torch.float32), requires_grad=False)


class Bare(nn.Module):
    def __init__(self, rows, size):
        super().__init__()
        self.first = nn.Parameter(torch.randn(size))
        self.table = nn.Parameter(torch.tensor(sinusoids(rows, size), dtype=torch.float32), requires_grad=False)

    def forward(self, places):
        return self.table[places] + self.first


class FlaxBare(linen.Module):
    @linen.compact
    def __call__(self, places):
        table = jnp.asarray(sinusoids(6, 4))
        return table[places] + self.param("first", linen.initializers.zeros, (4,))


class Encoder(nn.Module):
    def __init__(self, positions=Positions):
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), positions(6, 4)
        self.norm, self.hidden, self.head = nn.LayerNorm(4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, ids):
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        return self.head(torch.relu(self.hidden(x)))


class FlaxEncoder(linen.Module):
    base: float = 1e4
    bare: bool = False
    activation: object = linen.relu
    without: bool = False
    factor: float = 1.0

    @linen.compact
    def __call__(self, ids):
        places = jnp.arange(ids.shape[1])
        table = jnp.asarray(sinusoids(6, 4, self.base))
        x = self.factor * linen.Embed(9, 4, name="words")(ids)
        if not self.without:
            x = x + (FlaxBare(name="places")(places) if self.bare else table[places])
        x = linen.LayerNorm(epsilon=1e-5, name="norm")(x)
        return linen.Dense(3, name="head")(self.activation(linen.Dense(5, name="hidden")(x)))


def encoder(positions=Positions):
    torch.manual_seed(0)
    return Encoder(positions)


@pytest.mark.parametrize("bare", [False, True])
def test_it_is_checked_with_the_numbers_of_the_code(bare):
    name = "places.table" if bare else "places.weight"
    report = parity.check(encoder(Bare if bare else Positions), FlaxEncoder(bare=bare), IDS)
    assert report.ok, report
    assert sum(f"{name} is not trained in PyTorch" in note for note in report.notes) == 1
    assert sum("rounded to float32 in PyTorch" in note for note in report.notes) == 1


@pytest.mark.parametrize(
    ("flax_module", "code", "layer"),
    [
        (FlaxEncoder(activation=linen.gelu), "activation", "head"),
        (FlaxEncoder(base=1e3), "no-partner", "places"),
        (FlaxEncoder(without=True), "no-partner", "places"),
        (FlaxEncoder(factor=2.0), "unexplained", "norm"),
    ],
)
def test_a_mistake_is_named_all_the_same(flax_module, code, layer):
    report = parity.check(encoder(), flax_module, IDS)
    assert not report.ok
    assert [(d.code, d.layer) for d in report.diagnoses] == [(code, layer)]


def test_what_is_trained_needs_a_partner():
    module = encoder()
    module.places.weight.requires_grad_(True)
    report = parity.check(module, FlaxEncoder(), IDS)
    assert [d.code for d in report.diagnoses] == ["no-partner"]
    with pytest.raises(ValueError, match=r"places.weight is left over"):
        parity.to_flax(module, FlaxEncoder(), inputs=[IDS])


def test_it_is_told_where_weights_are_carried():
    module = encoder()
    with pytest.warns(parity.weights.ParityWarning, match=r"places.weight is not trained in PyTorch"):
        variables = parity.to_flax(module, FlaxEncoder(), inputs=[IDS])
    with pytest.warns(parity.weights.ParityWarning, match=r"places.weight is not trained in PyTorch"):
        state = parity.to_torch(variables, encoder(), flax_module=FlaxEncoder(), inputs=[IDS])
    assert all(torch.equal(state[name], v) for name, v in module.state_dict().items())


def test_a_partner_is_taken_where_there_is_one():
    class WithTable(linen.Module):
        @linen.compact
        def __call__(self, ids):
            x = linen.Embed(9, 4, name="words")(ids) + linen.Embed(6, 4, name="places")(jnp.arange(ids.shape[1]))
            x = linen.LayerNorm(epsilon=1e-5, name="norm")(x)
            return linen.Dense(3, name="head")(linen.relu(linen.Dense(5, name="hidden")(x)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables = parity.to_flax(encoder(), WithTable(), inputs=[IDS])
    assert np.array_equal(variables["params"]["places"]["embedding"], encoder().places.weight.numpy())
