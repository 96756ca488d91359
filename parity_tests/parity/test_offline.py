"""Dumps made where only one framework can be imported, and compared where neither can; and `trace`."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from flax.traverse_util import flatten_dict

import parity
from parity import offline
from parity.records import dump_file
from parity.records.answers import Response
from parity.records.evidence import Evidence
from parity.records.recording import Call, Failure, Layer, Recording
from parity_tests.parity.planted import CASES

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)

TORCH_NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(4 * 4 * 4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3),
    )

def loss(output):
    return (output**3).sum()
"""
FLAX_NET = """
import flax.linen as nn

class Net(nn.Module):
    epsilon: float = 1e-5
    gelu: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), padding=1)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=self.epsilon)(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2)).reshape(len(x), -1)
        x = nn.Dense(8)(x)
        return nn.Dense(3)(nn.gelu(x) if self.gelu else nn.relu(x))

def another_epsilon():
    return Net(1e-3)

def two_mistakes():
    return Net(1e-3, True)

def loss(output):
    return (output**3).sum()
"""


def namespace(source):
    names = {"__name__": "net_of_a_test"}
    sys.modules["net_of_a_test"] = type(sys)("net_of_a_test")  # where dataclasses look their module up
    exec(source, names)
    return names


@pytest.fixture(scope="module")
def torch_net():
    return namespace(TORCH_NET)["net"]()


@pytest.fixture(scope="module")
def flax_net():
    return namespace(FLAX_NET)["Net"]


def both(tmp_path, torch_net, flax_module, *, train=False, first="torch", **options):
    """Dump one side, then the other with its weights, and compare."""
    a, b = tmp_path / "a", tmp_path / "b"
    modules = (torch_net, flax_module) if first == "torch" else (flax_module, torch_net)
    offline.dump(modules[0], [X], a, train=train, **options)
    offline.dump(modules[1], [X], b, train=train, weights=a, **options)
    return offline.compare(b, a)


def python(blocked, *args, cwd):
    """`python -m parity ...` where some packages can't be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import parity.__main__ as p; sys.exit(p.main())"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=cwd, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip


JAX = ["jax", "jaxlib", "flax", "optax", "orbax"]


def test_each_half_needs_its_own_framework_only(tmp_path):
    """And comparing needs neither."""
    (tmp_path / "torch_net.py").write_text(TORCH_NET)
    (tmp_path / "flax_net.py").write_text(FLAX_NET)
    np.savez(tmp_path / "x.npz", X)
    given = ["--inputs", "x.npz", "--eval"]
    done = python(JAX, "dump", "torch_net:net", "--out", "a", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = python(
        ["torch"], "dump", "flax_net.py:another_epsilon", "--out", "b", "--weights", "a", *given, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    done = python([*JAX, "torch"], "compare", "a", "b", "--json", "report.json", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["first_divergence"]["torch_layer"] == "1"
    assert report["first_divergence"]["flax_layer"] == "BatchNorm_0"
    assert report["first_divergence"]["phase"] == "forward"


@pytest.mark.parametrize("first", ["torch", "flax"])
def test_the_same_network(tmp_path, torch_net, flax_net, first):
    """With the weights of whichever was dumped first; also behind a flatten."""
    report = both(tmp_path, torch_net, flax_net(), first=first)
    assert report.ok, str(report)
    assert not report.notes
    assert {row.phase for row in report.layers} == {"forward", "loss", "backward"}
    assert max(row.error for row in report.layers) < 1e-13
    assert report.details["mode"] == "eval"


def test_training(tmp_path, torch_net, flax_net):
    """PyTorch keeps the unbiased variance."""
    report = both(tmp_path, torch_net, flax_net(), train=True)
    assert report.first_divergence.phase == "statistics"
    assert report.first_divergence.quantity == "running_var"
    assert [(d.code, d.layer) for d in report.diagnoses] == [("unbiased-variance", "1")]


@pytest.mark.parametrize("first", ["torch", "flax"])
def test_a_mistake(tmp_path, torch_net, flax_net, first):
    report = both(tmp_path, torch_net, flax_net(1e-3), first=first)
    assert report.first_divergence.torch_layer == "1"
    assert [(d.code, d.layer, d.flax_layer) for d in report.diagnoses] == [("epsilon", "1", "BatchNorm_0")]


def test_two_mistakes(tmp_path, torch_net, flax_net):
    """With PyTorch's weights Flax is run layer by layer as well, so that the second is told from the first."""
    report = both(tmp_path, torch_net, flax_net(1e-3, True))
    assert [(d.code, d.layer) for d in report.diagnoses] == [("epsilon", "1"), ("activation", "6")]
    assert [row.torch_layer for row in report.layers if row.inherited and row.quantity == "output"] == ["5", "8", ""]


def test_other_weights(tmp_path, torch_net, flax_net):
    """Which is said, and not taken for a mistake in a layer."""
    for module, name in ((torch_net, "a"), (flax_net(), "b")):
        offline.dump(module, [X], tmp_path / name, train=False)
    report = offline.compare(tmp_path / "a", tmp_path / "b")
    assert not report.ok
    assert any("dump --weights" in note for note in report.notes)


def test_other_inputs(tmp_path, torch_net, flax_net):
    offline.dump(torch_net, [X], tmp_path / "a", train=False)
    offline.dump(flax_net(), [X + 1], tmp_path / "b", train=False, weights=tmp_path / "a")
    report = offline.compare(tmp_path / "a", tmp_path / "b")
    assert report.first_divergence.torch_layer == "0"
    assert report.first_divergence.quantity == "input"
    assert "the two dumps were given different inputs" in report.notes


def test_losses(tmp_path, torch_net, flax_net):
    """Of the user's; a default one on one side only is refused."""
    losses = namespace(TORCH_NET)["loss"], namespace(FLAX_NET)["loss"]
    offline.dump(torch_net, [X], tmp_path / "a", train=False, loss=losses[0])
    offline.dump(flax_net(), [X], tmp_path / "b", train=False, loss=losses[1], weights=tmp_path / "a")
    report = offline.compare(tmp_path / "a", tmp_path / "b")
    assert report.ok, str(report)
    offline.dump(flax_net(), [X], tmp_path / "b", train=False, weights=tmp_path / "a")
    with pytest.raises(ValueError, match=r"loss is .*loss in .*a and default in .*b; allowed: the same"):
        offline.compare(tmp_path / "a", tmp_path / "b")


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.tanh(self.first(x)))


@pytest.mark.parametrize("first", ["torch", "flax"])
def test_nnx(tmp_path, first):
    """Dumps of one framework take each other's weights as well."""
    torch_net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    modules = [torch_net, Linear(nnx.Rngs(0))]
    x = X[:, 0, 0, :6]
    for module, name in zip(modules if first == "torch" else modules[::-1], "ab", strict=True):
        offline.dump(module, [x], tmp_path / name, weights=None if name == "a" else tmp_path / "a")
    report = offline.compare(tmp_path / "a", tmp_path / "b")
    assert report.ok, str(report)
    offline.dump(modules[1], [x], tmp_path / "c", weights=tmp_path / ("b" if first == "torch" else "a"))
    offline.dump(torch_net, [x], tmp_path / "d", weights=tmp_path / ("a" if first == "torch" else "b"))
    assert offline.compare(tmp_path / "c", tmp_path / "d").ok


def test_weights_from_files(tmp_path, torch_net, flax_net):
    """Each side's own names; what does not fit is refused whole."""
    state = {name: v.numpy() for name, v in torch_net.state_dict().items()}
    variables = flatten_dict(dict(flax_net().init(jax.random.key(1), X.transpose(0, 2, 3, 1), train=False)), sep="/")
    variables = {name: np.asarray(v) for name, v in variables.items()}
    torch.save(torch_net.state_dict(), tmp_path / "state.pt")
    np.savez(tmp_path / "state.npz", **state)
    safetensors.numpy.save_file(state, tmp_path / "state.safetensors")
    np.savez(tmp_path / "variables.npz", **variables)
    safetensors.numpy.save_file(variables, tmp_path / "variables.safetensors")
    other = namespace(TORCH_NET)["net"]()
    torch.nn.init.zeros_(other[0].weight)
    for name in ("state.pt", "state.npz", "state.safetensors"):
        made = offline.dump(other, [X], tmp_path / "a", weights=tmp_path / name)
        np.testing.assert_array_equal(made.free.tensors["0.weight"], state["0.weight"].astype(np.float64))
    assert not other[0].weight.any()  # the module stays as it is
    for name in ("variables.npz", "variables.safetensors"):
        made = offline.dump(flax_net(), [X], tmp_path / "b", weights=tmp_path / name)
        kernel = "params/Conv_0/kernel"
        np.testing.assert_array_equal(made.free.tensors[kernel], variables[kernel].astype(np.float64))
    for module, name in ((other, "variables.npz"), (flax_net(), "state.npz")):
        with pytest.raises(ValueError, match=r"--weights .*lacks .*, has .*; allowed: those of this module"):
            offline.dump(module, [X], tmp_path / "c", weights=tmp_path / name)
    (tmp_path / "bad.npz").write_bytes(b"PK no archive")
    for module in (other, flax_net()):
        for name in ("bad.npz", "bad.txt"):
            with pytest.raises(ValueError, match=r"--weights: .*bad\..*; allowed: "):
                offline.dump(module, [X], tmp_path / "c", weights=tmp_path / name)
    assert not (tmp_path / "c.json").exists()


def test_refused(tmp_path, torch_net, flax_net):
    for module in ("text", nn.Module, 3):
        with pytest.raises(TypeError, match=r"module is .*; allowed: a torch.nn.Module"):
            offline.dump(module, [X], tmp_path / "a")
    for steps in (1, -1, 1.5):
        with pytest.raises(ValueError, match=r"steps is .*allowed: 0, or more with an optimizer"):
            offline.dump(torch_net, [X], tmp_path / "a", steps=steps)
    for module in (torch_net, flax_net()):
        with pytest.raises(TypeError, match=r"optimizer is 3; allowed: "):
            offline.dump(module, [X], tmp_path / "a", optimizer=3)
    offline.dump(torch_net, [X], tmp_path / "a", train=True)
    with pytest.raises(ValueError, match="mode is eval; allowed: train, in which"):
        offline.dump(flax_net(), [X], tmp_path / "b", train=False, weights=tmp_path / "a")
    offline.dump(flax_net(), [X], tmp_path / "b", train=False)
    with pytest.raises(ValueError, match=r"mode is train in .*a and eval in .*b; allowed: the same in both"):
        offline.compare(tmp_path / "b", tmp_path / "a")
    with pytest.raises(ValueError, match="both dumps are of torch; allowed: one of torch and one of flax"):
        offline.compare(tmp_path / "a", tmp_path / "a")
    with pytest.raises(ValueError, match=r"is no dump .*; allowed: the name that `dump --out` was given"):
        offline.compare(tmp_path / "a", tmp_path / "missing")
    offline.dump(flax_net(), [X], tmp_path / "b")
    with pytest.raises(ValueError, match="layer_map names 'x'"):
        offline.compare(tmp_path / "a", tmp_path / "b", layer_map={"x": "Conv_0"})


def test_files_of_two_dumps(tmp_path, torch_net):
    for name, x in (("a", X), ("b", X + 1)):
        offline.dump(torch_net, [x], tmp_path / name)
    (tmp_path / "b.safetensors").rename(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"is not the file that .*; allowed: both of one dump"):
        dump_file.load(tmp_path / "a")
    for text in ("{}", "[]", '{"format": "parity dump", "version": 99}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match="is no parity dump of version 1; allowed"):
            dump_file.load(tmp_path / "a")
        assert not dump_file.is_dump(tmp_path / "a") or "version" in text
    assert not dump_file.is_dump(tmp_path / "missing")


def test_an_older_dump_is_read(tmp_path, torch_net, flax_net):
    """Without what later ones tell besides: float32, notes, the optimiser, where a run stopped."""
    assert both(tmp_path, torch_net, flax_net(1e-3)).diagnoses[0].code == "epsilon"
    for name in "ab":
        about = json.loads((tmp_path / f"{name}.json").read_text())
        for key in ("notes", "answers", "checksum"):
            del about[key]
        del about["runs"]["own"]
        for run in about["runs"].values():
            del run["failed_in"], run["dropout_off"]
        (tmp_path / f"{name}.json").write_text(json.dumps(about))
    report = offline.compare(tmp_path / "a", tmp_path / "b")
    assert [(d.code, d.layer) for d in report.diagnoses] == [("epsilon", "1")]
    assert all(row.error32 is None for row in report.layers)


@pytest.mark.parametrize("name", ["a", "a.safetensors", "a.json", "net.v2"])
def test_any_name(tmp_path, name):
    """Bit for bit, also what is no number, empty, an integer or a scalar."""
    a = np.array([[1.5, np.nan, -0.0], [np.inf, 1e-310, 2.0]]).T  # not contiguous
    layer = Layer("x.0", "conv", "Conv", {"w": "x.0.w"}, frozenset({"w"}), {"stride": (1, 2), "f": print, "eps": 1e-5})
    call = Call("x.0", 0, [a, np.arange(3)], np.float32(2.0) * np.ones(()), [a], [None, None], None)
    free = Recording("torch", {"x.0": layer}, [call], [], {"x.0.w": a}, {}, {"x.0.w": np.zeros((0, 2))}, [a], [None])
    free.failure, free.loss, free.rounds_loss = Failure("ValueError: stopped", "x.0"), float("nan"), True
    made = Evidence(free, noise={("forward", ("x.0", 0)): 1e-16}, details={"mode": "train"})
    made.own, made.exact, made.notes = free, {("x.0", 0): a}, ["a note"]
    made.states, made.answers = [{"x.0.w": a}], {"x.0.w": Response(a, a, a, 0.5, None, np.arange(2))}
    dump_file.save(made, tmp_path / name)
    read = dump_file.load(tmp_path / name)
    assert read.notes == ["a note"]
    np.testing.assert_array_equal(read.exact["x.0", 0], a)
    np.testing.assert_array_equal(read.states[0]["x.0.w"], a)
    assert read.own is not None
    for x, y in zip(read.answers["x.0.w"], made.answers["x.0.w"], strict=True):
        np.testing.assert_array_equal(x, y)
    assert read.noise == made.noise
    assert read.sha256 == made.sha256
    assert read.free.failure == free.failure
    assert np.isnan(read.free.loss)
    assert read.free.rounds_loss
    assert read.free.layers["x.0"].config == {"stride": (1, 2), "eps": 1e-5}
    assert read.free.layers["x.0"].statistics == {"w"}
    (back,) = read.free.calls
    for given, wanted in ((back.inputs[0], a), (back.inputs[1], np.arange(3)), (back.output, call.output)):
        assert given.dtype == wanted.dtype
        assert given.shape == wanted.shape
        assert given.tobytes() == np.array(wanted, order="C").tobytes()
    assert back.input_gradients == [None, None]
    assert back.output_gradient is None
    assert read.free.gradients["x.0.w"].shape == (0, 2)
    assert len(list(tmp_path.iterdir())) == 2


BLOCKED = ("torch", *JAX)
COMPARE = """
import json, sys
sys.modules.update(dict.fromkeys({blocked!r}))
from parity import offline
report = offline.compare("a", "b")
print(json.dumps([(d.code, d.layer) for d in report.diagnoses]))
"""
PLANTED = [
    "matmul-precision-flax-alone-tf32", "matmul-precision-torch-alone-bfloat16", "adam-epsilon-torch-alone-value",
    "padding-flax-alone-none", "kernel-flipped-torch-alone-arithmetic", "activation-flax-alone-tanh-gelu",
    "epsilon-torch-alone-eval", "stopped-statistics-gradient-flax-alone-both", "loss-reduction-torch-alone-sum",
]  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_the_same_mistakes_without_a_framework(tmp_path, name):
    """As `parity.check` names, from two dumps, with neither framework to be imported."""
    case = next(case for case in CASES if case.name == name)
    planted = case.make()
    expected = [[d.code, d.layer] for d in parity.check(*planted[:2], *planted.inputs, **planted.options).diagnoses]
    assert expected[0][0] == case.code
    options = dict(planted.options)
    losses, optimizers = options.pop("loss", None) or (None, None), options.pop("optimizers", None) or (None, None)
    flax_inputs, steps = options.pop("flax_inputs", None), options.pop("steps", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, name, weights, loss, optimizer in zip(
            planted[:2], "ab", (None, tmp_path / "a"), losses, optimizers, strict=True
        ):
            given = planted.inputs if name == "a" or flax_inputs is None else flax_inputs
            offline.dump(
                module, given, tmp_path / name, weights=weights, loss=loss, optimizer=optimizer, steps=steps,
                flax_layout=name == "b" and flax_inputs is not None, **options,
            )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COMPARE.format(blocked=BLOCKED)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


class RoughInFloat32(nn.Module):
    """Its product is of bfloat16, as a flag of an accelerator may make it; float64 shows nothing of it."""

    @nn.compact
    def __call__(self, x):
        kernel, bias = self.param("kernel", nn.initializers.normal(), (4, 3)), self.param("bias", nn.zeros, (3,))
        if x.dtype == jnp.float32:
            x, kernel = (v.astype(jnp.bfloat16).astype(jnp.float32) for v in (x, kernel))
        return x @ kernel + bias


def test_float32_is_compared_in_dumps_too(tmp_path):
    torch.manual_seed(0)
    module, x = torch.nn.Linear(4, 3), np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    offline.dump(module, [x], tmp_path / "a")
    offline.dump(RoughInFloat32(), [x], tmp_path / "b", weights=tmp_path / "a")
    report, checked = offline.compare(tmp_path / "a", tmp_path / "b"), parity.check(module, RoughInFloat32(), x)
    for found in (report, checked):
        assert [d.code for d in found.diagnoses] == ["matmul-precision"], found
        assert max(row.error for row in found.layers) < 1e-12
        assert max(row.error32 for row in found.layers if row.error32 is not None) > 1e-4


def test_trace(torch_net, flax_net):
    """Every layer is run on PyTorch's input whether or not anything differs."""
    report = parity.trace(torch_net, flax_net(), X, train=False)
    assert report.ok, str(report)
    layered = [row for row in report.layers if row.phase in ("forward", "backward")]
    assert all(row.local_error is not None and row.local_error < 1e-13 for row in layered)
    report = parity.trace(torch_net, flax_net(1e-3), X, train=False, layer_map={"1": "BatchNorm_0"})
    alone = [row for row in report.layers if row.local_error and row.local_error > 1e-6 and row.phase == "forward"]
    assert [(row.torch_layer, row.quantity) for row in alone] == [("1", "output")]
