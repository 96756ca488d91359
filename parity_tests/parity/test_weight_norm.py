"""Weight norm: PyTorch's parametrisation and its older form against linen's WeightNorm, whose names hold a slash."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity
from parity import weights

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
IMAGES = np.random.default_rng(0).normal(size=(2, 3, 7, 7)).astype(np.float32)


def older(module):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(module)


WRAPPERS = {"parametrisation": nn.utils.parametrizations.weight_norm, "older": older}


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def dense(wrap, **options):
    torch.manual_seed(0)
    return randomised(nn.Sequential(wrap(nn.Linear(5, 4, **options)), nn.Tanh(), nn.Linear(4, 3)))


def conv(wrap):
    torch.manual_seed(0)
    return randomised(nn.Sequential(wrap(nn.Conv2d(3, 4, 3, padding=1)), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1)))


class Dense(linen.Module):
    normed: bool = True
    bias: bool = True

    @linen.compact
    def __call__(self, x):
        first = linen.Dense(4, use_bias=self.bias)
        return linen.Dense(3)(jnp.tanh(linen.WeightNorm(first)(x) if self.normed else first(x)))


class Conv(linen.Module):
    padding: str = "SAME"

    @linen.compact
    def __call__(self, x):
        first = linen.WeightNorm(linen.Conv(4, (3, 3), padding=self.padding))
        return linen.Conv(2, (3, 3))(jnp.tanh(first(x)))


@pytest.mark.parametrize("form", WRAPPERS)
@pytest.mark.parametrize(("make", "theirs", "x"), [(dense, Dense(), X), (conv, Conv(), IMAGES)], ids=["dense", "conv"])
def test_a_weight_norm_is_carried_both_ways(form, make, theirs, x):
    mine = make(WRAPPERS[form])
    variables = weights.to_flax(mine, theirs, inputs=[x])
    truth = mine(torch.tensor(x)).detach().numpy()
    there = jnp.asarray(np.moveaxis(x, 1, -1) if x.ndim > 2 else x)
    y = np.asarray(theirs.apply(variables, there))
    np.testing.assert_allclose(np.moveaxis(y, -1, 1) if x.ndim > 2 else y, truth, rtol=0, atol=1e-5)
    assert list(variables["params"]["WeightNorm_0"]) == [f"{'Conv' if x.ndim > 2 else 'Dense'}_0/kernel/scale"]
    state = weights.to_torch(variables, make(WRAPPERS[form]), flax_module=theirs, inputs=[x])
    for name, v in mine.state_dict().items():
        assert torch.equal(state[name], v), name
    assert parity.check(mine, theirs, x).ok
    alone = weights.to_flax(mine.state_dict(), theirs, inputs=[x])
    assert all(np.array_equal(weights.named(alone)[n], v) for n, v in weights.named(variables).items())


def test_a_weight_norm_on_one_side_alone_is_no_plain_layer():
    mine = dense(nn.utils.parametrizations.weight_norm)
    with pytest.raises(ValueError, match=r"0.parametrizations.weight.original0 is left over"):
        weights.to_flax(mine, Dense(normed=False), inputs=[X])
    assert not parity.check(mine, Dense(normed=False), X).ok
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"missing \(for params/WeightNorm_0"):
        weights.to_flax(plain, Dense(), inputs=[X])
    assert not parity.check(plain, Dense(), X).ok


def test_lengths_of_the_inputs_are_not_those_of_the_outputs():
    """As many of them: no shape tells them apart."""
    torch.manual_seed(0)
    mine = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5), dim=1), nn.Tanh(), nn.Linear(5, 3))

    class Square(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(jnp.tanh(linen.WeightNorm(linen.Dense(5))(x)))

    with pytest.raises(ValueError, match="original0"):
        weights.to_flax(mine, Square(), inputs=[X])
    assert not parity.check(mine, Square(), X).ok


def test_mistakes_beside_a_weight_norm_are_named():
    mine = dense(nn.utils.parametrizations.weight_norm)
    report = parity.check(mine, Dense(bias=False), X)
    assert [d.code for d in report.diagnoses] == ["bias-missing"], str(report)
    variables = weights.to_flax(mine, Dense(), inputs=[X])
    variables["params"]["WeightNorm_0"]["Dense_0/kernel/scale"] *= 2
    report = parity.check(mine, Dense(), X, variables=variables)
    assert [d.layer for d in report.diagnoses] == ["0"], str(report)
    assert not parity.check(conv(nn.utils.parametrizations.weight_norm), Conv("VALID"), IMAGES).ok


@pytest.mark.parametrize("name", ["spectral_norm", "orthogonal"])
def test_what_another_parametrisation_makes_its_weight_of_is_no_weight(name):
    torch.manual_seed(0)
    wrap = getattr(nn.utils.parametrizations, name)
    mine = nn.Sequential(wrap(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)).eval()
    for source in mine, mine.state_dict():
        with pytest.raises(ValueError, match=r"0.parametrizations.weight.original is left over"):
            weights.to_flax(source, Dense(normed=False), inputs=[X])
    assert not parity.check(mine, Dense(normed=False), X, train=False).ok


class WithoutScale(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.WeightNorm(linen.Dense(4), use_scale=False)(x)


def test_a_weight_norm_without_scales_is_told():
    """It has the tensors of a plain layer, and makes something else of them: never filled without a word."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4))
    with pytest.warns(parity.weights.ParityWarning, match="use_scale=False"):
        carried = parity.to_flax(module, WithoutScale())
    with pytest.warns(parity.weights.ParityWarning, match="use_scale=False"):
        parity.to_torch(carried, module, flax_module=WithoutScale())
    assert not parity.check(module, WithoutScale(), np.ones((2, 3), np.float32), train=False).ok
