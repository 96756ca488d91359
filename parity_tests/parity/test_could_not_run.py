"""A module that raises at every call is told in the report, with the layer, and what was compared up to there."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity
from parity.pairing.layers import pair_begun
from parity.records.recording import Layer
from parity.records.structure import Structure

X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
WIDTHS = [6, 6, 6, 6]
SAID = "RuntimeError: not here"
SIDES = "PyTorch", "Flax"


def stops(at, place):
    if at == place:
        raise RuntimeError("not here\nand more lines")


class TorchStops(nn.Module):
    """Three layers of one shape. It raises in the layer of this number, before the first ("own") or nowhere."""

    def __init__(self, at=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(TorchLinear(i, at) for i in range(3))
        self.at = at

    def forward(self, x):
        stops(self.at, "own")
        for layer in self.layers:
            x = torch.tanh(layer(x))
        stops(self.at, "end")
        return x


class TorchLinear(nn.Linear):
    def __init__(self, number, at):
        super().__init__(6, 6)
        self.number, self.at = number, at

    def forward(self, x):
        stops(self.at, self.number)
        return super().forward(x)


class LinenStops(linen.Module):
    """The same, also while it is initialised; with `late`, behind the layer's own parameters."""

    at: int | str | None = None
    late: bool = False

    @linen.compact
    def __call__(self, x):
        stops(self.at, "own")
        for i in range(3):
            x = jnp.tanh(LinenLinear(i, self.at, self.late, name=f"layers_{i}")(x))
        stops(self.at, "end")
        return x


class LinenLinear(linen.Module):
    number: int
    at: int | str | None
    late: bool

    @linen.compact
    def __call__(self, x):
        if not self.late:
            stops(self.at, self.number)
        kernel = self.param("kernel", linen.initializers.lecun_normal(), (6, 6))
        bias = self.param("bias", linen.initializers.zeros, 6)
        stops(self.at, self.number)
        return x @ kernel + bias


class NnxStops(nnx.Module):
    def __init__(self, at=None):
        self.layers = nnx.List([NnxLinear(i, at) for i in range(3)])
        self.at = at

    def __call__(self, x):
        stops(self.at, "own")
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        stops(self.at, "end")
        return x


class NnxLinear(nnx.Linear):
    def __init__(self, number, at):
        super().__init__(6, 6, rngs=nnx.Rngs(0))
        self.number, self.at = number, at

    def __call__(self, x):
        stops(self.at, self.number)
        return super().__call__(x)


def compared(report):
    return [row.torch_layer for row in report.layers if row.quantity == "output" and row.torch_layer]


def told(report):
    """The one code of all that is told, and where; what was compared agrees."""
    assert not report.ok
    assert all(row.ok for row in report.layers)
    assert {d.code for d in report.diagnoses} == {"could-not-run"}
    assert np.isnan(report.first_divergence.error)
    assert all(SAID in d.evidence and "more lines" not in d.evidence for d in report.diagnoses)
    return [(d.layer, d.flax_layer) for d in report.diagnoses]


@pytest.mark.parametrize("at", ["own", 0, 2, "end"])
@pytest.mark.parametrize("flax_net", [LinenStops, NnxStops])
def test_pytorchs_module_that_raises_at_every_call(at, flax_net):
    report = parity.check(TorchStops(at), flax_net(), X, train=False)
    path = f"layers.{at}" if at in (0, 2) else ""
    ((layer, _),) = told(report)
    assert layer == path
    assert compared(report) == [f"layers.{i}" for i in range({"own": 0, 0: 0, 2: 2, "end": 3}[at])]


@pytest.mark.parametrize("at", ["own", 0, 2, "end"])
@pytest.mark.parametrize(
    "flax_net",
    [LinenStops, lambda at: LinenStops(at, late=True), NnxStops],
    ids=["linen", "linen, initialised late", "nnx"],
)
def test_flax_module_that_raises_at_every_call(at, flax_net):
    """Also while it is initialised, before it is known which layers it has: the first ones are compared with ours."""
    report = parity.check(TorchStops(), flax_net(at), X, train=False)
    ((_, layer),) = told(report)
    assert layer.replace("/", "_") == (f"layers_{at}" if at in (0, 2) else "")
    assert compared(report) == [f"layers.{i}" for i in range({"own": 0, 0: 0, 2: 2, "end": 3}[at])]


@pytest.mark.parametrize("flax_net", [LinenStops, NnxStops])
def test_both_raise(flax_net):
    """Each is told, in training with steps, too."""
    report = parity.trace(TorchStops("own"), flax_net("own"), X)
    assert told(report) == [("", "")] * 2
    assert [d.evidence for d in report.diagnoses] == [f"{side}, on its own, could not run: {SAID}" for side in SIDES]


def test_what_comes_before_the_stop_is_still_named():
    """A mistake in front of it is the first that is told."""
    module = TorchStops()
    module.layers[1].bias = None
    report = parity.check(module, LinenStops(2), X, train=False)
    assert report.diagnoses[0].code == "bias-missing"
    assert f"could not run: {SAID}" in str(report)


def test_an_input_whose_layout_no_layer_has_shown():
    """Where PyTorch stops before any layer reads it, Flax is not accused of what a guess of its layout makes."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            raise RuntimeError("not here")

    class FlaxTokens(linen.Module):
        @linen.compact
        def __call__(self, x):
            if x.shape[-1] != 6:
                raise ValueError("of another shape")
            return linen.Dense(3)(x)

    tokens = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    report = parity.check(Tokens(), FlaxTokens(), tokens, train=False)
    assert told(report) == [("", "")]


@pytest.mark.parametrize("flax_net", [lambda: linen.Sequential([linen.Dense(6), linen.Dense(3)]), NnxStops])
def test_inputs_that_do_not_fit(flax_net):
    """Flax makes its layers of them: shapes that differ for that are no mistake."""
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)) if flax_net is not NnxStops else TorchStops()
    report = parity.check(module, flax_net(), X[:, :5], train=False)
    assert {d.code for d in report.diagnoses} == {"could-not-run"}
    assert all(row.ok for row in report.layers)
    assert "mat1 and mat2 shapes" in report.diagnoses[0].evidence
    assert report.diagnoses[0].layer in ("0", "layers.0")


class LooksAtNumbers(linen.Module):
    """Asks for a number in its forward, which no shape has."""

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(6)(x)
        return linen.Dense(6)(x if bool(x.shape[0] > 0) and float(x.sum()) < 1e9 else -x)


def test_a_module_that_looks_at_its_numbers_runs_forward():
    """On shapes alone it would not; JAX takes no derivative of it."""
    torch.manual_seed(0)
    report = parity.check(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), LooksAtNumbers(), X, train=False)
    assert {d.code for d in report.diagnoses} == {"could-not-run"}
    assert report.first_divergence.phase == "backward"
    assert compared(report)[:2] == ["0", "1"]


def test_the_first_layers_are_paired_with_the_first():
    """All of one look: which of PyTorch's five Flax's two are, only their place says."""

    def structure(paths, joint, names):
        shapes = {f"{path}{joint}{name}": (6, 6) for path in paths for name in names}
        layers = [Layer(path, "linear", "", {name: f"{path}{joint}{name}" for name in names}) for path in paths]
        return Structure(layers, shapes)

    torch_ = structure(["a", "b", "c", "d", "e"], ".", ["weight"])
    flax = structure(["Dense_0", "Dense_1"], "/", ["kernel"])
    found = pair_begun(torch_, flax)
    assert [(p.torch.path, p.flax.path) for p in found.layers] == [("a", "Dense_0"), ("b", "Dense_1")]
    assert not found.torch_alone
