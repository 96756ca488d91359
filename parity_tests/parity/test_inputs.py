"""What modules are called with and what they give, as people have it: None, keywords, dicts, dataclasses.

Each entrance takes the same: check, trace, to_flax, to_torch, dump, lockstep, and the command line.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx, struct
from torch import nn

import parity
from parity.__main__ import main

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 9, (2, 5))
MASK = np.arange(5) < np.array([[3], [5]])
IMAGE = RNG.normal(size=(2, 3, 6, 6)).astype(np.float32)


class TorchText(nn.Module):
    """Tokens and a mask; a third argument that is mostly None."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None, bias=None, as_dict=False):
        x = self.embed(input_ids)
        x = x if attention_mask is None else x * attention_mask[..., None]
        y = self.head(x if bias is None else x + bias)
        return {"logits": y} if as_dict else y


class FlaxText(linen.Module):
    @linen.compact
    def __call__(self, input_ids, attention_mask, bias, as_dict=False, deterministic: bool = True):
        x = linen.Embed(9, 4)(input_ids)
        x = x if attention_mask is None else x * attention_mask[..., None]
        y = linen.Dense(3)(x if bias is None else x + bias)
        return {"logits": y} if as_dict else y


class NnxText(nnx.Module):
    def __init__(self):
        self.embed, self.head = nnx.Embed(9, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1))

    def __call__(self, input_ids, attention_mask, bias, as_dict=False):
        x = self.embed(input_ids)
        y = self.head(x if attention_mask is None else x * attention_mask[..., None])
        return {"logits": y} if as_dict else y


def without_bias(module, variables, ids, mask, train, **named):
    return module.apply(variables, ids, mask, None, **named)


# What the two modules can be called with: the arguments in order, and the others.
CALLS = {
    "none": ([IDS, MASK, None], {}),
    "no-mask": ([IDS, None, None], {}),
    "keywords": ([], {"keywords": {"input_ids": IDS, "attention_mask": MASK, "bias": None}}),
    "some-keywords": ([IDS], {"keywords": {"attention_mask": MASK, "bias": None, "as_dict": True}}),
    "flax-in-order": (
        [],
        {"keywords": {"input_ids": IDS, "attention_mask": MASK}, "flax_inputs": [IDS, MASK, None]},
    ),
    "flax-by-name": ([IDS, MASK], {"flax_inputs": {"attention_mask": MASK, "input_ids": IDS, "bias": None}}),
    "flax-call": ([IDS, MASK], {"flax_call": without_bias}),
    "flax-call-keywords": ([IDS, MASK], {"keywords": {"as_dict": True}, "flax_call": without_bias}),
}
NAMES = pytest.mark.parametrize("name", CALLS)


@NAMES
@pytest.mark.parametrize("make", [FlaxText, NnxText])
def test_check_and_trace(name, make):
    inputs, options = CALLS[name]
    if "flax_call" in options and make is NnxText:
        options = options | {"flax_call": lambda module, _, *a, train, **named: module(*a, None, **named)}
    for function in (parity.check, parity.trace):
        report = function(TorchText(), make(), *inputs, train=False, **options)
        assert report.ok, report
        assert {row.torch_layer for row in report.layers} >= {"embed", "head"}


@NAMES
def test_weights_both_ways(name):
    inputs, options = CALLS[name]
    module = TorchText()
    variables = parity.to_flax(module, FlaxText(), inputs=inputs, **options)
    np.testing.assert_array_equal(variables["params"]["Dense_0"]["kernel"], module.head.weight.detach().numpy().T)
    state = parity.to_torch(variables, TorchText(), flax_module=FlaxText(), inputs=inputs, **options)
    assert all(torch.equal(v, state[n]) for n, v in module.state_dict().items())


@NAMES
def test_dumps(name, tmp_path):
    inputs, options = CALLS[name]
    parity.dump(TorchText(), inputs, tmp_path / "torch", train=False, **options)
    parity.dump(FlaxText(), inputs, tmp_path / "flax", train=False, weights=tmp_path / "torch", **options)
    report = parity.compare(tmp_path / "torch", tmp_path / "flax")
    assert report.ok, report


@pytest.mark.parametrize("name", ["none", "keywords", "flax-in-order", "flax-call"])
def test_lockstep(name):
    inputs, options = CALLS[name]
    target = np.zeros((2, 5), np.int64)
    given = options.get("keywords", tuple(inputs))
    flax_inputs = {"flax_inputs": [options["flax_inputs"]]} if "flax_inputs" in options else {}
    trajectory = parity.lockstep(
        TorchText(),
        FlaxText(),
        [(given, target)],
        steps=2,
        loss=(lambda y, t: (y**2).mean(), lambda y, t: (y**2).mean()),
        flax_call=options.get("flax_call"),
        **flax_inputs,
    )
    assert trajectory.ok, trajectory.verdict


def test_a_difference_is_seen_through_keywords():
    class Squared(linen.Module):
        @linen.compact
        def __call__(self, input_ids, attention_mask):
            return linen.Dense(3)(linen.Embed(9, 4)(input_ids) * attention_mask[..., None]) ** 2

    named = {"input_ids": IDS, "attention_mask": MASK}
    assert not parity.check(TorchText(), Squared(), keywords=named, train=False).ok
    other = {"input_ids": IDS, "attention_mask": ~MASK, "bias": None}
    assert not parity.check(TorchText(), FlaxText(), keywords=named, flax_inputs=other, train=False).ok


def test_flax_may_ask_for_more_by_name():
    class Positions(linen.Module):
        @linen.compact
        def __call__(self, input_ids, position_ids):
            return linen.Dense(3)(linen.Embed(9, 4)(input_ids) + 0 * position_ids[..., None])

    named = {"input_ids": IDS, "position_ids": np.broadcast_to(np.arange(5), (2, 5))}
    report = parity.check(TorchText(), Positions(), IDS, flax_inputs=named, train=False)
    assert report.ok, report


@dataclasses.dataclass
class Batch:
    image: Any
    scale: Any
    name: str = "batch"


class Both(NamedTuple):
    image: Any
    scale: Any


def nested_inputs(kind: str) -> tuple:
    scale = RNG.normal(size=2).astype(np.float32)
    return {
        "dict": ({"scale": scale, "image": IMAGE},),
        "nested": ({"views": [{"image": IMAGE}], "scale": (scale, None)},),
        "dataclass": (Batch(IMAGE, scale),),
        "named": (Both(IMAGE, scale),),
    }[kind]


def read(batch):
    if not isinstance(batch, dict):
        return batch.image, batch.scale
    if "views" in batch:
        return batch["views"][0]["image"], batch["scale"][0]
    return batch["image"], batch["scale"]


class TorchNested(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, batch):
        x, scale = read(batch)
        return self.head(torch.relu(self.conv(x)).mean((2, 3))) * scale[:, None]


class FlaxNested(linen.Module):
    @linen.compact
    def __call__(self, batch):
        x, scale = read(batch)
        y = jnp.mean(linen.relu(linen.Conv(4, (3, 3), padding="VALID")(x)), (1, 2))
        return linen.Dense(5)(y) * scale[:, None]


@pytest.mark.parametrize("kind", ["dict", "nested", "dataclass", "named"])
def test_nested_inputs(kind):
    """The images in them go to Flax channels last, and their gradients are compared."""
    (batch,) = nested_inputs(kind)
    report = parity.check(TorchNested(), FlaxNested(), batch)
    assert report.ok, report
    assert sum(row.quantity == "input gradient" and not row.torch_layer for row in report.layers) == 2
    variables = parity.to_flax(TorchNested(), FlaxNested(), inputs=[batch])
    assert variables["params"]["Conv_0"]["kernel"].shape == (3, 3, 3, 4)


class ModelOutput(OrderedDict):
    """As Hugging Face's: a dict and a dataclass at once, without what is None."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


@dataclasses.dataclass
class TorchOutput(ModelOutput):
    logits: Any = None
    hidden: Any = None
    pooled: Any = None


@struct.dataclass
class FlaxOutput:
    logits: Any = None
    hidden: Any = None
    pooled: Any = None


@dataclasses.dataclass
class PlainOutput:
    logits: Any
    hidden: Any


class Pair(NamedTuple):
    logits: Any
    hidden: Any


OUTPUTS = {
    "ModelOutput": TorchOutput,
    "struct": FlaxOutput,
    "dataclass": PlainOutput,
    "named": Pair,
    "tuple": lambda logits, hidden: (logits, hidden),
}


class TorchOutputs(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.make = nn.Linear(4, 4), nn.Linear(4, 3), make

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.make(logits=self.b(h), hidden=h)


class FlaxOutputs(linen.Module):
    make: Any
    factor: float = 1.0

    @linen.compact
    def __call__(self, x):
        h = linen.tanh(linen.Dense(4)(x))
        return self.make(logits=linen.Dense(3)(h), hidden=h * self.factor)


@pytest.mark.parametrize(
    ("torch_kind", "flax_kind"),
    [("ModelOutput", "struct"), ("dataclass", "dataclass"), ("named", "tuple"), ("tuple", "dataclass")],
)
def test_outputs(torch_kind, flax_kind):
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    pair = TorchOutputs(OUTPUTS[torch_kind]), OUTPUTS[flax_kind]
    report = parity.check(pair[0], FlaxOutputs(pair[1]), x)
    assert report.ok, report
    assert sum(row.quantity == "output" and not row.torch_layer for row in report.layers) == 2
    assert not parity.check(pair[0], FlaxOutputs(pair[1], 1.001), x).ok
    loss = (lambda y: y[0].sum(), lambda y: y[0].sum()) if "tuple" in (torch_kind, flax_kind) else None
    loss = loss or (lambda y: y.logits.sum(), lambda y: y.logits.sum())
    if "dataclass" not in (torch_kind, flax_kind) or loss[0].__code__.co_names[0] == "logits":
        report = parity.check(pair[0], FlaxOutputs(pair[1]), x, loss=loss)
        assert report.ok, report


class TorchDictLayer(nn.Module):
    """A layer that gives a dict by itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return {"size": x.sum(), "logits": x @ self.weight}


class FlaxDictLayer(linen.Module):
    @linen.compact
    def __call__(self, x):
        return {"logits": x @ self.param("weight", linen.initializers.ones, (4, 3)), "size": x.sum()}


def test_a_layer_that_gives_a_dict():
    report = parity.check(TorchDictLayer(), FlaxDictLayer(), RNG.normal(size=(5, 4)).astype(np.float32))
    assert report.ok, report


class Pretrained:
    """What of Hugging Face's FlaxPreTrainedModel is used here."""

    def __init__(self, params: Any) -> None:
        self.config, self._module, self._params = {"vocab_size": 9}, FlaxText(), params

    @property
    def module(self) -> linen.Module:
        return self._module

    @property
    def params(self) -> Any:
        if self._params is None:
            raise ValueError("params cannot be accessed from model when the model is created with _do_init=False")
        return self._params


def test_hugging_face(tmp_path):
    module, named = TorchText(), {"input_ids": IDS, "attention_mask": MASK, "bias": None}
    params = parity.to_flax(module, Pretrained(None), inputs=named)["params"]
    report = parity.check(module, Pretrained(None), keywords=named, train=False)
    assert report.ok, report
    assert not parity.check(module, Pretrained(None), IDS, ~MASK, None, flax_inputs=named, train=False).ok
    state = parity.to_torch(Pretrained(params), TorchText(), inputs=named)
    assert torch.equal(state["head.weight"], module.head.weight)
    # A dump without other weights has the model's own.
    made = parity.dump(Pretrained(params), named, tmp_path / "flax", train=False)
    np.testing.assert_array_equal(made.free.tensors["params/Dense_0/bias"], module.head.bias.detach().numpy())
    target = np.zeros((2, 3), np.int64)
    loss = lambda y, t: y.mean(), lambda y, t: y.mean()
    assert parity.lockstep(module, Pretrained(params), [(named, target)], steps=1, loss=loss).ok


@pytest.mark.parametrize(
    ("error", "options", "said"),
    [
        (TypeError, {"keywords": [IDS]}, "keywords is"),
        (TypeError, {"keywords": {"input_ids": object()}}, "one of inputs is object"),
        (TypeError, {"keywords": {"input_ids": torch.zeros(2)}}, "one of inputs is Tensor"),
        (TypeError, {"inputs": [{"a": [torch.zeros(2)]}]}, "one of inputs is Tensor"),
        (TypeError, {"inputs": [np.array(["a"])]}, "one of inputs is <U1"),
        (TypeError, {"inputs": [IDS], "flax_inputs": IDS}, "flax_inputs is one array"),
        (TypeError, {"inputs": [IDS], "flax_call": 3}, "flax_call is 3"),
        (ValueError, {"inputs": [None, 3]}, "inputs is none"),
        (ValueError, {"inputs": [IDS[:0]]}, "inputs are empty"),
        (ValueError, {"inputs": [IDS], "flax_inputs": [IDS, MASK]}, "flax_inputs is 2 arrays; allowed: 1"),
    ],
)
def test_bad_inputs_are_told_at_every_entrance(error, options, said, tmp_path):
    positional = options.get("inputs", [])
    others = {name: v for name, v in options.items() if name != "inputs"}
    every = {"inputs": positional, **others}
    for call in (
        lambda: parity.check(TorchText(), FlaxText(), *positional, **others),
        lambda: parity.trace(TorchText(), FlaxText(), *positional, **others),
        lambda: parity.to_flax(TorchText(), FlaxText(), **every),
        lambda: parity.to_torch({"params": {}}, TorchText(), flax_module=FlaxText(), **every),
        lambda: parity.dump(TorchText(), positional, tmp_path / "a", **others),
    ):
        with pytest.raises(error, match=said) as told:
            call()
        assert "allowed: " in str(told.value)


NETS = """
import flax.linen as linen
from parity_tests.parity.test_inputs import FlaxText, TorchText, without_bias
"""


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text_nets.py").write_text(NETS)
    np.savez("named.npz", attention_mask=MASK)
    np.save("ids.npy", IDS)
    np.savez("flax.npz", ids=IDS, mask=MASK, bias=np.zeros(4, np.float32))
    torch.save(TorchText().state_dict(), "w.pt")
    modules = "text_nets.py:TorchText", "text_nets.py:FlaxText"

    def fails(*args: str) -> int:
        try:
            return main(args)
        except SystemExit as stopped:
            return int(stopped.code or 0)

    call = "--flax-call", "text_nets.py:named_call"
    (tmp_path / "text_nets.py").write_text(
        NETS + "def named_call(m, v, input_ids, attention_mask, train):\n"
        "    return m.apply(v, input_ids, attention_mask, None)\n"
    )
    given = "--inputs", "ids.npy", "--keywords", "named.npz"
    assert fails("check", *modules, *given, "--eval", *call) == 0, capsys.readouterr()
    assert fails("trace", *modules, *given, "--eval", *call) == 0
    both = "--torch-module", modules[0], "--flax-module", modules[1]
    assert fails("convert", "w.pt", "w.npz", *both, *given, *call) == 0, capsys.readouterr()
    assert fails("convert", "w.npz", "back.pt", *both, *given, *call) == 0, capsys.readouterr()
    assert torch.equal(torch.load("back.pt")["head.weight"], torch.load("w.pt")["head.weight"])
    assert fails("dump", modules[1], "--out", "flax", *given, *call) == 0
    assert fails("check", *modules, "--keywords", "ids.npy") == 2


def test_jax_arrays_and_bfloat16_are_arrays():
    x = jnp.asarray(IMAGE, jnp.bfloat16)
    report = parity.check(nn.Conv2d(3, 4, 3), linen.Conv(4, (3, 3), padding="VALID"), x)
    assert report.ok, report
    assert not jax.config.jax_enable_x64


class TorchMasked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, mask):
        q, k, v = (layer(x)[:, None] for layer in (self.query, self.key, self.value))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]


class FlaxMasked(linen.Module):
    @linen.compact
    def __call__(self, x, mask):
        q, k, v = (linen.Dense(8, name=name)(x)[:, :, None] for name in ("query", "key", "value"))
        bias = mask if mask.dtype != bool else jnp.where(mask, 0.0, -jnp.inf)
        return linen.dot_product_attention(q, k, v, bias=bias)[:, :, 0]


@pytest.mark.parametrize("constant", [-1e4, -1e9, np.finfo(np.float32).min, -np.inf, bool])
def test_an_additive_mask_stays_as_it_is(constant):
    """[B, 1, T, T] on both sides, whatever stands for what is taken out."""
    x, seen = RNG.normal(size=(2, 5, 8)).astype(np.float32), np.tri(5, dtype=bool)[None, None]
    mask = seen if constant is bool else np.where(seen, 0, constant).astype(np.float32)
    for options in ({"keywords": {"mask": mask}}, {}):
        inputs = [x] if options else [x, mask]
        report = parity.check(TorchMasked(), FlaxMasked(), *inputs, **options)
        assert report.ok, report
        parity.to_flax(TorchMasked(), FlaxMasked(), inputs=inputs, **options)
