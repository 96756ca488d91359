"""Parameters and statistics that one side only has, where the numbers that stand in for them would hide them."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


class Mine(nn.Module):
    def __init__(self, **own):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        for name in own:
            self.register_parameter(name, nn.Parameter(own[name]))

    def forward(self, x):
        y = torch.tanh(self.first(x))
        y = y * self.scale if hasattr(self, "scale") else y
        return self.last(y + self.offset if hasattr(self, "offset") else y)


class Theirs(linen.Module):
    scale: bool = False
    product: bool = False
    offset: bool = False
    spectral: bool = False

    @linen.compact
    def __call__(self, x):
        first, normal = linen.Dense(4), linen.initializers.normal(1.0)
        y = jnp.tanh(linen.SpectralNorm(first)(x, update_stats=False) if self.spectral else first(x))
        y = y * self.param("scale", linen.initializers.ones, (4,)) if self.scale else y
        y = y + (y @ self.param("down", normal, (4, 2))) @ self.param("up", normal, (2, 4)) if self.product else y
        return linen.Dense(3)(y + self.param("offset", normal, (4,)) if self.offset else y)


SCALE = torch.tensor([0.5, 1.5, 2.0, 0.7])


@pytest.mark.parametrize("scale", [False, True], ids=["alone", "beside a partner"])
@pytest.mark.parametrize("name", ["product", "offset"])
def test_parameters_of_flaxs_code_alone_are_told(scale, name):
    """With zeros in their places the outputs agree; of a product each has no gradient then."""
    mine = Mine(**({"scale": SCALE} if scale else {}))
    report = parity.check(mine, Theirs(scale=scale, **{name: True}), X)
    assert not report.ok
    assert [d.code for d in report.diagnoses] == ["no-partner"], str(report)


def test_a_parameter_of_pytorchs_code_alone_that_is_0_is_told():
    report = parity.check(Mine(scale=SCALE, offset=torch.zeros(4)), Theirs(scale=True), X)
    assert [d.code for d in report.diagnoses] == ["no-partner"], str(report)
    assert "offset" in report.diagnoses[0].evidence


@pytest.mark.parametrize("options", [{}, {"scale": True}, {"scale": True, "offset": True}])
def test_the_same_parameters_on_both_sides_are_silent(options):
    own = {"scale": SCALE, "offset": SCALE + 1}
    assert parity.check(Mine(**{name: own[name] for name in options}), Theirs(**options), X).ok


def test_a_plain_layer_is_no_spectral_norm():
    """Its vector u, of which PyTorch has none, as 0 made the norm the identity."""
    assert not parity.check(Mine(), Theirs(spectral=True), X, train=False).ok
