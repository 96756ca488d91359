"""Layers of equal shapes that no name tells apart: what they compute says which is which, and it is told."""

import warnings

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity
from parity.evidence.jax import FlaxRuns
from parity.weights import ParityWarning

X = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
IMAGES = np.random.default_rng(0).normal(size=(3, 4, 6, 5)).astype(np.float32)
TOKENS = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)


def seeded(make, *args):
    torch.manual_seed(0)
    module = make(*args)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return module.eval()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.left(x).sigmoid() * self.right(x))


class LinenBranches(linen.Module):
    slope: float = 0.0

    @linen.compact
    def __call__(self, x):
        def branch(x):
            return linen.Dense(8)(linen.leaky_relu(linen.Dense(8)(x), self.slope))

        right = branch(x)
        return linen.Dense(4)(linen.sigmoid(branch(x)) * right)


class NnxBranches(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a, self.b, self.c, self.d = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        right = self.b(jax.nn.relu(self.a(x)))
        return self.head(jax.nn.sigmoid(self.d(jax.nn.relu(self.c(x)))) * right)


class Convolutions(nn.Module):
    """Norms go with their convolutions, and so do their statistics."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in range(2))
        self.head = nn.Linear(4 * 6 * 5, 3)
        with torch.no_grad():
            for norm in (self.one[1], self.two[1]):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head((self.one(x) - self.two(x).relu()).flatten(1))


class LinenConvolutions(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        def branch(x):
            return linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Conv(4, (3, 3))(x))

        two = jax.nn.relu(branch(x))
        return linen.Dense(3)((branch(x) - two).reshape(len(x), -1))


class Attention(nn.Module):
    def __init__(self, names="qkv"):
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, name, nn.Linear(8, 8))
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (getattr(self, name)(x) for name in self.names)
        return x + self.proj(torch.softmax(q @ k.transpose(1, 2), -1) @ v)


class LinenAttention(linen.Module):
    """Which of its projections is which is a matter of `order` alone."""

    order: tuple
    names: tuple = (None, None, None)

    @linen.compact
    def __call__(self, x):
        made = [linen.Dense(8, name=name)(x) for name in self.names]
        q, k, v = (made[i] for i in self.order)
        return x + linen.Dense(8)(jax.nn.softmax(q @ k.swapaxes(1, 2), -1) @ v)


class LinenAttentions(linen.Module):
    order: tuple

    @linen.compact
    def __call__(self, x):
        return LinenAttention(self.order)(LinenAttention(self.order)(x))


class Decoder(nn.Module):
    """Counts its blocks from the last one called."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x):
        for block in reversed(self.blocks):
            x = x + block(x)
        return x


class LinenDecoder(linen.Module):
    name_of: str = "blocks_{}"

    @linen.compact
    def __call__(self, x):
        for i in range(3):
            name = self.name_of.format(i)
            x = x + linen.Dense(8, name=f"{name}_b")(jnp.tanh(linen.Dense(8, name=f"{name}_a")(x)))
        return x


PAIRS = {
    "branches": (Branches, LinenBranches, X),
    "branches-nnx": (Branches, NnxBranches, X),
    "norms": (Convolutions, LinenConvolutions, IMAGES),
    "value-query-key": (lambda: nn.Sequential(Attention(), Attention()), lambda: LinenAttentions((1, 2, 0)), TOKENS),
    "backwards": (Decoder, LinenDecoder, X),
}


def outputs(flax_module, variables, x):
    x = np.moveaxis(x, 1, -1) if x.ndim == 4 else x
    if isinstance(flax_module, nnx.Module):
        nnx.update(flax_module, variables)
        return flax_module(x)
    return flax_module.apply(variables, x, **({"train": False} if variables["batch_stats"] else {}))


@pytest.mark.parametrize("name", PAIRS)
def test_what_layers_compute_says_which_is_which(name):
    make, flax, x = PAIRS[name]
    module = seeded(make)
    given = {"flax_inputs": [x]} if x is TOKENS else {}
    with pytest.warns(ParityWarning, match="paired by what they compute, and not by names and the order of calls"):
        carried = parity.to_flax(module, flax(), inputs=[x], **given)
    truth = module(torch.as_tensor(x)).detach().numpy()
    np.testing.assert_allclose(outputs(flax(), carried, x), truth, atol=2e-5 * np.abs(truth).max())
    with pytest.warns(ParityWarning, match="paired by what they compute"):
        state = parity.to_torch(carried, seeded(make), flax_module=flax(), inputs=[x], **given)
    assert all(torch.equal(state[n], v) for n, v in module.state_dict().items() if v.is_floating_point())
    for options in {}, {"variables": carried}:
        report = parity.check(module, flax(), x, train=False, **options)
        assert report.ok, report
        assert sum("paired by what they compute" in note for note in report.notes) == 1


def test_statistics_go_with_their_layers_in_training():
    """Flax keeps the variance without PyTorch's m / (m - 1), and nothing else differs."""
    report = parity.check(seeded(Convolutions), LinenConvolutions(), IMAGES)
    assert {d.code for d in report.diagnoses} == {"unbiased-variance"}


def test_weights_in_the_wrong_branch_are_told():
    """The user's own conversion has them in the order of calls."""
    module = seeded(Branches)
    names = {"left.0": "Dense_1", "left.2": "Dense_0", "right.0": "Dense_4", "right.2": "Dense_3", "head": "Dense_2"}
    layers = {f: module.get_submodule(t) for t, f in names.items()}
    params = {
        f: {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}
        for f, layer in layers.items()
    }
    report = parity.check(module, LinenBranches(), X, train=False, variables={"params": params})
    assert "weight-order" in [d.code for d in report.diagnoses]


def test_names_are_not_exchanged():
    """A port that exchanged keys and values, or the first and the second layer, by their names is told so."""
    for mine, theirs in (("query", "key", "value"), ("query", "value", "key")), (("a", "b1", "b2"), ("a", "b2", "b1")):
        module, flax = seeded(Attention, mine), LinenAttention((0, 1, 2), theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            carried = parity.to_flax(module, flax, inputs=[TOKENS], flax_inputs=[TOKENS])
        for name in mine:
            np.testing.assert_array_equal(carried["params"][name]["kernel"].T, getattr(module, name).weight.detach())
        report = parity.check(module, flax, TOKENS, train=False)
        assert not report.ok
        assert not any("paired by" in note for note in report.notes)


def test_where_nothing_agrees_the_order_of_calls_is_kept_and_told():
    module = seeded(Branches)
    told = (
        "outputs differ by .*, and only the order of calls says which is which of left.0, right.0 to Dense_1, Dense_4"
    )
    with pytest.warns(ParityWarning, match=told):
        carried = parity.to_flax(module, LinenBranches(0.2), inputs=[X])
    np.testing.assert_array_equal(carried["params"]["Dense_1"]["kernel"].T, module.left[0].weight.detach())
    report = parity.check(module, LinenBranches(0.2), X, train=False)
    assert not report.ok
    assert any("only the order of calls says" in note for note in report.notes)


def test_a_map_is_kept():
    module, names = seeded(Branches), {"left.0": "Dense_1", "left.2": "Dense_0"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParityWarning)
        carried = parity.to_flax(module, LinenBranches(), inputs=[X], layer_map=names)
    for t, f in names.items():
        np.testing.assert_array_equal(carried["params"][f]["kernel"].T, module.get_submodule(t).weight.detach())
    assert not parity.check(module, LinenBranches(), X, train=False, layer_map=names).ok


def test_what_agrees_costs_one_run_and_what_is_named_none(monkeypatch):
    runs = []
    monkeypatch.setattr(FlaxRuns, "run", lambda self, *args, run=FlaxRuns.run, **kw: runs.append(1) or run(self, **kw))
    module = seeded(Attention)
    parity.to_flax(module, LinenAttention((0, 1, 2)), inputs=[TOKENS], flax_inputs=[TOKENS])
    assert len(runs) == 1
    parity.to_flax(module, LinenAttention((0, 1, 2), ("q", "k", "v")), inputs=[TOKENS], flax_inputs=[TOKENS])
    parity.to_flax(module, LinenAttention((2, 0, 1), ("k", "v", "q")), inputs=[TOKENS], flax_inputs=[TOKENS])
    assert len(runs) == 1
