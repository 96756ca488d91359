"""Constants that PyTorch keeps in float32 and Flax's code makes anew: in float64 they are not the same numbers."""

import math

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity

D, MOST = 8, 16
IDS = np.random.default_rng(0).integers(0, 9, (2, 6))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Net(nn.Module):
    """A table of positions in a buffer, and a factor that is a mere attribute."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        places = torch.arange(MOST, dtype=dtype)[:, None]
        angles = places * torch.exp(torch.arange(0, D, 2, dtype=dtype) * (-math.log(10000.0) / D))
        table = torch.stack([angles.sin(), angles.cos()], -1).reshape(1, MOST, D)
        self.register_buffer("table", table.float())
        self.factor = torch.tensor(1 / math.sqrt(D + 1))
        self.words, self.head = nn.Embedding(9, D), nn.Linear(D, 4)

    def forward(self, ids):
        return self.head(torch.tanh(self.words(ids) * self.factor + self.table[:, : ids.shape[1]]))


def table(base):
    angles = jnp.arange(MOST)[:, None] * jnp.exp(jnp.arange(0, D, 2) * (-math.log(base) / D))
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(MOST, D)


class LinenNet(linen.Module):
    base: float = 10000.0
    activation: object = jnp.tanh
    after: float = 1.0

    @linen.compact
    def __call__(self, ids):
        x = linen.Embed(9, D)(ids) / math.sqrt(D + 1) + table(self.base)[: ids.shape[1]]
        return linen.Dense(4)(self.activation(x)) * self.after


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.words, self.head = nnx.Embed(9, D, rngs=rngs), nnx.Linear(D, 4, rngs=rngs)

    def __call__(self, ids):
        return self.head(jnp.tanh(self.words(ids) / math.sqrt(D + 1) + table(10000.0)[: ids.shape[1]]))


def net(**options):
    torch.manual_seed(0)
    return Net(**options)


@pytest.mark.parametrize(
    ("flax_net", "dtype"), [(LinenNet(), torch.float64), (LinenNet(), torch.float32), (NnxNet(), torch.float32)]
)
def test_a_table_in_float32_is_told_with_both_numbers(flax_net, dtype):
    """Rounded at the end, and computed in float32 all the way."""
    module = net(dtype=dtype)
    before = {name: v.clone() for name, v in (*module.named_buffers(), ("factor", module.factor))}
    report = parity.check(module, flax_net, IDS)
    assert report.ok, report
    told = [note for note in report.notes if "is a constant rounded to float32 in PyTorch" in note]
    # NNX's embedding gives float32 even here, so the factor is float32 too, and is measured as rounding.
    names = ["table", "factor"] if isinstance(flax_net, linen.Module) else ["table"]
    assert [note.partition(" ")[0] for note in told] == names
    if "factor" in names:
        assert f"{float(module.factor):.17g} and {1 / math.sqrt(D + 1):.17g}" in told[1]
    assert all(torch.equal(v, before[name]) for name, v in module.named_buffers())
    assert module.factor.dtype == torch.float32


@pytest.mark.parametrize(
    "mistake",
    [{"base": 10001.0}, {"base": 10000.1}, {"activation": jnp.arctan}, {"after": 1 + 1e-8}],
    ids=["base", "base by 1e-5", "activation", "after"],
)
def test_another_constant_and_what_lies_behind_is_a_difference(mistake):
    assert not parity.check(net(), LinenNet(**mistake), IDS).ok


def test_a_mistake_behind_a_rounded_constant_is_named():
    class Gelu(Net):
        def forward(self, ids):
            x = self.words(ids) * self.factor + self.table[:, : ids.shape[1]]
            return self.head(nn.functional.gelu(self.tables_norm(x)))

        def __init__(self):
            super().__init__()
            self.tables_norm = nn.LayerNorm(D)

    class LinenGelu(linen.Module):
        @linen.compact
        def __call__(self, ids):
            x = linen.Embed(9, D)(ids) / math.sqrt(D + 1) + table(10000.0)[: ids.shape[1]]
            return linen.Dense(4)(linen.gelu(linen.LayerNorm(epsilon=1e-5)(x)))

    torch.manual_seed(0)
    report = parity.check(Gelu(), LinenGelu(), IDS)
    assert [d.code for d in report.diagnoses] == ["activation"], report


class Standardized(nn.Module):
    """An image's channels, first in PyTorch, last in Flax."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv((x - self.mean) / self.std)


class LinenStandardized(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Conv(4, (3, 3))((x - jnp.array(MEAN)) / jnp.array(STD))


def test_mean_and_deviation_of_images():
    torch.manual_seed(0)
    x = np.random.default_rng(0).uniform(size=(2, 3, 6, 6)).astype(np.float32)
    report = parity.check(Standardized(), LinenStandardized(), x)
    assert report.ok, report
    assert sum("rounded to float32" in note for note in report.notes) == 2
