"""Layer, RMS and group norm explained from their numbers."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity
from parity.diagnosis.norm.family import group_norm_findings, layer_norm_findings
from parity.diagnosis.norm.sources import NormSide
from parity_tests.parity.norm_simulator import Convention, data

RIGHT = Convention()


def codes(torch_side, flax_side, findings):
    return [finding.code for finding in findings(torch_side, flax_side)]


def some(shape, **options):
    return data(np.random.default_rng(0), shape, **options)


def other_norm(given, axes=(-1,), groups=None, convention=RIGHT, centred=True):
    """Layer, RMS and group norm in PyTorch, over the axes of x, or over space and each group of channels."""
    x = torch.tensor(given.x, requires_grad=True)
    seen = x if groups is None else x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    axes = axes if groups is None else (*range(1, x.ndim - 1), x.ndim)
    mu = seen.mean(axes, keepdim=True) if centred else torch.zeros((), dtype=x.dtype)
    m = np.prod([seen.shape[axis] for axis in axes])
    var = (seen - mu).square().mean(axes, keepdim=True) * (m / (m - 1) if convention.unbiased_forward else 1)
    if convention.stopped:
        mu, var = mu.detach(), var.detach()
    s = var.sqrt() + convention.epsilon if convention.outside else (var + convention.epsilon).sqrt()
    gamma, beta = (torch.tensor(v) for v in (given.gamma, given.beta))
    if convention.affine == "swapped":
        gamma, beta = beta, gamma
    if convention.affine == "offset":
        gamma = 1 + gamma
    y = ((seen - mu) / s).reshape(x.shape) * gamma + (beta if convention.affine != "bias missing" else 0)
    (dx,) = torch.autograd.grad((y * torch.tensor(given.dy)).sum(), x)
    return NormSide(given.x, y.detach().numpy(), given.gamma, given.beta, dy=given.dy, dx=dx.numpy())


MISTAKES = [
    ("epsilon", {"epsilon": 1e-3}),
    ("epsilon-outside-sqrt", {"outside": True}),
    ("variance-ddof", {"unbiased_forward": True}),
    ("affine-swapped", {"affine": "swapped"}),
    ("bias-missing", {"affine": "bias missing"}),
    ("norm-offset", {"affine": "offset"}),
    ("stopped-statistics-gradient", {"stopped": "both"}),
]


@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 8), (3, 4, 5, 8)], ids=str)
@pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "RMS norm"])
def test_layer_norm(shape, centred):
    given = some(shape, offset=1.0)
    right = other_norm(given, centred=centred)
    assert codes(right, right, layer_norm_findings) == []
    for code, change in MISTAKES:
        wrong = other_norm(given, centred=centred, convention=RIGHT._replace(**change))
        assert codes(right, wrong, layer_norm_findings) == [code], change
        assert codes(wrong, right, layer_norm_findings) == [code], change
    handwritten = RIGHT._replace(outside=True, unbiased_forward=True, epsilon=1e-6)
    expected = ["variance-ddof", "epsilon-outside-sqrt", "epsilon"]
    assert codes(right, other_norm(given, centred=centred, convention=handwritten), layer_norm_findings) == expected
    assert codes(right, other_norm(given, centred=not centred), layer_norm_findings) == ["unexplained"]
    for axes in ((0,), tuple(range(1, len(shape))), tuple(range(len(shape)))):
        if axes != (len(shape) - 1,) and centred:
            wrong = other_norm(given, axes=axes, convention=RIGHT._replace(epsilon=1e-3))
            assert codes(wrong, right, layer_norm_findings) == ["wrong-reduction-axes", "epsilon"], axes


def test_layer_norm_over_several_axes():
    given = some((3, 4, 5, 2))
    given = given._replace(gamma=given.x[0] + 1, beta=given.x[1])
    right = other_norm(given, axes=(1, 2, 3))
    wrong = other_norm(given, axes=(1, 2, 3), convention=RIGHT._replace(epsilon=1e-6))
    assert codes(right, wrong, layer_norm_findings) == ["epsilon"]
    assert codes(right, other_norm(given), layer_norm_findings) == ["wrong-reduction-axes"]


@pytest.mark.parametrize("shape", [(4, 6, 8), (3, 4, 5, 8)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_group_norm(shape, groups):
    given = some(shape, offset=1.0)
    right = other_norm(given, groups=groups)
    assert codes(right, right, group_norm_findings) == []
    for code, change in MISTAKES:
        wrong = other_norm(given, groups=groups, convention=RIGHT._replace(**change))
        assert codes(right, wrong, group_norm_findings) == [code], change
    other = other_norm(given, groups=2 if groups != 2 else 4)
    assert codes(right, other, group_norm_findings) == ["wrong-reduction-axes"]


class Scaled(nn.Module):
    """An RMS norm whose class says nothing of it; or, with `power` 1, none."""

    def __init__(self, power=2):
        super().__init__()
        self.weight, self.power = nn.Parameter(torch.linspace(0.5, 2, 8)), power

    def forward(self, x):
        return x * (x.abs() ** self.power).mean(-1, keepdim=True).add(1e-6) ** (-1 / self.power) * self.weight


class FlaxScaled(linen.Module):
    offset: float = 0.0

    @linen.compact
    def __call__(self, x):
        scale = self.param("scale", linen.initializers.ones, (8,))
        return x * jnp.sqrt(1 / ((x * x).mean(-1, keepdims=True) + 1e-6)) * (self.offset + scale)


@pytest.mark.parametrize(
    ("power", "offset", "expected"), [(2, 0, []), (2, 1, ["norm-offset"]), (1, 0, ["unexplained"])]
)
def test_a_norm_of_no_name(power, offset, expected):
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    report = parity.check(Scaled(power), FlaxScaled(float(offset)), x)
    assert [d.code for d in report.diagnoses] == expected
    assert report.ok == (not expected)
