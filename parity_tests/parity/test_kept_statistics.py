"""Steps of training compare the statistics that norms keep, not only those of the first step."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import parity
from parity.comparison.kept import kept_difference

X = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32) * 3 + 1


class TorchNorm(nn.Module):
    """Keeps its statistics with a rate of its own at each step."""

    def __init__(self, size, rates):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))
        self.rates, self.count = rates, 0

    def forward(self, x):
        mean, var = x.mean(0), x.var(0, unbiased=False)
        rate = self.rates[min(self.count, len(self.rates) - 1)]
        with torch.no_grad():
            self.running_mean += rate * (mean - self.running_mean)
            self.running_var += rate * (var - self.running_var)
        self.count += 1
        return (x - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias


def torch_net(*rates):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), TorchNorm(8, rates), nn.Tanh(), nn.Linear(8, 3))


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(8)(x)
        return linen.Dense(3)(jnp.tanh(linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)))


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, 0.05), optax.sgd(0.05)),
    # With an epsilon below it, it makes whole steps of the noise in the gradient of the bias before the norm.
    "adam": (lambda p: torch.optim.Adam(p, 0.01, eps=1e-30), optax.adam(0.01, eps=1e-30)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", ["check", "dumps"])
def test_kept_statistics_are_compared_after_each_step(name, way, tmp_path):
    def compared(*rates):
        if way == "check":
            return parity.check(torch_net(*rates), Net(), X, steps=3, optimizers=OPTIMIZERS[name])
        torch_optimizer, transform = OPTIMIZERS[name]
        parity.dump(torch_net(*rates), [X], tmp_path / "t", optimizer=torch_optimizer, steps=3)
        parity.dump(Net(), [X], tmp_path / "f", weights=tmp_path / "t", optimizer=transform, steps=3)
        return parity.compare(tmp_path / "t", tmp_path / "f")

    report = compared(0.1)
    assert report.ok, report
    kept = {row.quantity for row in report.layers if row.phase == "optimizer" and "running" in row.quantity}
    assert kept == {f"running_{what} after step {n}" for what in ("mean", "var") for n in (1, 2, 3)}
    # Another rate from the second step on.
    report = compared(0.1, 0.2)
    first = report.first_divergence
    assert (first.phase, first.torch_layer) == ("optimizer", "1")
    assert first.quantity in ("running_mean after step 2", "running_var after step 2")


def test_a_small_difference_of_the_mean_alone_is_seen_beside_the_noise_of_the_bias():
    class Other(TorchNorm):
        def forward(self, x):
            y = super().forward(x)
            with torch.no_grad():
                self.running_mean += 1e-6 * (self.count > 1) * torch.arange(8)
            return y

    module = torch_net(0.1)
    module[1] = Other(8, (0.1,))
    report = parity.check(module, Net(), X, steps=2, optimizers=OPTIMIZERS["adam"])
    assert report.first_divergence is not None
    assert report.first_divergence.quantity == "running_mean after step 2"


def test_prediction_keeps_nothing():
    optimizers = OPTIMIZERS["sgd"]
    native = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    report = parity.check(native, Net(), X, train=False, steps=2, optimizers=optimizers)
    assert report.ok, report
    assert not any("running" in row.quantity for row in report.layers)


def test_what_follows_a_bias_is_taken_off_and_nothing_else():
    rng = np.random.default_rng(0)
    mu = rng.normal(size=(5, 4))
    biases = [np.cumsum(rng.choice([-0.01, 0.01], size=(6, 4)), 0) for _ in range(2)]
    means = []
    for bias in biases:
        mean = [np.zeros(4)]
        for n in range(5):
            mean.append(0.7 * mean[-1] + 0.3 * (mu[n] + bias[n]))
        means.append(mean)
    left = kept_difference(means[0], means[1], [([*biases[0]], [*biases[1]])])
    assert np.abs(left).max() < 1e-14
    assert np.abs(kept_difference(means[0], means[1], [])).max() > 1e-3
    means[1][3] = means[1][3] + 1e-4
    assert np.abs(kept_difference(means[0][:4], means[1][:4], [([*biases[0]], [*biases[1]])])).max() > 1e-5
