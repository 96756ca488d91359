"""Numbers beside which others vanish, outputs that are none, and what only decays: none of them hides a mistake."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import parity

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
KEPT = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)


class Masked(nn.Module):
    """Logits, of which some are masked by a large negative number."""

    def __init__(self, value, shift=0.0):
        super().__init__()
        self.h, self.value, self.shift = nn.Linear(5, 8), value, shift

    def forward(self, x):
        return (self.h(x) + self.shift).masked_fill(torch.from_numpy(~KEPT), self.value)


class LinenMasked(linen.Module):
    value: float

    @linen.compact
    def __call__(self, x):
        return jnp.where(KEPT, linen.Dense(8)(x), self.value)


@pytest.mark.parametrize("value", [float(np.finfo(np.float32).min), -1e30, -1e9, -np.inf], ids=str)
def test_what_stands_beside_a_mask(value):
    assert parity.check(Masked(value), LinenMasked(value), X).ok
    for shift in 1.0, 1e-6:
        assert not parity.check(Masked(value, shift), LinenMasked(value), X).ok


class Constant(linen.Module):
    """A table in a collection of its own."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(x) * self.variable("constants", "c", lambda: jnp.array([1.0, 2.0, 3.0, 4.0])).value


class TorchConstant(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.a, self.factor = nn.Linear(5, 4), factor

    def forward(self, x):
        return self.a(x) * torch.tensor([1.0, 2.0, 3.0, 4.0 * self.factor], dtype=x.dtype)


def test_constants_of_the_module_are_its_own():
    assert parity.check(TorchConstant(), Constant(), X, train=False).ok
    assert not parity.check(TorchConstant(1.5), Constant(), X, train=False).ok


class Best(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 4)

    def forward(self, x):
        return self.a(x).argmax(-1)


class LinenBest(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(x).argmin(-1)


def test_outputs_that_are_no_numbers_are_not_compared():
    report = parity.check(Best(), LinenBest(), X, train=False)
    assert [d.code for d in report.diagnoses] == ["not-compared"]
    assert "no floating-point numbers" in report.diagnoses[0].evidence


def test_a_loss_without_a_gradient_compares_nothing():
    loss = lambda y: (y > 0).sum() * 1.0, lambda y: (y > 0).sum() * 1.0
    report = parity.check(TorchConstant(), Constant(), X, train=False, loss=loss)
    assert "not-compared" in [d.code for d in report.diagnoses]


class Unused(nn.Module):
    """A layer that is called, and whose result nobody takes."""

    def __init__(self):
        super().__init__()
        self.a, self.u = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x):
        self.u(x)
        return self.a(x)


class LinenUnused(linen.Module):
    @linen.compact
    def __call__(self, x):
        linen.Dense(4, name="u")(x)
        return linen.Dense(4, name="a")(x)


def test_what_only_decays_is_compared():
    """PyTorch leaves what has no gradient as it is, optax decays it."""
    pair = (lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1)), optax.adamw(1e-2, weight_decay=0.1)
    assert not parity.check(Unused(), LinenUnused(), X, steps=2, optimizers=pair).ok
    pair = (lambda p: torch.optim.SGD(p, 1e-2)), optax.sgd(1e-2)
    assert parity.check(Unused(), LinenUnused(), X, steps=2, optimizers=pair).ok


def test_frozen_on_both_sides():
    module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    module[0].requires_grad_(False)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(jnp.tanh(linen.Dense(6)(x)))

    made = parity.to_flax(module, Net(), inputs=[X])["params"]
    labels = {name: "frozen" if v["kernel"].shape == (5, 6) else "trained" for name, v in made.items()}
    frozen = optax.multi_transform({"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()}, labels)
    factory = lambda p: torch.optim.SGD([v for v in p if v.requires_grad], 0.1)  # noqa: E731
    report = parity.check(module, Net(), X, steps=2, optimizers=(factory, frozen))
    assert report.ok, report
