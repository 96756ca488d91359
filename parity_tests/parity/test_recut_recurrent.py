"""LSTM, GRU and plain recurrent networks: PyTorch's gates in one matrix and two biases against Flax's cells."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity
from parity import weights

I, H = 5, 4  # noqa: E741  # as in PyTorch's documentation
X = np.random.default_rng(0).normal(size=(2, 7, I)).astype(np.float32)


class Net(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(I, H, batch_first=True, **options)
        self.head = nn.Linear(2 * H if options.get("bidirectional") else H, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class LinenNet(linen.Module):
    cell: type
    layers: int = 1
    both: bool = False

    @linen.compact
    def __call__(self, x):
        for _ in range(self.layers):
            one = linen.RNN(self.cell(H))
            x = linen.Bidirectional(one, linen.RNN(self.cell(H)))(x) if self.both else one(x)
        return linen.Dense(3)(x)


class NnxNet(nnx.Module):
    def __init__(self, cell, rngs):
        self.rnn, self.head = nnx.RNN(cell(I, H, rngs=rngs)), nnx.Linear(H, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


PAIRS = {
    "LSTM": (lambda: Net(nn.LSTM), lambda: LinenNet(linen.OptimizedLSTMCell)),
    "LSTM, a layer for each gate": (lambda: Net(nn.LSTM), lambda: LinenNet(linen.LSTMCell)),
    "LSTM, both ways, two layers": (
        lambda: Net(nn.LSTM, bidirectional=True, num_layers=2),
        lambda: LinenNet(linen.OptimizedLSTMCell, 2, both=True),
    ),
    "GRU, two layers": (lambda: Net(nn.GRU, num_layers=2), lambda: LinenNet(linen.GRUCell, 2)),
    "RNN": (lambda: Net(nn.RNN), lambda: LinenNet(linen.SimpleCell)),
    "NNX LSTM": (lambda: Net(nn.LSTM), lambda: NnxNet(nnx.LSTMCell, nnx.Rngs(0))),
    "NNX optimised LSTM": (lambda: Net(nn.LSTM), lambda: NnxNet(nnx.OptimizedLSTMCell, nnx.Rngs(0))),
    "NNX RNN": (lambda: Net(nn.RNN), lambda: NnxNet(nnx.SimpleCell, nnx.Rngs(0))),
}
USUAL = {"LSTM", "GRU, two layers", "NNX optimised LSTM"}
NAMES = [pytest.param(name, marks=[] if name in USUAL else pytest.mark.thorough) for name in PAIRS]


def pair(name):
    torch.manual_seed(0)
    return PAIRS[name][0](), PAIRS[name][1]()


def applied(module, variables, x):
    if isinstance(module, nnx.Module):
        nnx.update(module, variables)
        return module(x)
    return module.apply(variables, x)


def carried(mine, theirs):
    return weights.to_flax(mine, theirs, inputs=[X], flax_inputs=[X])


@pytest.mark.parametrize("name", NAMES)
def test_a_recurrent_network_is_carried_both_ways(name):
    mine, theirs = pair(name)
    variables = carried(mine, theirs)
    truth = mine(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(applied(theirs, variables, jnp.asarray(X)), truth, rtol=0, atol=1e-5)
    target = PAIRS[name][0]()
    with pytest.warns(weights.ParityWarning, match="bias_ih takes it, and bias_hh is 0"):
        state = weights.to_torch(variables, target, flax_module=theirs, inputs=[X], flax_inputs=[X])
    target.load_state_dict(state)
    np.testing.assert_allclose(target(torch.tensor(X)).detach().numpy(), truth, rtol=0, atol=1e-5)
    for key, v in mine.state_dict().items():
        assert "bias_" in key or torch.equal(state[key], v), key
    again = carried(target, theirs)
    for key, v in weights.named(variables).items():
        assert np.array_equal(weights.named(again)[key], v), key


@pytest.mark.parametrize("name", NAMES)
def test_check_of_a_recurrent_network(name):
    report = parity.check(*pair(name), X, flax_inputs=[X])
    assert report.ok, str(report)
    assert any("bias_ih + bias_hh" in note for note in report.notes)
    assert any(row.quantity == "weight_hh gradient" for row in report.layers)


def mine_by_hand(module, order="ifgo", biases=("bias_ih_l0", "bias_hh_l0")):
    """A conversion of one's own: of so many biases, the gates in this order."""
    own = {name: v.detach().numpy() for name, v in module.rnn.named_parameters()}
    bias, cell = sum(own[name] for name in biases), {}
    for i, gate in enumerate(order):
        rows = slice(i * H, (i + 1) * H)
        cell[f"i{gate}"] = {"kernel": own["weight_ih_l0"][rows].T}
        cell[f"h{gate}"] = {"kernel": own["weight_hh_l0"][rows].T, "bias": bias[rows]}
    head = {"kernel": module.head.weight.detach().numpy().T, "bias": module.head.bias.detach().numpy()}
    return {"params": {"OptimizedLSTMCell_0": cell, "Dense_0": head}}


@pytest.mark.parametrize(
    ("options", "codes", "words"),
    [
        ({}, [], ""),
        ({"biases": ("bias_hh_l0",)}, ["bias-missing"], "lacks PyTorch's bias_ih"),
        ({"order": "igfo"}, ["weight-order"], "g in the place of f, f in the place of g"),
    ],
    ids=["right", "a bias forgotten", "two gates exchanged"],
)
def test_a_conversion_of_ones_own(options, codes, words):
    mine, theirs = pair("LSTM")
    report = parity.check(mine, theirs, X, flax_inputs=[X], variables=mine_by_hand(mine, **options))
    assert [d.code for d in report.diagnoses] == codes, str(report)
    assert report.ok == (not codes)
    assert all(words in d.evidence for d in report.diagnoses)


def test_a_cell_that_lacks_a_bias_is_carried_where_that_is_zero():
    """NNX's GRU has no bias within the product with r."""
    mine, theirs = Net(nn.GRU), NnxNet(nnx.GRUCell, nnx.Rngs(0))
    with pytest.raises(ValueError, match="bias_hh_l0 is left over: the target has no place for bias_hn, which is not"):
        carried(mine, theirs)
    report = parity.check(mine, theirs, X, flax_inputs=[X])
    assert [(d.code, d.layer) for d in report.diagnoses] == [("bias-missing", "rnn[l0]")], str(report)
    with torch.no_grad():
        mine.rnn.bias_hh_l0[2 * H :] = 0
    variables = carried(mine, theirs)
    truth = mine(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(applied(theirs, variables, jnp.asarray(X)), truth, rtol=0, atol=1e-5)
    target = Net(nn.GRU)
    with pytest.warns(weights.ParityWarning, match="bias_ih takes it, and bias_hh is 0"):
        state = weights.to_torch(variables, target, flax_module=theirs, inputs=[X], flax_inputs=[X])
    target.load_state_dict(state)
    np.testing.assert_allclose(target(torch.tensor(X)).detach().numpy(), truth, rtol=0, atol=1e-5)
    assert torch.equal(state["rnn.weight_hh_l0"], mine.rnn.weight_hh_l0)
    # PyTorch trains that bias, and so the two are not the same.
    report = parity.check(mine, theirs, X, flax_inputs=[X])
    assert report.first_divergence.phase == "backward"
    assert report.first_divergence.quantity == "bias_hn gradient", str(report)
