"""What a network gives beside floating arrays, in which order, and with which axes: compared, or said."""

from __future__ import annotations

from typing import Any

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


class Torch(nn.Module):
    """y = a(x), and what `then` makes of it."""

    def __init__(self, then, size=3):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.then = nn.Linear(4, size), then

    def forward(self, x):
        return self.then(self.a(x))


class Flax(linen.Module):
    then: Any
    size: int = 3

    @linen.compact
    def __call__(self, x):
        return self.then(linen.Dense(self.size)(x))


def checked(torch_then, flax_then, x=X, size=3, **options):
    return parity.check(Torch(torch_then, size), Flax(flax_then, size), x, **options)


def complex_in_torch(y):
    return torch.complex(y, y**2)


def complex_in_jax(y):
    return y + 1j * y**2


# Beside y: what is the same in both, and what differs in one place.
BESIDE = {
    "integers": (lambda y: y.argmax(-1), lambda y: y.argmax(-1), lambda y: y.argmax(-1).at[0].add(1)),
    "truth values": (lambda y: y > 0, lambda y: y > 0, lambda y: (y > 0).at[0, 0].set(~(y > 0)[0, 0])),
    "complex": (complex_in_torch, complex_in_jax, lambda y: jnp.conj(complex_in_jax(y)[:1]).repeat(6, 0)),
    "large integers": (
        lambda y: torch.full((2,), 2**40),
        lambda y: jnp.full((2,), 2**40),
        lambda y: jnp.full((2,), 2**40 + 1),
    ),
    "a number": (lambda y: len(y), lambda y: len(y), lambda y: len(y) + 1),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_floating_outputs_is_compared(name, train):
    torch_part, flax_part, other = BESIDE[name]
    report = checked(lambda y: (torch_part(y), y), lambda y: (flax_part(y), y), train=train)
    assert report.ok, report
    outputs = [row for row in report.layers if row.quantity == "output" and not row.torch_layer]
    assert len(outputs) == 2
    report = checked(lambda y: (torch_part(y), y), lambda y: (other(y), y), train=train)
    assert not report.ok
    assert report.first_divergence.phase == "forward"
    assert [d.code for d in report.diagnoses] == ["unexplained"]
    assert "output 1 of 2" in report.diagnoses[0].evidence


def test_a_complex_output_has_its_part_in_the_loss():
    """Its real part is taken with another derivative: only the gradient shows it."""

    def stopped(y):
        import jax

        return complex_in_jax(jax.lax.stop_gradient(y)), y

    report = checked(lambda y: (complex_in_torch(y), y), stopped)
    assert report.first_divergence.phase == "backward"


@pytest.mark.parametrize("name", ["integers", "complex", "truth values"])
def test_dumps_hold_them(name, tmp_path):
    torch_part, flax_part, other = BESIDE[name]
    parity.dump(Torch(lambda y: (torch_part(y), y)), [X], tmp_path / "torch")
    for make, fine in ((flax_part, True), (other, False)):
        module = Flax(lambda y, make=make: (make(y), y))
        parity.dump(module, [X], tmp_path / "flax", weights=tmp_path / "torch")
        report = parity.compare(tmp_path / "torch", tmp_path / "flax")
        assert report.ok == fine, report
