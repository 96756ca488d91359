"""PyTorch's buffers that are a parameter in Flax, by one name: the bias of the last logits in BART, Marian, Pegasus."""

import flax.linen as linen
import numpy as np
import pytest
import torch
from torch import nn

import parity

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


class Translator(nn.Module):
    def __init__(self, trained=False):
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 6, bias=False)
        bias = torch.arange(6.0)[None]
        if trained:
            self.final_logits_bias = nn.Parameter(bias)
        else:
            self.register_buffer("final_logits_bias", bias)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(x))) + self.final_logits_bias


class FlaxTranslator(linen.Module):
    factor: float = 1.0
    name_of_bias: str = "final_logits_bias"

    @linen.compact
    def __call__(self, x):
        bias = self.param(self.name_of_bias, linen.initializers.zeros, (1, 6))
        y = linen.Dense(5, name="hidden")(x)
        return linen.Dense(6, use_bias=False, name="head")(linen.relu(self.factor * y)) + bias


def translator(trained=False):
    torch.manual_seed(0)
    return Translator(trained)


def test_it_is_carried_both_ways():
    module = translator()
    variables = parity.to_flax(module, FlaxTranslator())
    assert np.array_equal(variables["params"]["final_logits_bias"], module.final_logits_bias.numpy())
    state = parity.to_torch(variables, Translator(), flax_module=FlaxTranslator())
    assert all(torch.equal(state[name], v) for name, v in module.state_dict().items())


def test_another_name_is_another_tensor():
    with pytest.raises(ValueError, match="another_bias"):
        parity.to_flax(translator(), FlaxTranslator(name_of_bias="another_bias"))


def test_it_is_checked_and_told():
    note = "a buffer in PyTorch, a parameter in Flax, which trains it: final_logits_bias"
    report = parity.check(translator(), FlaxTranslator(), X)
    assert report.ok, report
    assert note in report.notes
    report = parity.check(translator(trained=True), FlaxTranslator(), X)
    assert report.ok, report
    assert note not in report.notes
    assert not parity.check(translator(), FlaxTranslator(factor=0.9), X).ok


def test_the_users_own_are_compared():
    variables = parity.to_flax(translator(), FlaxTranslator())
    variables["params"]["final_logits_bias"] = variables["params"]["final_logits_bias"][:, ::-1]
    report = parity.check(translator(), FlaxTranslator(), X, variables=variables)
    assert not report.ok
    assert "final_logits_bias" in str(report)
