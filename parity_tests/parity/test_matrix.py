"""The matrix of `python -m parity check`: complete, within its bounds on a part, and able to fail."""

import jax.numpy as jnp
import numpy as np
import pytest

import jax_bn
import torch_bn
from parity.__main__ import main
from parity.wings import matrix, subjects
from parity.wings.matrix import Case
from parity.wings.subjects import CONVENTIONS
from truth import batch_norm as exact

QUICK = [
    Case("batch_norm", "train", "float32", "seed", (4, 3, 5, 6), "jit"),
    Case("batch_norm", "train", "float64", "PyTorch", (6, 3, 7), "eager"),
    Case("batch_norm", "eval", "bfloat16", "seed", (4, 3, 5, 6), "jit"),
    Case("batch_norm", "train", "float16", "Flax", (16, 5), "jit"),
    Case("batch_norm", "train", "float32", "seed", (64, 3), "jit", hard=True),
    Case("BatchNorm", "train", "float32", "PyTorch", (4, 3, 5, 6), "jit"),
    Case("BatchNorm (nnx)", "eval", "float64", "Flax", (4, 3, 5, 6), "jit"),
    Case("BLeNet", "train", "float32", "seed", (1, 12), "jit"),
]


@pytest.fixture(autouse=True)
def programs():
    """As whoever uses them has them: float32's rounding is looked at."""


@pytest.mark.parametrize("case", QUICK, ids=lambda c: "-".join(map(str, c[:4])))
def test_within_bounds(case):
    row = matrix.run(case)
    assert row.ok, row
    assert row.apart <= row.jax + row.torch + 1e-20


def test_everything_is_in_it():
    """Every value of every dimension, and no line twice."""
    every = list(matrix.cases())
    assert len(set(every)) == len(every)
    assert {c.layer for c in every} == {"batch_norm", "BatchNorm", "BatchNorm (nnx)", "BLeNet"}
    assert {c.mode for c in every} == {"train", "eval"}
    assert {c.dtype for c in every} == {"float16", "bfloat16", "float32", "float64"}
    assert {c.convention for c in every} == {"seed", "PyTorch", "Flax"}
    assert {c.how for c in every} == {"jit", "eager", "compile"}
    assert len({c.shape for c in every}) >= 6


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
def test_the_truth(convention, train):
    """numpy's longdouble against sixty digits."""
    g = subjects.given((4, 3, 5), "float64", convention, train=train, hard=True)
    values, _ = subjects.truth(g, convention, train=train)
    sixty = exact.batch_norm(
        g.x, g.gamma, g.beta, g.mean, g.var, g.dy, train=train, momentum=convention.momentum,
        unbiased_moving_var=convention.unbiased,
    )  # fmt: skip
    for name, value in values.items():
        np.testing.assert_allclose(value.astype(float), getattr(sixty, name).astype(float), rtol=1e-13, atol=1e-13)


def broken_jax(x, gamma, beta, stats, **options):
    y, stats = jax_bn.batch_norm(x, gamma, beta, stats, **options)
    return y * jnp.asarray(1 + 1e-5, y.dtype), stats


def broken_torch(x, gamma, beta, mean, var, **options):
    y, mean, var = torch_bn.batch_norm(x, gamma, beta, mean, var, **options)
    return y, mean, var * (1 + 1e-5)


def test_a_wing_that_is_wrong_is_seen(monkeypatch):
    case = QUICK[0]
    with monkeypatch.context() as patch:
        patch.setattr(subjects, "jax_bn", _Replaced(jax_bn, broken_jax))
        row = matrix.run(case)
    assert not row.ok
    assert row.jax > row.bound > row.torch
    with monkeypatch.context() as patch:
        patch.setattr(subjects, "torch_bn", _Replaced(torch_bn, broken_torch))
        row = matrix.run(case)
    assert not row.ok
    assert row.torch > row.bound > row.jax


class _Replaced:
    """A package whose batch_norm is another."""

    def __init__(self, package, batch_norm):
        self.package, self.batch_norm = package, batch_norm

    def __getattr__(self, name):
        return getattr(self.package, name)


def test_command(capsys, monkeypatch):
    """Exit status 0, and 1 on a miss; what was compared, how far apart, and the bound are printed."""
    monkeypatch.setattr(matrix, "cases", lambda: iter(QUICK[:2]))
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert "2 compared, all within their bounds" in out
    assert all(word in out for word in ("batch_norm", "float64", "PyTorch", "6x3x7", "apart", "bound"))
    monkeypatch.setattr(subjects, "jax_bn", _Replaced(jax_bn, broken_jax))
    assert main(["check", "--only", "float32"]) == 1
    assert "1 of 1 beyond their bound" in capsys.readouterr().out


def test_command_refuses(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check", "--only", "no such line"])
    assert stop.value.code == 2
    assert "allowed: batch_norm" in capsys.readouterr().err
