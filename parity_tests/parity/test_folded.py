"""A batch norm that one side has folded into the layer before it: the same in prediction, and no way back."""

import copy

import flax.linen as linen
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity

X = np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype(np.float32)
LAST = np.moveaxis(X, 1, -1)
EPS = 1e-5, 1e-2


def randomised(module):
    """With statistics and scales, of either sign, that no default is near."""
    torch.manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (child.weight, child.bias, child.running_mean):
                tensor.data.normal_()
            child.running_var.uniform_(0.3, 2)
    return module.eval()


def torch_net(*, norms, bias=True):
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, eps=EPS[0]), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(64, 5, bias=bias), nn.BatchNorm1d(5, eps=EPS[1]), nn.Tanh(), nn.Linear(5, 2)]
    kept = [x for x in layers if norms or not isinstance(x, nn.BatchNorm1d | nn.BatchNorm2d)]
    return randomised(nn.Sequential(*kept))


class LinenNet(linen.Module):
    norms: bool
    bias: bool = True

    @linen.compact
    def __call__(self, x, train):
        def normed(y, epsilon):
            return linen.BatchNorm(use_running_average=not train, epsilon=epsilon)(y) if self.norms else y

        x = normed(linen.Conv(4, (3, 3), padding="VALID", use_bias=self.bias)(x), EPS[0])
        x = linen.relu(x).reshape(len(x), -1)
        return linen.Dense(2)(linen.tanh(normed(linen.Dense(5, use_bias=self.bias, name="hidden")(x), EPS[1])))


class NnxNet(nnx.Module):
    def __init__(self, norms):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs)
        self.hidden, self.last = nnx.Linear(64, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(n, epsilon=e, rngs=rngs) for n, e in zip((4, 5), EPS, strict=True)])
        if not norms:
            self.norms = None

    def __call__(self, x):
        first, second = self.norms if self.norms is not None else (lambda y: y,) * 2
        x = linen.relu(first(self.conv(x))).reshape(len(x), -1)
        return self.last(linen.tanh(second(self.hidden(x))))


def exactly_folded(module):
    """By the formula, in float64, rounded once."""
    found = []
    for layer, norm in ((module[0], module[1]), (module[4], module[5])):
        w, gamma, beta, mean, var = (
            t.detach().double() for t in (layer.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        b = 0.0 if layer.bias is None else layer.bias.detach().double()
        scale = gamma / (var + norm.eps).sqrt()
        found.append(
            ((w * scale.reshape(-1, *[1] * (w.ndim - 1))).float().numpy(), ((b - mean) * scale + beta).float())
        )
    return found


TOLD = "folded into the layer before on the other side, which is the same in prediction only"
NORMS = {
    LinenNet: ("BatchNorm_0 into Conv_0", "BatchNorm_1 into hidden"),
    NnxNet: ("norms/0 into conv", "norms/1 into hidden"),
}


@pytest.mark.parametrize("flax_net", [LinenNet, NnxNet])
@pytest.mark.parametrize("norms", ["torch", "flax"])
def test_in_prediction_the_pair_is_the_same(flax_net, norms):
    report = parity.check(torch_net(norms=norms == "torch"), flax_net(norms == "flax"), X, train=False)
    assert report.ok, report
    first, second = ("1 into 0", "5 into 4") if norms == "torch" else NORMS[flax_net]
    assert report.notes == [f"{TOLD}: {first}, {second}"]
    compared = {row.torch_layer for row in report.layers if row.quantity == "output"}
    assert compared >= ({"0 with 1", "4 with 5"} if norms == "torch" else {"0", "3"})


def check_same_but_for_weights_rounded_once(module, flax_module, variables):
    """Both computed in float64: folded weights are rounded by 2^-24 of themselves, in two layers of three."""
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
        y = np.asarray(flax_module.apply(variables, LAST.astype(np.float64), train=False))
    there = copy.deepcopy(module).double()(torch.tensor(X).double()).detach().numpy()
    # Terms of both signs, which may be some times larger than their sum.
    assert np.abs(y - there).max() <= 10 * 2 * 2**-24 * np.abs(y).max()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_weights_are_folded_in_float64_and_rounded_once(bias):
    module = torch_net(norms=True, bias=bias)
    with pytest.warns(parity.weights.ParityWarning, match=f"{TOLD}: 1 into 0, 5 into 4"):
        params = parity.to_flax(module, LinenNet(norms=False), inputs=[X])["params"]
    (conv, conv_bias), (_, hidden_bias) = exactly_folded(module)
    np.testing.assert_array_equal(params["Conv_0"]["kernel"].transpose(3, 2, 0, 1), conv)
    np.testing.assert_array_equal(params["Conv_0"]["bias"], conv_bias)
    np.testing.assert_array_equal(params["hidden"]["bias"], hidden_bias)
    check_same_but_for_weights_rounded_once(module, LinenNet(norms=False), {"params": params})


@pytest.mark.filterwarnings("ignore::parity.weights.ParityWarning")
def test_back_to_pytorch_folded():
    """Of Flax's unfolded variables; and of the user's own folding, which is examined."""
    keys = iter(jax.random.split(jax.random.key(0), 99))
    made = LinenNet(norms=True).init(next(keys), LAST, train=False)
    variables = jax.tree.map(lambda a: 0.2 + jax.numpy.abs(jax.random.normal(next(keys), a.shape)), made)
    module = torch_net(norms=False)
    module.load_state_dict(parity.to_torch(variables, module, flax_module=LinenNet(norms=True), inputs=[X]))
    check_same_but_for_weights_rounded_once(module, LinenNet(norms=True), variables)


@pytest.mark.filterwarnings("ignore::parity.weights.ParityWarning")
def test_a_folding_of_ones_own_is_examined():
    module = torch_net(norms=True)
    mine = parity.to_flax(module, LinenNet(norms=False), inputs=[X])
    assert parity.check(module, LinenNet(norms=False), X, train=False, variables=mine).ok
    module[1].eps = 1e-3
    report = parity.check(module, LinenNet(norms=False), X, train=False, variables=mine)
    assert not report.ok
    assert report.first_divergence.torch_layer == "0 with 1"


def test_the_way_back_is_refused_by_name():
    said = (
        "batch norms are folded into the layer before for prediction, which cannot be undone, and the target has them: "
    )
    with pytest.raises(ValueError, match=f"{said}{', '.join(NORMS[LinenNet])}; allowed: "):
        parity.to_flax(torch_net(norms=False), LinenNet(norms=True), inputs=[X])
    variables = LinenNet(norms=False).init(jax.random.key(0), LAST, train=False)
    with pytest.raises(ValueError, match=f"{said}1 into 0, 5 into 4; allowed: "):
        parity.to_torch(variables, torch_net(norms=True), flax_module=LinenNet(norms=False), inputs=[X])


@pytest.mark.parametrize("norms", ["torch", "flax"])
def test_in_training_it_is_refused_by_name(norms):
    report = parity.check(torch_net(norms=norms == "torch"), LinenNet(norms == "flax"), X)
    assert not report.ok
    assert report.diagnoses[0].code == "no-partner"
    names = ("1 into 0", "5 into 4") if norms == "torch" else NORMS[LinenNet]
    assert f"it may be {TOLD}: {', '.join(names)}" in report.notes


def test_where_the_other_layer_has_no_bias_nothing_is_folded():
    report = parity.check(torch_net(norms=True), LinenNet(norms=False, bias=False), X, train=False)
    assert not report.ok
    assert "no-partner" in [d.code for d in report.diagnoses]


def test_two_dumps(tmp_path):
    module = torch_net(norms=True)
    parity.dump(module, [X], tmp_path / "torch", train=False)
    parity.dump(LinenNet(norms=False), [X], tmp_path / "flax", train=False, weights=tmp_path / "torch")
    report = parity.compare(tmp_path / "torch", tmp_path / "flax")
    assert report.ok, report
