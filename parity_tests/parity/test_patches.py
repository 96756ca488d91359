"""A patch embedding: a convolution whose stride is its size, or a reshape and a linear layer."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity
from parity import weights

X = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.d = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 2)

    def forward(self, x):
        return self.d(torch.tanh(self.p(x).flatten(2).transpose(1, 2)))


class Linear(nn.Module):
    """The axes of x, reshaped, are b c h p w q."""

    def __init__(self, order):
        super().__init__()
        self.p, self.d, self.order = nn.Linear(48, 6), nn.Linear(6, 2), order

    def forward(self, x):
        x = x.reshape(2, 3, 2, 4, 2, 4).permute(self.order).reshape(2, 4, 48)
        return self.d(torch.tanh(self.p(x)))


class LinenConv(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(6, (4, 4), (4, 4), padding="VALID", name="p")(x)
        return linen.Dense(2, name="d")(jnp.tanh(x.reshape(2, 4, 6)))


class LinenLinear(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = x.reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 48)
        return linen.Dense(2, name="d")(jnp.tanh(linen.Dense(6, name="p")(x)))


PIXELS_FIRST, CHANNELS_FIRST = (0, 2, 4, 3, 5, 1), (0, 2, 4, 1, 3, 5)
TOLD = "taken to read a patch as height, width, channels"


@pytest.mark.parametrize(
    ("make", "theirs"), [(Conv, LinenLinear()), (lambda: Linear(PIXELS_FIRST), LinenConv())], ids=["conv", "linear"]
)
def test_a_patch_embedding_is_carried_both_ways(make, theirs):
    torch.manual_seed(0)
    mine = make()
    with pytest.warns(weights.ParityWarning, match=TOLD):
        variables = weights.to_flax(mine, theirs, inputs=[X])
    y = theirs.apply(variables, jnp.moveaxis(jnp.asarray(X), 1, -1))
    np.testing.assert_allclose(y, mine(torch.tensor(X)).detach().numpy(), rtol=0, atol=1e-5)
    with pytest.warns(weights.ParityWarning, match=TOLD):
        state = weights.to_torch(variables, make(), flax_module=theirs, inputs=[X])
    assert all(torch.equal(state[name], v) for name, v in mine.state_dict().items())
    report = parity.check(mine, theirs, X)
    assert report.ok, report


def test_another_order_within_a_patch_is_told():
    """No shape shows it."""
    torch.manual_seed(0)
    mine = Linear(CHANNELS_FIRST)
    with pytest.warns(weights.ParityWarning, match=TOLD):
        weights.to_flax(mine, LinenConv(), inputs=[X])
    report = parity.check(mine, LinenConv(), X)
    assert not report.ok
    assert any(TOLD in note for note in report.notes)
