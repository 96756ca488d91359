"""Losses that compute in float32 whatever the output's dtype, as of float32 targets: no difference, and said."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import parity
from parity.sides.jax.precision import rounds
from parity.sides.torch.precision import Rounds

X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
TARGET = np.random.default_rng(9).normal(size=(8, 4)).astype(np.float32)
TARGET_TORCH = torch.tensor(TARGET)


def divergence(temperature=1.0):
    return (
        lambda out: F.kl_div(out.log_softmax(-1), torch.softmax(TARGET_TORCH, -1), reduction="batchmean"),
        lambda out: optax.losses.kl_divergence(jax.nn.log_softmax(out), jax.nn.softmax(TARGET / temperature)).mean(),
    )


def cosine():
    return (
        lambda out: (1 - F.cosine_similarity(out, TARGET_TORCH, dim=-1)).mean(),
        lambda out: (1 - optax.cosine_similarity(out, TARGET)).mean(),
    )


def squares():
    return (
        lambda out: F.mse_loss(out, TARGET_TORCH.to(out)),
        lambda out: 2 * optax.l2_loss(out, TARGET.astype(np.float64)).mean(),
    )


def check(loss, **options):
    torch.manual_seed(0)
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        return parity.check(torch.nn.Linear(5, 4), nn.Dense(4), X, loss=loss, **options)


@pytest.mark.parametrize("loss", [divergence, cosine])
def test_rounding_of_the_targets_is_no_difference(loss):
    """Of the softmax of float32 logits, or the length of a float32 vector: 7e-8 in either framework."""
    report = check(loss())
    assert report.ok
    assert any("loss computes in float32 inside" in note for note in report.notes)


def test_through_training_too():
    optimizers = (lambda p: torch.optim.SGD(p, lr=0.1), optax.sgd(0.1))
    assert check(divergence(), steps=2, optimizers=optimizers).ok


def test_a_mistake_behind_it_is_found():
    assert not check(divergence(temperature=1.0001)).ok


def test_targets_that_are_only_widened_round_nothing():
    report = check(squares())
    assert report.ok
    assert not any("float32 inside" in note for note in report.notes)
    assert max(d.bound for d in report.layers if d.phase == "loss") == 1e-10


X64 = np.linspace(-1, 1, 4)
SHORT = np.float32(TARGET)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: (x * SHORT[0]).sum(), False),
        (lambda x: (x * jnp.where(SHORT[0] > 0, SHORT[1], 1)).sum(), False),
        (lambda x: (x * jax.nn.softmax(SHORT[0])).sum(), True),
        (lambda x: x.astype(jnp.float32).sum(), True),
        (lambda x: jax.jit(lambda y: (y * jnp.exp(SHORT[0])).sum())(x), True),
        (lambda x: jax.lax.scan(lambda c, v: (c + v.astype(jnp.float32), v), jnp.float32(0), x)[0], True),
        (lambda x: (x * jax.lax.iota(jnp.int32, 4)).sum(), False),
    ],
)
def test_jax(function, expected):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        assert rounds(function, jnp.asarray(X64)) is expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: (x * TARGET_TORCH[0]).sum(), False),
        (lambda x: (x * torch.where(TARGET_TORCH[0] > 0, TARGET_TORCH[1], 1.0)).sum(), False),
        (lambda x: (x * torch.softmax(TARGET_TORCH[0], 0)).sum(), True),
        (lambda x: x.float().sum(), True),
        (lambda x: (x * torch.arange(4)).sum(), False),
    ],
)
def test_torch(function, expected):
    with Rounds() as seen:
        function(torch.from_numpy(X64))
    assert seen.seen is expected


def test_a_loss_that_indexes_by_whole_numbers_of_numpy_runs_in_both_widths():
    """JAX gives int64 that it has made of them in float64 to the run in float32, too."""
    torch.manual_seed(0)
    rows, actions = np.arange(8), np.random.default_rng(0).integers(0, 4, 8)

    def torch_loss(q):
        return q[torch.tensor(rows), torch.tensor(actions)].square().mean()

    def jax_loss(q):
        return (q[jnp.arange(8), actions] ** 2).mean()

    report = parity.check(torch.nn.Linear(5, 4), nn.Dense(4), X, loss=(torch_loss, jax_loss))
    assert report.ok, report
    assert report.details["dtype"] == "float64, and float32 beside it"
    assert all(
        row.error32 is not None for row in report.layers if row.quantity.endswith("gradient") and row.torch_layer
    )
