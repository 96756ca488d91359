"""Which layer is which: names, feeders and order in one assignment."""

from functools import partial

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity
from parity.pairing.layers import pair
from parity.pairing.names import alike
from parity.records.recording import Layer
from parity.records.structure import Structure
from parity.sides import weight_files

PARTS = "query", "key", "value"
X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)


class Attention(nn.Module):
    """Calls its layers in a given order."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in PARTS)

    def forward(self, x):
        made = {name: getattr(self, name)(x) for name in self.order}
        return torch.softmax(made["query"] @ made["key"].transpose(1, 2), -1) @ made["value"]


class LinenAttention(linen.Module):
    order: tuple
    names: tuple = PARTS

    @linen.compact
    def __call__(self, x):
        name = dict(zip(PARTS, self.names, strict=True))
        made = {part: linen.Dense(8, name=name[part])(x) for part in self.order}
        return jax.nn.softmax(made["query"] @ made["key"].swapaxes(1, 2), -1) @ made["value"]


class NnxAttention(nnx.Module):
    def __init__(self, order):
        self.order = tuple(order)
        for name in PARTS:
            setattr(self, name, nnx.Linear(8, 8, rngs=nnx.Rngs(0)))

    def __call__(self, x):
        made = {name: getattr(self, name)(x) for name in self.order}
        return jax.nn.softmax(made["query"] @ made["key"].swapaxes(1, 2), -1) @ made["value"]


def attention():
    torch.manual_seed(0)
    return Attention(("key", "value", "query"))


ORDERS = [("query", "value", "key"), ("value", "query", "key")]


def by_name(module):
    return {
        "params": {
            n: {
                "kernel": getattr(module, n).weight.detach().numpy().T,
                "bias": getattr(module, n).bias.detach().numpy(),
            }
            for n in PARTS
        }
    }


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("make", [LinenAttention, NnxAttention])
def test_names_win_over_the_order_of_calls(make, order):
    module, flax_module = attention(), make(order)
    carried = parity.to_flax(module, flax_module, inputs=[X], flax_inputs=[X])
    flat = carried["params"] if make is LinenAttention else carried
    for name in PARTS:
        np.testing.assert_array_equal(np.asarray(flat[name]["kernel"]).T, getattr(module, name).weight.detach())
    state = parity.to_torch(carried, attention(), flax_module=flax_module, inputs=[X], flax_inputs=[X])
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(state[name], value)
    report = parity.check(module, flax_module, X, train=False)
    assert report.ok, report


def test_names_win_over_numbers():
    """Right variables are right; with key and value exchanged in them, these two are charged, and not the query."""
    module, flax_module = attention(), LinenAttention(ORDERS[0])
    assert parity.check(module, flax_module, X, train=False, variables=by_name(module)).ok
    params = by_name(module)["params"]
    exchanged = {"params": {**params, "key": params["value"], "value": params["key"]}}
    report = parity.check(module, flax_module, X, train=False, variables=exchanged)
    assert [d.code for d in report.diagnoses] == ["weight-order"]
    assert report.diagnoses[0].evidence == "Flax's key holds PyTorch's value, value holds PyTorch's key"


def test_the_order_decides_where_names_say_nothing():
    module = Attention(PARTS)
    for names in (("Dense_0", "Dense_1", "Dense_2"), ("a", "b", "c")):
        carried = parity.to_flax(module, LinenAttention(PARTS, names), inputs=[X], flax_inputs=[X])
        for part, name in zip(PARTS, names, strict=True):
            np.testing.assert_array_equal(carried["params"][name]["kernel"].T, getattr(module, part).weight.detach())


def structure(paths, kind="linear", feeders=None, is_torch=True):
    sep, weight = (".", "weight") if is_torch else ("/", "kernel")
    layers = [Layer(p, kind, "", {weight: f"{p}{sep}{weight}"}) for p in paths]
    return Structure(layers, {x.tensors[weight]: (8, 8) for x in layers}, feeders=feeders or {})


def partners(torch_paths, flax_paths, layer_map=None):
    found = pair(structure(torch_paths), structure(flax_paths, is_torch=False), layer_map)
    return {p.torch.path: p.flax.path for p in found.layers}


@pytest.mark.parametrize("names", [PARTS, ("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv")], ids="-".join)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_names_win_without_the_module(order, names):
    """Of a state_dict alone, and of variables alone, sorted by JAX or not."""
    module, flax_module = attention(), LinenAttention(order, names)
    carried = parity.to_flax(module.state_dict(), flax_module, inputs=[X], flax_inputs=[X])
    for part, name in zip(PARTS, names, strict=True):
        np.testing.assert_array_equal(carried["params"][name]["kernel"].T, getattr(module, part).weight.detach())
    for variables in (carried, jax.tree.map(lambda a: a, carried)):
        state = parity.to_torch(variables, attention(), inputs=[X], flax_inputs=[X])
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


AUTOMATIC = "Dense_0", "Dense_1", "Dense_2"


def told_by_order(function, *args):
    """What is warned of: the order alone."""
    with pytest.warns(parity.weights.ParityWarning) as warned:
        made = function(*args)
    assert [str(w.message).split(" says ")[0] for w in warned] == ["only their order"]
    return made, str(warned[0].message)


@pytest.mark.parametrize("names", [AUTOMATIC, ("theta", "phi", "g")], ids="-".join)
def test_the_order_alone_is_told(names):
    """Without the module no numbers show which is which of three layers; with it they do, and nothing is told."""
    module, flax_module = attention(), LinenAttention(PARTS, names)
    carried, text = told_by_order(parity.to_flax, module.state_dict(), flax_module)
    assert f"query, key, value to {', '.join(names)};" in text
    told_by_order(parity.to_torch, carried, attention())
    if names is AUTOMATIC:  # by their numbers, which PyTorch's names do not have
        told_by_order(parity.to_torch, jax.tree.map(lambda a: a, carried), attention())
    parity.to_flax(module, LinenAttention(("key", "value", "query"), names), inputs=[X], flax_inputs=[X])


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("theta", "phi", "g")], ids="-".join)
@pytest.mark.parametrize("way", ["torch", "flax", "one side's own"])
def test_two_dumps_of_branches_in_another_order(names, way, tmp_path):
    """By names, or where they say nothing by weights: a pair that agrees is not accused, whoever dumps first."""
    torch_, flax, module = tmp_path / "torch", tmp_path / "flax", attention()
    flax_module = LinenAttention(PARTS, names)
    dump_flax = partial(parity.dump, flax_module, [X], flax, train=False, flax_layout=True)
    if way == "flax":
        dump_flax()
        # PyTorch cannot be run with other partners to see which agree: their names must say it.
        parity.dump(module, [X], torch_, train=False, weights=flax)
        report = parity.compare(torch_, flax)
        assert report.ok == (names[0] == "q_proj")
        assert report.ok or any(note.startswith("only their order says which is which of") for note in report.notes)
        return
    parity.dump(module, [X], torch_, train=False)
    if way == "torch":
        dump_flax(weights=torch_)
    else:
        params = by_name(module)["params"]
        own = {"params": {name: params[part] for part, name in zip(PARTS, names, strict=True)}}
        weight_files.save(tmp_path / "own.npz", own)
        dump_flax(weights=tmp_path / "own.npz")
    report = parity.compare(torch_, flax)
    assert report.ok, report
    assert len(report.notes) == (names[0] == "theta")


def test_weights_in_the_wrong_branch_of_a_dump_are_not_paired_away(tmp_path):
    """Key and value exchanged in weights of one's own: what the two then compute differs, whatever is paired."""
    module, names = attention(), ("theta", "phi", "g")
    params = by_name(module)["params"]
    wrong = {"params": {"theta": params["query"], "phi": params["value"], "g": params["key"]}}
    weight_files.save(tmp_path / "own.npz", wrong)
    torch_, flax = tmp_path / "torch", tmp_path / "flax"
    parity.dump(module, [X], torch_, train=False)
    flax_module = LinenAttention(("key", "value", "query"), names)
    parity.dump(flax_module, [X], flax, train=False, flax_layout=True, weights=tmp_path / "own.npz")
    report = parity.compare(torch_, flax)
    assert not report.ok
    assert not any(note.startswith("paired by their weights") for note in report.notes)


def test_the_order_alone_is_told_of_the_layers_that_it_decides():
    """Counted in one order on both sides, named alike, fed by partners: nothing is left to the order."""

    def open_(t, f, **options):
        return pair(structure(t, **options), structure(f, is_torch=False, **options)).by_order

    assert open_(["fc1", "fc2", "fc3"], ["Dense_0", "Dense_1", "Dense_2"]) == []
    assert open_(["net.0.fc", "net.1.fc"], ["Block_0/Dense_0", "Block_1/Dense_0"]) == []
    assert open_(["net.0.fc", "net.1.fc"], ["Block_1/Dense_0", "Block_0/Dense_0"]) == [["net.0.fc", "net.1.fc"]]
    assert open_(["up", "gate", "down"], ["Dense_0", "Dense_1", "down"]) == [["up", "gate"]]
    assert open_(["up", "gate"], ["gate_proj", "up_proj"]) == []
    assert open_(["query", "key"], ["kproj", "qproj"]) == []
    assert pair(structure(["a", "b"]), structure(["x", "y"], is_torch=False), {"a": "y"}).by_order == []


def test_a_stack_of_layers_each_called_in_another_order():
    """Twelve layers of equal shapes: the numbers say which layer, the words which part, whatever is called first."""
    t = [f"encoder.layer.{i}.attention.self.{part}" for i in range(12) for part in PARTS]
    f = [f"encoder/layer/{i}/attention/self/{part}" for i in range(12) for part in ("value", "query", "key")]
    assert partners(t, f) == {path: path.replace(".", "/") for path in t}
    f = [f"blocks_{i}/attn/{short}_proj" for i in range(12) for short in "vqk"]
    long = {"q": "query", "k": "key", "v": "value"}
    assert partners(t, f) == {
        f"encoder.layer.{i}.attention.self.{long[s]}": f"blocks_{i}/attn/{s}_proj" for i in range(12) for s in "qkv"
    }


def test_numbers_may_begin_at_zero_or_one_and_ten_comes_after_two():
    t = [f"layer{i}.conv" for i in range(1, 13)]
    f = [f"layer{i}/conv" for i in range(12)]
    assert partners(t, f) == dict(zip(t, f, strict=True))
    # JAX sorts the names: layers_10 before layers_2. The order of calls is another.
    assert partners(t, sorted(f)) == dict(zip(t, f, strict=True))


def test_a_missing_layer_does_not_shift_the_others():
    t = [f"fc{i}" for i in range(5)]
    f = ["fc0", "fc1", "fc3", "fc4"]
    assert partners(t, f) == {p: p for p in f}
    a = [f"Dense_{i}" for i in range(4)]
    assert list(partners(["up", "down", "gate", "out"], a).values()) == a


def test_a_map_is_kept():
    assert partners(["query", "key"], ["key", "query"], {"query": "key"}) == {"query": "key", "key": "query"}


def test_what_one_side_alone_says_counts_nothing():
    assert np.ptp(alike(["left", "right"], ["Dense_0", "Dense_1"])) == 0
    assert np.ptp(alike(["fc1", "fc2"], ["Dense_0", "Dense_1"])) == 0  # linen's own numbers are the order
    said = alike(["self.query", "self.key"], ["query_proj", "key_proj"])
    assert said[0][0] > said[0][1]
    assert said[1][1] > said[1][0]


class TwoBranches(nn.Module):
    """Norms of one shape that only what feeds them tells apart; the branches are called either way round."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.na, self.nb = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(3, 6, 1),
            *(nn.BatchNorm2d(6) for _ in "ab"),
        )

    def forward(self, x):
        return self.na(self.a(x)) * self.nb(self.b(x)).exp()


class LinenBranches(linen.Module):
    @linen.compact
    def __call__(self, x):
        side = linen.BatchNorm(use_running_average=True)(linen.Conv(6, (1, 1))(x))
        return linen.BatchNorm(use_running_average=True)(linen.Conv(6, (3, 3))(x)) * jnp.exp(side)


def test_norms_go_with_what_feeds_them():
    torch.manual_seed(0)
    module = TwoBranches()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 5)).astype(np.float32)
    report = parity.check(module, LinenBranches(), x, train=False)
    assert report.ok, report


class InOut(nn.Module):
    """A linear layer that keeps its matrix as [in, out], as GPT-2's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class LinenThree(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(self.width, name="fc")(x))
        return linen.Dense(8, name="head")(linen.Dense(8, name="proj")(x))


@pytest.mark.parametrize("width", [8, 12])
def test_a_matrix_in_out_beside_one_out_in(width):
    """Of square ones the shapes do not tell which is which: what the layer makes of random numbers does."""
    torch.manual_seed(0)
    module = nn.Sequential()
    module.add_module("fc", InOut(8, width))
    module.add_module("tanh", nn.Tanh())
    module.add_module("proj", InOut(width, 8))
    module.add_module("head", nn.Linear(8, 8))
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    right = {
        name: {
            "kernel": (layer.weight.T if name == "head" else layer.weight).detach().numpy(),
            "bias": layer.bias.detach().numpy(),
        }
        for name, layer in module.named_children()
        if name != "tanh"
    }
    carried = parity.to_flax(module, LinenThree(width), inputs=[x])
    jax.tree.map(np.testing.assert_array_equal, carried["params"], right)
    state = parity.to_torch(carried, module, flax_module=LinenThree(width), inputs=[x])
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert parity.check(module, LinenThree(width), x, train=False).ok
    assert parity.check(module, LinenThree(width), x, train=False, variables={"params": right}).ok
    if width == 8:
        wrong = {"params": {**right, "proj": {**right["proj"], "kernel": right["proj"]["kernel"].T}}}
        report = parity.check(module, LinenThree(width), x, train=False, variables=wrong)
        assert [(d.code, d.layer) for d in report.diagnoses] == [("kernel-transposed", "proj")]


def test_names_that_are_all_the_same_win_over_who_feeds_whom():
    """A norm feeds the branch of its own block (pre-norm), or of the next one (post-norm)."""
    paths = [f"blocks.{i}.{part}" for i in range(3) for part in ("norm", "fc1", "fc2")]
    late = [f"blocks_{i}/{part}" for i in range(3) for part in ("fc1", "fc2", "norm")]
    feeds = {f"blocks.{i}.fc1": f"blocks.{i}.norm" for i in range(3)}
    feeds_next = {f"blocks_{i}/fc1": f"blocks_{i - 1}/norm" for i in range(1, 3)}
    torch_side, flax_side = structure(paths, feeders=feeds), structure(late, feeders=feeds_next, is_torch=False)
    found = {p.torch.path: p.flax.path for p in pair(torch_side, flax_side).layers}
    assert found == {path: path.replace(".", "_", 1).replace(".", "/") for path in paths}


def test_a_word_that_counts_something_else_on_the_other_side():
    """A stage's layers are its layers here, and the stages there; so are blocks."""
    t = [f"layers.{i}.blocks.{j}" for i in range(3) for j in range(3)]
    f = [f"block{i}_fc{j}" for i in range(3) for j in range(3)]
    assert partners(t, f) == dict(zip(t, f, strict=True))
    t = [f"layer{i}.{j}.conv1" for i in range(1, 4) for j in range(3)]
    f = [f"block{i}_layer{j}/conv_1" for i in range(1, 4) for j in range(3)]
    assert partners(t, f) == dict(zip(t, f, strict=True))


def test_a_number_counts_every_word_of_its_segment():
    """A feature pyramid calls its last level first."""
    t = [f"inner_blocks.{i}" for i in (3, 2, 1, 0)]
    f = [f"inner_{i}" for i in range(4)]
    assert partners(t, f) == {f"inner_blocks.{i}": f"inner_{i}" for i in range(4)}


def test_what_is_no_name():
    """The class in an automatic name, and the size of a kernel."""
    assert partners(["proj", "fc"], ["Dense_0", "head"]) == {"proj": "Dense_0", "fc": "head"}
    t = ["branch1x1", "branch5x5_1", "branch3x3_1"]
    f = ["branch1", "branch2_1", "branch3_1"]
    assert partners(t, f) == dict(zip(t, f, strict=True))


@pytest.mark.parametrize(
    ("torch_names", "flax_names"),
    [
        (("stem", "block", "head"), ("embed", "body", "classifier")),
        (("proj", "hidden", "fc"), ("Dense_0", "Dense_1", "logits")),
        (("embed", "fc1", "fc2", "head"), ("Dense_0", "Dense_1", "Dense_2", "classifier")),
    ],
)
def test_a_lost_order_is_not_guessed_from_letters(torch_names, flax_names):
    """JAX has sorted the variables, and no word says which is which."""
    module = nn.Sequential()
    for name in torch_names:
        module.add_module(name, nn.Linear(8, 8))
    made = {name: {"bias": np.zeros(8, "f"), "kernel": np.eye(8, dtype="f")} for name in sorted(flax_names)}
    with pytest.raises(ValueError, match="alphabetical order"):
        parity.to_torch({"params": made}, module)
