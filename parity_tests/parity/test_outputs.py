"""What a network gives beside floating arrays, in which order, and with which axes: compared, or said."""

from __future__ import annotations

from collections import OrderedDict
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


def outputs_of(report):
    return [row for row in report.layers if row.quantity == "output" and not row.torch_layer]


KEYS = {
    "other-order": (lambda y: {"a": y, "b": y**2}, lambda y: {"b": y**2, "a": y}),
    "ordered": (lambda y: OrderedDict(b=y**2, a=y), lambda y: OrderedDict(a=y, b=y**2)),
    "ordered-and-plain": (lambda y: OrderedDict(b=y**2, a=y), lambda y: {"a": y, "b": y**2}),
    "nested": (lambda y: {"h": [y, y**2], "a": (y**3,)}, lambda y: {"a": [y**3], "h": (y, y**2)}),
    "tuple": (lambda y: OrderedDict(b=y**2, a=y), lambda y: (y**2, y)),
    "dict-and-tuple": (lambda y: {"b": y**2, "a": y}, lambda y: (y**2, y)),
    "nested-tuples": (lambda y: (y, (y**2, y**3)), lambda y: ((y, y**2), y**3)),
    "one-other-name": (lambda y: {"b": y**2, "last": y}, lambda y: {"hidden": y, "b": y**2}),
}


@pytest.mark.parametrize("name", KEYS)
def test_outputs_are_paired_by_their_keys(name):
    torch_then, flax_then = KEYS[name]
    report = checked(torch_then, flax_then)
    assert report.ok, report
    count = len(torch.utils._pytree.tree_leaves(torch_then(torch.zeros(1))))
    assert len(outputs_of(report)) == count


def test_exchanged_values_under_the_same_keys_differ():
    assert not checked(lambda y: {"a": y, "b": y**2}, lambda y: {"a": y**2, "b": y}).ok


@pytest.mark.parametrize("way", ["check", "dumps"])
@pytest.mark.parametrize(
    ("torch_then", "flax_then", "said"),
    [
        (lambda y: {"a": y, "b": y**2}, lambda y: {"b": y**2}, "PyTorch's output a has no partner in Flax"),
        (lambda y: {"a": y}, lambda y: {"b": y.sum(), "a": y}, "Flax's output b has no partner in PyTorch"),
        (lambda y: (y, y.sum(0), y.mean()), lambda y: (y, y.mean()), "PyTorch's output 2 of 3 has no partner in Flax"),
        (lambda y: y, lambda y: (y, y[0], y[0]), "Flax's output 2 of 3, output 3 of 3 have no partner in PyTorch"),
        (lambda y: (y, y.argmax(-1)), lambda y: y, "PyTorch's output 2 of 2 has no partner in Flax"),
    ],
)
def test_an_output_without_a_partner_is_named(torch_then, flax_then, said, way, tmp_path):
    if way == "check":
        report = checked(torch_then, flax_then)
    else:
        parity.dump(Torch(torch_then), [X], tmp_path / "torch")
        parity.dump(Flax(flax_then), [X], tmp_path / "flax", weights=tmp_path / "torch")
        report = parity.compare(tmp_path / "flax", tmp_path / "torch")
    assert [d.code for d in report.diagnoses] == ["no-partner"], report
    assert said in report.diagnoses[0].evidence
    # What has one is compared.
    assert any(row.ok for row in outputs_of(report))
    assert report.first_divergence.error == np.inf


def test_an_empty_output_agrees_by_its_shape():
    report = checked(lambda y: (y, y[:0]), lambda y: (y, y[:0]))
    assert report.ok, report
    assert not checked(lambda y: (y, y[:0]), lambda y: (y, y[:0, :2])).ok
    # Where there is nothing else, nothing is compared.
    assert [d.code for d in checked(lambda y: y[:0], lambda y: y[:0]).diagnoses] == ["not-compared"]


SEQUENCE = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)
EQUAL = np.random.default_rng(1).normal(size=(5, 5, 4)).astype(np.float32)


@pytest.mark.parametrize("x", [SEQUENCE, EQUAL], ids=["2-and-5", "5-and-5"])
@pytest.mark.parametrize("swapped", [True, False])
def test_exchanged_axes_are_noted(x, swapped):
    then = (lambda y: y.swapaxes(0, 1)) if swapped else (lambda y: y)
    report = parity.check(Torch(lambda y: {"h": y}), Flax(lambda y: {"h": then(y)}), x, flax_inputs=[x])
    assert report.ok, report
    notes = [note for note in report.notes if "axes exchanged" in note]
    shapes = f"{list((2, 5, 3) if x is SEQUENCE else (5, 5, 3))} in PyTorch"
    assert len(notes) == swapped
    assert all(note.startswith(f"output h is {shapes}") for note in notes)


def test_channels_last_is_noted():
    x = np.random.default_rng(1).normal(size=(2, 3, 6, 5)).astype(np.float32)
    report = parity.check(nn.Conv2d(3, 4, 3), linen.Conv(4, (3, 3), padding="VALID"), x)
    assert report.ok, report
    assert any("[2, 4, 4, 3] in PyTorch, [2, 4, 3, 4] in Flax: the same with axis 1 last" in n for n in report.notes)
