"""`parity.check` itself: its arguments, what it leaves alone, what it says where it cannot go on."""

import contextlib
import copy
import importlib
import itertools
from collections.abc import Callable

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import parity
from parity.testing import assert_parity

X = np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype(np.float32)
check_module = importlib.import_module("parity.check")  # `parity.check` is the function
SGD = lambda parameters: torch.optim.SGD(parameters, 0.1), optax.sgd(0.1)


def torch_net(size=3, padding=1):
    torch.manual_seed(0)
    features = 4 * (6 + 2 * padding - size + 1) ** 2
    return nn.Sequential(
        nn.Conv2d(3, 4, size, padding=padding), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(features, 5)
    )


class Net(linen.Module):
    padding: str = "SAME"

    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(4, (3, 3), padding=self.padding)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return linen.Dense(5)(x.reshape(len(x), -1))


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv, self.norm = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(144, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(x.reshape(len(x), -1))


def initial(module=None, x=X):
    return (module or Net()).init(jax.random.key(0), jnp.asarray(np.moveaxis(x, 1, -1)), train=True)


def test_nothing_is_changed():
    model, flax_model, x = torch_net().train(), NnxNet(), X.copy()
    flax_model.eval()
    state, held = copy.deepcopy(model.state_dict()), jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(flax_model)))
    parity.check(model, flax_model, x, train=True)
    parity.check(model, flax_model, x, train=False)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert flax_model.norm.use_running_average
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(flax_model)), held)
    np.testing.assert_array_equal(x, X)
    assert not jax.config.jax_enable_x64


class Stages(list):
    """In place of the line of progress."""

    def stage(self, name, number, most):
        assert most == len(check_module.STAGES)
        self.append((number, name))


def stages(monkeypatch, function, *args, **options):
    """What a comparison says of how far it has come."""
    found = Stages()
    monkeypatch.setattr(check_module, "progress", lambda what: contextlib.nullcontext(found))
    function(*args, **options)
    return found


def test_it_tells_how_far_it_has_come(monkeypatch):
    """Each stage that is run, in order; a pair that agrees has fewer of them."""
    agrees = stages(monkeypatch, parity.check, torch_net(), NnxNet(), X, train=False, steps=1, optimizers=SGD)
    assert [number for number, _ in agrees] == [1, 2, 3, 4, 7, 8]
    differs = stages(monkeypatch, parity.check, torch_net(), Net("VALID"), X, train=False)
    assert [number for number, _ in differs][:3] == [1, 2, 3]
    assert (5, "Flax layer by layer") in differs
    assert differs[-1] == (8, "naming what differs")
    traced = stages(monkeypatch, parity.trace, torch_net(), NnxNet(), X, train=False)
    assert [name for _, name in traced][3:5] == ["Flax layer by layer", "how much is rounding"]


def test_flax_call():
    def with_state(module, variables, x, train):
        return module.apply(variables, x, train, mutable=["batch_stats"])

    def alone(module, variables, *inputs, train):
        return module.apply(variables, *inputs, train=False)

    assert parity.check(torch_net(), Net(), X, train=False, flax_call=with_state).ok
    assert parity.check(torch_net(), Net(), X, train=False, flax_call=alone).ok
    report = parity.check(torch_net(), Net(), X, train=True, flax_call=alone)
    assert report.diagnoses[0].code == "train-uses-moving-statistics"


def test_layer_map():
    assert parity.check(torch_net(), Net(), X, train=False, layer_map={"4": "Dense_0"}).ok
    with pytest.raises(ValueError, match=r"'9' .*allowed: '0', '1', '4' to 'Conv_0'"):
        parity.check(torch_net(), Net(), X, layer_map={"9": "Dense_0"})


@pytest.mark.parametrize("function", [parity.check, parity.trace, parity.to_flax])
def test_a_layer_map_with_one_target_twice(function):
    twice = {"0": "Conv_0", "4": "Dense_0", "1": "Conv_0"}
    given = {"inputs": [X]} if function is parity.to_flax else {}
    with pytest.raises(ValueError, match="sends '0' and '1' to 'Conv_0'; allowed: each of Flax's layers once"):
        function(torch_net(), Net(), *([] if given else [X]), layer_map=twice, **given)


def test_flax_inputs():
    moved = np.moveaxis(X, 1, -1)
    assert parity.check(torch_net(), Net(), X, train=False, flax_inputs=[moved]).ok
    report = parity.check(torch_net(), Net(), X, train=False, flax_inputs=[moved * 255])
    assert [d.code for d in report.diagnoses] == ["input-scale"]


@pytest.mark.parametrize("make", [Net, NnxNet])
def test_integers_for_the_input(make):
    """An image 0..255 in Flax as it is loaded: the same numbers are right, 0..1 in PyTorch is another scale."""
    image = np.random.default_rng(0).integers(0, 256, X.shape).astype(np.uint8)
    given = {"train": False, "flax_inputs": [np.moveaxis(image, 1, -1)]}
    assert parity.check(torch_net(), make(), image.astype(np.float32), **given).ok
    report = parity.check(torch_net(), make(), image / np.float32(255), **given)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("input-scale", "0")]
    assert "255" in report.diagnoses[0].evidence
    assert not report.notes


class Between(linen.Module):
    """`torch_between` with something more before the flatten, or (where that is an image) before the convolution."""

    more: Callable
    first: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(4, (3, 3))(self.more(x) if self.first else x))
        x = x if self.first else self.more(x)
        return linen.Dense(5)(linen.tanh(linen.Dense(7)(x.reshape(len(x), -1))))


def torch_between():
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 7), nn.Tanh(), nn.Linear(7, 5)
    return nn.Sequential(*parts)


@pytest.mark.parametrize(
    ("more", "first", "expected"),
    [
        (lambda x: 1.01 * x, False, [("unexplained", "3")]),
        (lambda x: -x, False, [("unexplained", "3")]),  # which hides the order of the flatten no more than a factor
        (lambda x: 1.5 * jnp.sin(x), False, [("unexplained", "3")]),  # whose zeros are ReLU's and not dropout's
        (lambda x: x + 0.1 * jnp.sin(7 * x), True, [("unexplained", "0")]),
        (lambda x: 2 * x, True, [("input-scale", "0")]),
        (linen.tanh, True, [("activation", "0")]),
        (linen.sigmoid, False, [("activation", "1")]),
    ],
)
def test_what_is_no_known_mistake_is_unexplained(more, first, expected):
    report = parity.check(torch_between(), Between(more, first), X)
    assert [(d.code, d.layer) for d in report.diagnoses] == expected, report.diagnoses
    assert report.first_divergence.phase == "forward"


def test_behind_the_last_layer():
    """A factor there is charged to the last layer, by both sides' names."""
    report = parity.check(
        nn.Sequential(nn.Linear(6, 5)), linen.Sequential([linen.Dense(5), lambda x: x / 1.7]), X[:, 0, 0]
    )
    assert [(d.code, d.layer, d.flax_layer) for d in report.diagnoses] == [("unexplained", "0", "layers_0")]
    assert (report.first_divergence.torch_layer, report.first_divergence.flax_layer) == ("0", "layers_0")


def test_the_users_own_variables():
    """Right ones are silent, those of another network are a divergence and no exception."""
    carried = parity.weights.to_flax(torch_net(), Net(), inputs=[X])
    assert parity.check(torch_net(), Net(), X, train=False, variables=carried).ok
    report = parity.check(torch_net(), Net(), X, train=False, variables=initial())
    assert not report.ok
    state = parity.weights.to_flax(torch_net(), NnxNet(), inputs=[X])
    assert parity.check(torch_net(), NnxNet(), X, train=False, variables=state).ok


def test_other_shapes_are_a_divergence_with_infinite_error():
    report = parity.check(torch_net(), Net(padding="VALID"), X, train=False)
    assert report.first_divergence.error == np.inf
    assert [(d.code, d.layer) for d in report.diagnoses] == [("padding", "0")]


@pytest.mark.parametrize("make", [Net, NnxNet])
def test_variables_that_the_module_has_not_are_told(make):
    carried = parity.weights.to_flax(torch_net(), make(), inputs=[X])
    report = parity.check(torch_net(), make(), X, train=False, variables=carried)
    assert not report.notes
    if make is Net:
        carried["params"]["Dense_7"] = {"kernel": np.zeros((2, 2), np.float32)}
    else:
        carried["hed"] = nnx.State({"kernel": nnx.Param(jnp.zeros((2, 2)))})
    report = parity.check(torch_net(), make(), X, train=False, variables=carried)
    name = "params/Dense_7/kernel" if make is Net else "params/hed/kernel"
    assert report.notes == [f"variables has names that Flax's module has not: {name}"]


class Wide(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(6, 7, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


class Broken(linen.Module):
    """Of another width."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(7)(x)


class OnlyForward(linen.Module):
    @linen.compact
    def __call__(self, x):
        start = jnp.int32(0), linen.Dense(5)(x)
        return jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, c[1] * 1.0), start)[1]


@pytest.mark.parametrize("flax_module", [Wide, Broken], ids=["nnx", "linen"])
def test_weights_of_another_shape_are_no_silence(flax_module):
    report = parity.check(nn.Linear(6, 5), flax_module(), X[:, 0, 0])
    assert not report.ok
    assert (report.first_divergence.phase, report.first_divergence.error) == ("forward", np.inf)


class Raises(linen.Module):
    """Raises in one of its layers, or behind them, in one dtype."""

    where: str
    dtype: str = "float64"

    @linen.compact
    def __call__(self, x):
        x = linen.tanh(linen.Dense(4)(x))
        x = Picky(self.dtype)(x) if self.where == "layer" else linen.Dense(5)(x)
        if self.where == "tail" and x.dtype == self.dtype and not self.is_initializing():
            raise RuntimeError(f"no {self.dtype}\nand more lines")
        return x


class Picky(linen.Module):
    dtype: str

    @linen.compact
    def __call__(self, x):
        y = x @ self.param("kernel", linen.initializers.lecun_normal(), (4, 5)) + self.param(
            "bias", linen.initializers.zeros, 5
        )
        if x.dtype == self.dtype and not self.is_initializing():
            raise RuntimeError(f"no {self.dtype}\nand more lines")
        return y


def two_layers():
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("where", "layers"), [("layer", ("2", "Picky_0")), ("tail", ("", ""))])
def test_a_run_of_flax_that_stops(dtype, where, layers):
    """It could not run, which is no difference: where, why, and what was compared before."""
    report = parity.check(two_layers(), Raises(where, dtype), X[:, 0, 0], train=False)
    first, (told,) = report.first_divergence, report.diagnoses
    assert (first.phase, first.torch_layer, first.flax_layer) == ("forward", *layers)
    assert np.isnan(first.error)
    assert (told.code, told.layer, told.flax_layer) == ("could-not-run", *layers)
    assert f"RuntimeError: no {dtype}" in told.evidence
    assert "more lines" not in told.evidence
    assert all(row.ok for row in report.layers)
    assert {row.torch_layer for row in report.layers} >= {"0"}


class TorchPicky(nn.Linear):
    def __init__(self, dtypes):
        super().__init__(4, 5)
        self.dtypes = dtypes

    def forward(self, x):
        if x.dtype in self.dtypes:
            raise RuntimeError("not in this dtype")
        return super().forward(x)


def torch_raises(*dtypes):
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), TorchPicky(dtypes))


class Right(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(5)(linen.tanh(linen.Dense(4)(x)))


@pytest.mark.parametrize("function", [parity.check, parity.trace])
def test_a_run_of_pytorch_that_stops(function):
    report = function(torch_raises(torch.float64), Right(), X[:, 0, 0], train=False)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("could-not-run", "2")]
    assert np.isnan(report.first_divergence.error)


class StopsBehindTheNorm(linen.Module):
    """In float64, if it does: behind the batch norm."""

    stops: bool

    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Dense(4)(x))
        if self.stops and x.dtype == "float64" and not self.is_initializing():
            raise RuntimeError("not in this dtype")
        return linen.Dense(5)(linen.tanh(x))


@pytest.mark.parametrize("stops", ["torch", "flax", "both"])
@pytest.mark.parametrize("options", [{"train": False}, {}, {"steps": 1, "optimizers": SGD}])
def test_a_run_that_stops_is_compared_up_to_there(stops, options):
    """On either side: what was compared agrees, and nothing is said of what was not."""
    torch.manual_seed(0)
    last = TorchPicky((torch.float64,)) if stops != "flax" else nn.Linear(4, 5)
    flax = StopsBehindTheNorm(stops != "torch")
    torch_module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), last)
    report = parity.check(torch_module, flax, X[:, 0, 0], **options)
    assert {d.code for d in report.diagnoses} == {"could-not-run"}
    assert "RuntimeError: not in this dtype" in report.diagnoses[0].evidence
    compared = {(row.torch_layer, row.quantity) for row in report.layers}
    assert compared == {(layer, what) for layer in "01" for what in ("input", "output")}
    assert all(row.ok for row in report.layers)
    assert report.first_divergence.torch_layer == ("" if stops == "flax" else "3")

    torch_module[1].eps = 0.1
    report = parity.check(torch_module, flax, X[:, 0, 0], **options)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("epsilon", "1")]
    assert "could not run: RuntimeError: not in this dtype" in str(report)


def test_what_has_no_gradient_is_no_silence():
    report = parity.check(nn.Linear(6, 5), OnlyForward(), X[:, 0, 0])
    assert [d.code for d in report.diagnoses] == ["could-not-run"]
    assert "reverse-mode" in report.diagnoses[0].evidence.lower()
    assert report.first_divergence.phase == "backward"
    assert np.isnan(report.first_divergence.error)


def test_missing_variables_do_not_stop_the_check():
    variables = parity.weights.to_flax(torch_net(), Net(), inputs=[X])
    del variables["params"]["Dense_0"]["bias"]
    report = parity.check(torch_net(), Net(), X, train=False, variables=variables)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("bias-missing", "4")]


def test_native_batch_norms_differ_in_the_kept_variance():
    report = parity.check(torch_net(), Net(), X)
    assert report.first_divergence.phase == "statistics"
    assert [d.code for d in report.diagnoses] == ["unbiased-variance"]
    assert "m/(m-1)" in report.diagnoses[0].evidence


def test_steps():
    optimizers = (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9))
    assert parity.check(torch_net(), Net(), X, train=False, steps=3, optimizers=optimizers).ok
    with pytest.raises(ValueError, match="optimizers is None"):
        parity.check(torch_net(), Net(), X, steps=1)


def test_float32_inside_is_rounding():
    """A layer that computes in float32 whatever it is given is no mistake, and its rounding no divergence."""

    class Rounded(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(linen.tanh(linen.Dense(16, dtype=jnp.float32)(x)))

    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    x = np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)
    report = parity.check(model, Rounded(), x)
    assert report.ok, report
    assert max(row.error for row in report.layers) > 1e-9


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (TypeError, {"torch_module": linen.Dense(2)}),
        (TypeError, {"flax_module": nn.Linear(2, 2)}),
        (ValueError, {"inputs": ()}),
        (TypeError, {"inputs": (torch.zeros(2),)}),
        (TypeError, {"inputs": (np.array(["a"]),)}),
        (TypeError, {"train": "yes"}),
        (TypeError, {"flax_inputs": X}),
        (ValueError, {"flax_inputs": [X, X]}),
        (TypeError, {"flax_call": 3}),
        (TypeError, {"layer_map": ["0"]}),
        (TypeError, {"loss": torch.nn.functional.mse_loss}),
        (ValueError, {"steps": -1}),
        (TypeError, {"steps": 1.5}),
        (TypeError, {"optimizers": torch.optim.SGD}),
        (ValueError, {"depth": 0}),
        (ValueError, {"depth": "1"}),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_arguments(error, change):
    arguments = {"torch_module": torch_net(), "flax_module": Net(), "inputs": (X,)} | change
    modules = [arguments.pop(name) for name in ("torch_module", "flax_module")]
    with pytest.raises(error, match="allowed"):
        parity.check(*modules, *arguments.pop("inputs"), **arguments)


def test_assert_parity():
    assert assert_parity(torch_net(), Net(), X, train=False).ok
    with pytest.raises(AssertionError, match="unbiased-variance at 1"):
        assert_parity(torch_net(), Net(), [X])


def test_a_correct_pair_needs_few_programs():
    """One for each run (alone, its own dtype, layer by layer twice), none for each shape of a weight or an array."""
    found = []

    def listen(event, _, **__):
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        widths = (7, 11, 13, 17, 19)
        torch.manual_seed(0)
        module = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
        x = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
        assert parity.check(module, linen.Sequential([linen.Dense(width) for width in widths[1:]]), x).ok
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(found) <= 4
