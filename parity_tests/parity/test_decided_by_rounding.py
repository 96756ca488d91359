"""Kinks and equal maxima: which way the gradient goes there, rounding decides, and that is no difference."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import parity
from parity.comparison.differences import Difference
from parity.evidence.aside import told
from parity.report import Report
from parity.report.findings import LayerRow

# (a + b) + c is 0, a + (b + c) is 2.8e-17; the other rows are away from it.
X = np.concatenate([[[0.1, 0.6, -0.7]], np.random.default_rng(0).normal(size=(4, 3))])
TOLD = "decided by rounding at first:"


def left(x):
    return (x[..., 0:1] + x[..., 1:2]) + x[..., 2:3]


def right(x):
    return x[..., 0:1] + (x[..., 1:2] + x[..., 2:3])


class Net(nn.Module):
    """A sum that is 0 but for rounding, and what has a kink there: inside of what lies between two layers."""

    def __init__(self, kinked):
        super().__init__()
        self.first, self.last, self.kinked = nn.Linear(3, 3), nn.Linear(1, 4), kinked
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(3))
            self.first.bias.zero_()

    def forward(self, x):
        return self.last(self.kinked(left(self.first(x)), right(self.first(x))))


class LinenNet(linen.Module):
    kinked: object
    passed: float = 1.0  # of the first layer's gradient
    kept: float = 1.0  # of the last layer's

    @linen.compact
    def __call__(self, x):
        first, last = linen.Dense(3, name="first"), linen.Dense(4, name="last")
        # The other way round: what is left in PyTorch is right here.
        y = self.kinked(right(part(first(x), self.passed)), left(part(first(x), self.passed)))
        return part(last(y), self.kept)


def part(y, share):
    return share * y + (1 - share) * jax.lax.stop_gradient(y)


KINKS = {
    "relu": (lambda a, _: torch.relu(a), lambda a, _: jax.nn.relu(a)),
    "abs": (lambda a, _: torch.abs(a), lambda a, _: jnp.abs(a)),
    "maximum": (torch.maximum, jnp.maximum),
    "amax": (
        lambda a, b: torch.cat([3 * a, 2 * b], -1).amax(-1, keepdim=True),
        lambda a, b: jnp.concatenate([3 * a, 2 * b], -1).max(-1, keepdims=True),
    ),
}


def nets(kink, **mistakes):
    torch.manual_seed(0)
    there, here = KINKS[kink]
    return Net(there), LinenNet(here, **mistakes)


@pytest.mark.parametrize("kink", ["relu", "abs", "amax"])
def test_a_kink_is_told_and_is_no_difference(kink):
    report = parity.check(*nets(kink), X)
    assert report.ok, report
    assert any(note.startswith(TOLD) for note in report.notes), report


def test_beside_a_parameter_that_is_one_number():
    """A step aside of a parameter of no axes, as of CLIP's temperature, is an array, too."""

    class Scaled(Net):
        def __init__(self, kinked):
            super().__init__(kinked)
            self.logit_scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return self.logit_scale.exp() * super().forward(x)

    class LinenScaled(LinenNet):
        @linen.compact
        def __call__(self, x):
            first, last = linen.Dense(3, name="first"), linen.Dense(4, name="last")
            scale = self.param("logit_scale", linen.initializers.zeros, ())
            return jnp.exp(scale) * last(self.kinked(right(first(x)), left(first(x))))

    torch.manual_seed(0)
    there, here = KINKS["relu"]
    report = parity.check(Scaled(there), LinenScaled(here), X)
    assert report.ok, report
    assert any(note.startswith(TOLD) for note in report.notes), report


def test_with_variables_of_the_users_own_and_steps():
    module, flax_module = nets("relu")
    variables = parity.to_flax(module, flax_module, inputs=[X])
    options = {"steps": 2, "optimizers": (lambda p: torch.optim.SGD(p, 0.1), optax.sgd(0.1))}
    report = parity.check(module, flax_module, X, flax_inputs=[X], variables=variables, **options)
    assert report.ok, report
    assert any(note.startswith(TOLD) for note in report.notes), report
    variables["params"]["last"]["kernel"] = variables["params"]["last"]["kernel"] * 1.001
    assert not parity.check(module, flax_module, X, variables=variables).ok


@pytest.mark.parametrize(("mistake", "layer"), [("passed", "first"), ("kept", "last")])
def test_a_mistake_beside_a_kink_is_found(mistake, layer):
    """Before it and behind it."""
    report = parity.check(*nets("relu", **{mistake: 0.999}), X)
    assert report.first_divergence.phase == "backward"
    assert report.first_divergence.torch_layer == layer, report


@pytest.mark.parametrize("settles", [True, False, None], ids=["settles", "does not", "was not compared"])
def test_only_what_a_step_aside_settles_is_told(settles):
    """A gradient that differs there still is not decided by rounding."""
    decided = [Difference("backward", ("first", 0), "first", "output gradient", 0.5)]
    error = 1e-15 if settles else 0.5
    row = LayerRow("backward", "first", "first", "linear", "output gradient", error, 1e-9)
    other = LayerRow("backward", "last", "last", "linear", "output gradient", 1e-15, 1e-9)
    report = Report(None, [], [other] if settles is None else [row, other], [], {})
    said = told(decided, report)
    assert said.startswith(TOLD) if settles else not said


def test_a_mistake_where_rounding_decides_is_not_put_down_to_it():
    """At the same number as the kink: aside it still differs, and nothing is said of rounding."""
    report = parity.check(*nets("relu", passed=0.999), X)
    assert not report.ok
    assert not any(note.startswith(TOLD) for note in report.notes), report


def test_a_mistake_forward_is_found_beside_a_kink():
    module, flax_module = nets("relu")
    off = module.last
    module.last = nn.Sequential(off, nn.Hardtanh(-0.5, 0.5))
    assert not parity.check(module, flax_module, X, layer_map={"last.0": "last"}).ok


class Zeros(nn.Module):
    """What is 0 whatever the weights are: there the two derivatives differ, and nothing is rounded."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


class LinenZeros(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2, name="last")(jnp.maximum(linen.Dense(8, use_bias=False, name="first")(x), 0))


def test_another_derivative_at_zero_is_a_difference():
    torch.manual_seed(0)
    x = np.concatenate([X, np.zeros((1, 3))])
    report = parity.check(Zeros(), LinenZeros(), x)
    assert not report.ok
    assert not any(note.startswith(TOLD) for note in report.notes), report


class Pools(nn.Module):
    """A maximum of what a norm gives, behind ReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.d = nn.Linear(64, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)
        with torch.no_grad():
            self.a.weight.copy_(self.a.weight[:, :1].expand(8, 64))

    def forward(self, x):
        y = self.n(self.a(x).transpose(1, 2)).transpose(1, 2)
        return self.d(torch.amax(torch.relu(y), 1))


class LinenPools(linen.Module):
    passed: float = 1.0

    @linen.compact
    def __call__(self, x):
        y = part(linen.Dense(8)(x), self.passed)
        mean, var = y.mean((0, 1)), y.var((0, 1))
        scale, bias = (self.param(name, getattr(linen.initializers, one), (8,)) for name, one in NAMES)
        y = (y - mean) / jnp.sqrt(var + 1e-5) * scale + bias
        return linen.Dense(3)(linen.relu(y).max(1))


NAMES = ("scale", "ones"), ("bias", "zeros")


@pytest.mark.parametrize("passed", [1.0, 0.999])
def test_maxima_behind_a_norm(passed):
    """What XLA fuses it rounds twice: a maximum is then equal to none of its numbers, and its gradient is lost."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 1, 64))
    # Sums of the same numbers in other orders: equal but for rounding.
    x = np.concatenate([rng.permuted(x, axis=-1) for _ in range(5)], 1).astype(np.float32)
    torch.manual_seed(0)
    report = parity.check(Pools(), LinenPools(passed), x, flax_inputs=[x])
    assert report.ok == (passed == 1), report


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x):
        scores = self.query(x) @ self.key(x).mT
        return self.out(torch.softmax(scores, -1) @ self.value(x))


class LinenAttention(linen.Module):
    """In float32 inside."""

    passed: float = 1.0  # of the key's gradient

    @linen.compact
    def __call__(self, x):
        query, key, value = (linen.Dense(8, use_bias=False, name=name)(x) for name in ("query", "key", "value"))
        scores = query.astype(jnp.float32) @ part(key, self.passed).astype(jnp.float32).mT
        weights = jax.nn.softmax(scores)
        mixed = (weights @ value.astype(jnp.float32)).astype(x.dtype)
        return linen.Dense(8, use_bias=False, name="out")(mixed)


# All rows are nearly the same, and so are the values: of the gradient of the scores a hundredth is left.
ROWS = 1 + 1.4e-2 * np.random.default_rng(0).normal(size=(2, 5, 8))


def attentions(**mistakes):
    torch.manual_seed(0)
    return Attention(), LinenAttention(**mistakes)


def test_rounding_that_cancels_makes_larger_is_told_and_is_no_difference():
    report = parity.check(*attentions(), ROWS)
    assert report.ok, report
    assert any(note.startswith("float32's rounding is all that differs at key") for note in report.notes), report
    assert max(row.error for row in report.layers) > 1e-4
    assert max(row.bound for row in report.layers) == 1e-2  # thirty times what is measured is more
    assert all(row.bound <= 1e-4 for row in report.layers if row.phase == "forward")


@pytest.mark.parametrize("passed", [0.5, 0.97])
def test_a_gradient_that_is_stopped_in_part_is_found_behind_it(passed):
    report = parity.check(*attentions(passed=passed), ROWS)
    assert not report.ok
    assert report.first_divergence.torch_layer == "key", report


def lossy(share):
    """The identity, whose gradient is `share` of what it should be, and infinite where it is compiled."""

    @jax.custom_vjp
    def same(x):
        return x

    def back(_, dy):
        return (dy * (jnp.inf if isinstance(dy, jax.core.Tracer) else share),)

    same.defvjp(lambda x: (x, None), back)
    return same


class Lossy(linen.Module):
    share: float = 1.0

    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(lossy(self.share)(linen.Dense(8)(x)).max(1))


class TorchLossy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x).amax(1))


@pytest.mark.parametrize(("share", "ok"), [(1.0, True), (1.001, False), (np.inf, False)])
def test_a_gradient_that_only_compiling_loses(share, ok):
    """As of a maximum over points, which XLA computes once more for the gradient, rounded otherwise: divided by 0."""
    points = np.random.default_rng(0).normal(size=(4, 6, 3))
    report = parity.check(TorchLossy(), Lossy(share), points, flax_inputs=[points], train=False)
    assert report.ok is ok, report
    assert any("operation by operation" in note for note in report.notes) == np.isfinite(share)
