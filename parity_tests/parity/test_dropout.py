"""Dropout that is active in prediction: as a function, as a module, inside of attention; on one side or on both."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from flax import nnx
from flax.linen.attention import dot_product_attention_weights
from torch import nn
from torch.nn.functional import dropout, scaled_dot_product_attention

import parity

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)


class Torch(nn.Module):
    """Attention and dropout between two layers; `where` says what is active in prediction."""

    def __init__(self, where: str = "", rate: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop, self.where, self.rate = nn.Dropout(rate), where, rate

    def forward(self, x):
        y = self.a(x)
        y = F.scaled_dot_product_attention(y, y, y, dropout_p=self.rate if self.where == "attention" else 0.0)
        y = F.dropout(y, self.rate) if self.where == "function" else y
        y = F.alpha_dropout(y, self.rate) if self.where == "alpha" else y
        if self.where == "module":
            self.drop.train()
        y = self.b(self.drop(y))
        return self.c(F.dropout(y, self.rate) if self.where == "later" else y)


class Flax(linen.Module):
    where: str = ""
    rate: float = 0.1

    @linen.compact
    def __call__(self, x):
        y = linen.Dense(8)(x)[..., None, :]
        options: dict[str, Any] = {"deterministic": self.where != "attention", "dropout_rate": self.rate}
        y = linen.dot_product_attention(y, y, y, dropout_rng=self.make_rng("dropout"), **options)[..., 0, :]
        y = linen.Dense(8)(linen.Dropout(self.rate)(y, deterministic=self.where not in ("function", "module")))
        return linen.Dense(3)(linen.Dropout(self.rate, deterministic=self.where != "later")(y))


class NnxFlax(nnx.Module):
    def __init__(self, where="", rate=0.1):
        rngs = nnx.Rngs(0)
        self.a, self.b, self.c = (nnx.Linear(8, n, rngs=rngs) for n in (8, 8, 3))
        self.drop, self.where, self.rate, self.rngs = nnx.Dropout(rate, rngs=rngs), where, rate, rngs

    def __call__(self, x):
        y = self.a(x)[..., None, :]
        options = {"deterministic": self.where != "attention", "dropout_rate": self.rate}
        y = nnx.dot_product_attention(y, y, y, dropout_rng=self.rngs.dropout(), **options)[..., 0, :]
        y = self.b(self.drop(y, deterministic=self.where not in ("function", "module")))
        return self.c(self.drop(y, deterministic=self.where != "later"))


@pytest.mark.parametrize("make", [Flax, NnxFlax])
@pytest.mark.parametrize("where", ["attention", "function", "module", "later"])
def test_on_one_side_it_is_named_and_on_both_it_is_noted(where, make):
    layer = {"module": "drop", "later": "c"}.get(where, "drop")
    for torch_where, flax_where, side in ((where, "", "PyTorch"), ("", where, "Flax")):
        report = parity.check(Torch(torch_where), make(flax_where), X, flax_inputs=[X], train=False)
        assert [(d.code, d.layer) for d in report.diagnoses] == [("dropout-active", layer)], report
        assert f"{side} applies dropout of rate 0.1 in prediction" in report.diagnoses[0].evidence
        # What it is besides is compared.
        assert all(row.ok for row in report.layers)
    report = parity.check(Torch(where), make(where), X, flax_inputs=[X], train=False)
    assert report.ok, report
    assert any("dropout of rate 0.1 is active in prediction on both sides" in note for note in report.notes)


def test_another_rate_or_another_place_is_no_partner():
    report = parity.check(Torch("function"), Flax("function", 0.2), X, flax_inputs=[X], train=False)
    assert [d.code for d in report.diagnoses] == ["dropout-active"] * 2
    report = parity.check(Torch("function"), Flax("later"), X, flax_inputs=[X], train=False)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("dropout-active", "drop"), ("dropout-active", "c")]


def test_other_kinds_of_dropout():
    report = parity.check(Torch("alpha"), Flax(), X, flax_inputs=[X], train=False)
    assert report.ok  # `F.alpha_dropout` is off unless it is told training=True


@pytest.mark.parametrize("where", ["", "attention", "function"])
def test_what_is_not_active_is_not_told(where):
    report = parity.check(Torch(), Flax(), X, flax_inputs=[X], train=False)
    assert report.ok
    assert not report.notes
    report = parity.check(Torch(where), Flax(), X, flax_inputs=[X], train=True)
    assert report.ok, report
    assert report.notes == ["dropout was switched off on both sides, as it is random in training"]


def test_dumps(tmp_path):
    for where, codes in (("", ["dropout-active"]), ("attention", [])):
        parity.dump(Torch(where), [X], tmp_path / "torch", train=False)
        module = Flax("attention")
        parity.dump(module, [X], tmp_path / "flax", train=False, weights=tmp_path / "torch", flax_layout=True)
        report = parity.compare(tmp_path / "torch", tmp_path / "flax")
        assert [d.code for d in report.diagnoses] == codes


def test_functions_are_put_back():
    before = F.dropout, F.scaled_dot_product_attention
    parity.check(Torch("function"), Flax(), X, flax_inputs=[X], train=False)
    assert (F.dropout, F.scaled_dot_product_attention) == before


class ImportedTorch(nn.Module):
    """Dropout and attention by names of this file, the dropout's also kept by the module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.dropped = nn.Linear(8, 8), nn.Linear(8, 3), [dropout]

    def forward(self, x):
        y = self.a(x)
        y = scaled_dot_product_attention(y, y, y, dropout_p=0.5 if self.training else 0.0)
        return self.b(self.dropped[0](dropout(y, 0.5, self.training), 0.5, self.training))


class ImportedFlax(linen.Module):
    @linen.compact
    def __call__(self, x, deterministic: bool = True):
        y = linen.Dense(8)(x)[..., None, :]
        options: dict[str, Any] = {"dropout_rng": self.make_rng("dropout"), "dropout_rate": 0.5}
        weights = dot_product_attention_weights(y, y, deterministic=deterministic, **options)
        return linen.Dense(3)(jnp.einsum("nhqk,nkhd->nqhd", weights, y)[..., 0, :])


def test_functions_that_were_imported_by_name():
    """As published networks have them: they are off in training too, and told."""
    held = dropout.__code__, dot_product_attention_weights.__code__, scaled_dot_product_attention
    options: dict[str, Any] = {"optimizers": (lambda p: torch.optim.SGD(p, 0.1), optax.sgd(0.1)), "steps": 2}
    report = parity.check(ImportedTorch(), ImportedFlax(), X, flax_inputs=[X], **options)
    assert report.ok, report
    assert "dropout was switched off on both sides, as it is random in training" in report.notes
    assert (dropout.__code__, dot_product_attention_weights.__code__, scaled_dot_product_attention) == held
    assert F.scaled_dot_product_attention is scaled_dot_product_attention


class Rated(nn.Module):
    def __init__(self, rate, by_function=False):
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(8, 8), nn.Dropout(rate), nn.Linear(8, 3)
        self.rate, self.by_function = rate, by_function

    def forward(self, x):
        x = self.a(x)
        return self.b(F.dropout(x, self.rate, self.training) if self.by_function else self.drop(x))


class LinenRated(linen.Module):
    rate: float

    @linen.compact
    def __call__(self, x, train):
        return linen.Dense(3)(linen.Dropout(self.rate, deterministic=not train)(linen.Dense(8)(x)))


@pytest.mark.parametrize("by_function", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_rates_in_training(train, by_function):
    """A share that is kept, for one that is dropped, is told; in prediction there is none."""
    torch.manual_seed(0)
    told = "the rates of dropout differ, which was not compared: 0.2 in PyTorch, 0.8 in Flax"
    for rate in 0.2, 0.8:
        report = parity.check(Rated(0.2, by_function), LinenRated(rate), X, train=train)
        assert report.ok
        assert (told in report.notes) == (train and rate == 0.8)
    none = parity.check(Rated(0.2, by_function), LinenRated(0.0), X, train=train)
    assert any("0.2 in PyTorch, none in Flax" in note for note in none.notes) == train


class DropPath(nn.Module):
    """As published networks write it."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x.div(keep) * (keep + torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype)).floor()


class LinenDropPath(linen.Module):
    rate: float

    @linen.compact
    def __call__(self, x, deterministic=True):
        if self.rate == 0.0 or deterministic:
            return x
        keep = 1 - self.rate
        kept = jax.random.bernoulli(self.make_rng("droppath"), keep, (len(x), *[1] * (x.ndim - 1)))
        return x / keep * kept


class NnxDropPath(nnx.Module):
    def __init__(self, rate, rngs):
        self.rate, self.rngs = rate, rngs

    def __call__(self, x, deterministic=True):
        keep = 1 - self.rate
        return x if deterministic else x / keep * jax.random.bernoulli(self.rngs.dropout(), keep, (len(x), 1, 1))


class WithPaths(nn.Module):
    def __init__(self, rate=0.5):
        super().__init__()
        self.a, self.path, self.b = nn.Linear(8, 8), DropPath(rate), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(x + self.path(self.a(x)))


class LinenPaths(linen.Module):
    rate: float = 0.5
    scale: float = 1.0

    @linen.compact
    def __call__(self, x, train):
        y = LinenDropPath(self.rate)(linen.Dense(8)(x), deterministic=not train)
        return linen.Dense(3)(x + self.scale * y)


class NnxPaths(nnx.Module):
    def __init__(self, rate=0.5, scale=1.0):
        rngs = nnx.Rngs(0)
        self.a, self.path, self.b = nnx.Linear(8, 8, rngs=rngs), NnxDropPath(rate, rngs), nnx.Linear(8, 3, rngs=rngs)
        self.scale = scale

    def __call__(self, x, train):
        return self.b(x + self.scale * self.path(self.a(x), deterministic=not train))


@pytest.mark.parametrize("make", [LinenPaths, NnxPaths])
def test_dropped_paths(make):
    """Stochastic depth is random in training, and neither framework's own: off on both sides, and told."""
    x = np.random.default_rng(1).normal(size=(6, 5, 8)).astype(np.float32)
    options: dict[str, Any] = {"optimizers": (lambda p: torch.optim.SGD(p, 0.1), optax.sgd(0.1)), "steps": 2}
    torch.manual_seed(0)
    report = parity.check(WithPaths(), make(), x, flax_inputs=[x], **options)
    assert report.ok, report
    assert report.notes == ["dropout was switched off on both sides, as it is random in training"]
    report = parity.check(WithPaths(), make(0.2), x, flax_inputs=[x])
    assert any("0.5 in PyTorch, 0.2 in Flax" in note for note in report.notes)
    assert not parity.check(WithPaths(), make(scale=0.9), x, flax_inputs=[x]).ok
