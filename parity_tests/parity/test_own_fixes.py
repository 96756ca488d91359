"""The lines of a card are the layer's own, and who writes one of them has mended the mistake."""

import inspect

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

import parity
from parity.diagnosis.between import activations, lines, pools
from parity.diagnosis.own_fixes import own_fix
from parity.records.constructors import CONSTRUCTORS, REQUIRED, NotSayableError, line, said
from parity.records.recording import Layer
from parity.report.cards import EXAMPLE, OWN, cards
from parity.sides.torch.record import layers_of

LIBRARIES = {"torch": nn, "linen": linen, "nnx": nnx}
KERNEL = {"rank": 2, "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "mode": "zeros", "scale": True}


def made(code, library):
    """What a line makes."""
    names = {"F": functional, "rngs": nnx.Rngs(0), "nn": linen if library == "linen" else nn, "nnx": nnx}
    return eval(code, names)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_the_constructors_are_the_libraries(name):
    """Their arguments, and the defaults that a line leaves out."""
    library, _, cls = name.partition(".")
    parameters = inspect.signature(getattr(LIBRARIES[library], cls).__init__).parameters
    for a in CONSTRUCTORS[name]:
        usual = parameters[a.name].default
        assert (usual is inspect.Parameter.empty) == (a.default is REQUIRED), a.name
        if a.default is not REQUIRED:
            there = [a.read(value, {**KERNEL, "bias": True}) for value in (usual, a.default)]
            assert there[0] == there[1], a.name


MODULES = [
    nn.Conv2d(3, 8, (5, 3), stride=2, padding=(2, 1), groups=1, bias=False),
    nn.Conv1d(4, 8, 3, padding=2, dilation=2, padding_mode="circular"),
    nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
    nn.Linear(3, 4, bias=False),
    nn.BatchNorm1d(6, momentum=0.3, eps=1e-4),
    nn.LayerNorm((2, 3), eps=1e-4, bias=False),
    nn.LayerNorm(3),
    nn.GroupNorm(2, 6, affine=True),
    nn.RMSNorm(6, eps=1e-4),
]


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_a_line_makes_the_same_layer(module):
    torch.manual_seed(0)
    again = made(line(said(layers_of(module)[""])), "torch")
    assert repr(again) == repr(module)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}


def test_of_a_class_of_ones_own_nothing_is_said():
    class Conv2d(nn.Conv2d):
        """Of the same name, and the user's."""

    assert said(layers_of(Conv2d(3, 8, 3))[""]) is None
    assert said(layers_of(nn.BatchNorm1d(3, momentum=None))[""]) is None
    assert said(Layer("", "conv", "Conv", {"kernel": "params/kernel"}, config={"padding": "SAME"})) is None


def of(module, sizes=()):
    return said(layers_of(module)[""], sizes)


def flax_conv(**config):
    usual = {"features": 8, "kernel_size": (3, 3), "strides": 1, "kernel_dilation": 1, "padding": "SAME"}
    usual |= {"input_dilation": 1, "feature_group_count": 1, "constructor": "linen.Conv"}
    names = {"kernel": "params/kernel", "bias": "params/bias"}
    return said(Layer("", "conv", "Conv", names, config=usual | config), (8, 9))


def test_a_padding_in_numbers():
    """SAME by its sizes, axis by axis; two ends that differ go in front of PyTorch's; circular by its name."""
    fix = own_fix("padding", of(nn.Conv2d(3, 8, 3, stride=2, padding=1), (8, 9)), flax_conv(strides=(2, 2)))
    assert fix.torch[1] == "nn.Conv2d(3, 8, 3, stride=2, padding=0)  # of F.pad(x, (1, 1, 0, 1))"
    assert fix.flax == (
        'nn.Conv(8, (3, 3), strides=(2, 2), padding="SAME")',
        "nn.Conv(8, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))",
    )
    fix = own_fix("padding", of(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")), flax_conv(padding=1))
    assert fix.flax[1] == 'nn.Conv(8, (3, 3), padding="CIRCULAR")'
    # Flax has no circular padding of another width, and nothing else is offered for it.
    assert own_fix("padding", of(nn.Conv2d(3, 8, 3, padding=2, padding_mode="circular")), flax_conv()) is None


def test_what_the_arguments_do_not_show_is_not_shown():
    same = of(nn.Conv2d(3, 8, 3, padding=1)), flax_conv(padding=((1, 1), (1, 1)))
    assert own_fix("padding", *same) is None
    assert own_fix("kernel-flipped", *same) is None
    assert own_fix("padding", same[0], None) is None
    assert own_fix("epsilon", of(nn.RMSNorm(6)), of(nn.RMSNorm(6, eps=1e-3))) is None  # the dtype's own


@pytest.mark.parametrize("name", [name for name, *_ in lines._ACTIVATIONS])
def test_the_line_of_an_activation_computes_it(name):
    name = name.format(0.3)
    x = np.linspace(-7, 7, 57)
    spaces = {"F": functional, "torch": torch, "x": torch.tensor(x)}, {"jax": jax, "jnp": jnp, "x": jnp.asarray(x)}
    given = [np.asarray(eval(text, space)) for text, space in zip(lines._activation(name), spaces, strict=True)]
    np.testing.assert_allclose(given[0], given[1], rtol=1e-6, atol=1e-6)
    function = activations.FUNCTIONS.get(name)
    function = function or next(
        lambda x, f=f: f.function(x, 0.3) for f in activations._FAMILIES if f.name.format(0.3) == name
    )
    np.testing.assert_allclose(given[0], function(x), rtol=1e-6, atol=1e-6)


def test_the_lines_of_a_pool_compute_it():
    """Every pool from 7 x 9 that is tried: the two lines give the same, and what was fitted; or there is none."""
    x = np.random.default_rng(0).normal(size=(2, 7, 9, 3))
    told = 0
    for outputs in ((4, 5), (3, 4), (7, 9), (1, 1)):
        for pool in (pool for axes in pools.geometries((7, 9), outputs) for pool in pools.variants(axes, (7, 9))):
            if (pair := lines._pool(pool)) is None:
                continue
            told += 1
            a = eval(pair[0], {"F": functional, "torch": torch, "x": torch.tensor(x).permute(0, 3, 1, 2)})
            with jax.numpy_dtype_promotion("standard"):  # of flax's own count of the padding
                b = eval(pair[1], {"nnx": nnx, "x": jnp.asarray(x)})
            fit = pools.apply(x, pool)
            np.testing.assert_allclose(a.reshape(*a.shape[:2], *outputs).permute(0, 2, 3, 1), fit, rtol=1e-6)
            np.testing.assert_allclose(np.reshape(b, fit.shape), fit, rtol=1e-5, atol=1e-6)
    assert told > 20


def torch_network(lines=None):
    torch.manual_seed(0)
    lines = lines or {}
    layers = [
        nn.Conv2d(3, 6, 7, stride=2, padding=3),
        nn.GroupNorm(2, 6, eps=1e-2),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6, momentum=0.1, eps=1e-5),
    ]
    return nn.Sequential(*(made(lines[str(i)], "torch") if str(i) in lines else m for i, m in enumerate(layers)))


def nnx_network(lines=None):
    rngs, lines = nnx.Rngs(0), lines or {}
    layers = [
        nnx.Conv(3, 6, (7, 7), strides=2, padding=2, rngs=rngs),
        nnx.GroupNorm(6, num_groups=2, rngs=rngs),
        nnx.Conv(6, 6, (3, 3), feature_group_count=2, rngs=rngs),
        nnx.Conv(6, 6, (3, 3), rngs=rngs),
        nnx.BatchNorm(6, momentum=0.1, rngs=rngs),
    ]
    return nnx.Sequential(*(made(lines[str(i)], "nnx") if str(i) in lines else m for i, m in enumerate(layers)))


def linen_network(lines=None):
    lines = lines or {}
    layers = [
        linen.Conv(6, (7, 7), strides=2, padding=2),
        linen.GroupNorm(num_groups=2),
        linen.Conv(6, (3, 3), feature_group_count=2),
        linen.Conv(6, (3, 3)),
        linen.BatchNorm(momentum=0.1, use_running_average=False),
    ]
    return linen.Sequential([made(lines[str(i)], "linen") if str(i) in lines else m for i, m in enumerate(layers)])


MISTAKES = {"0": "padding", "1": "epsilon", "2": "dilation", "3": "bias-missing", "4": "momentum-inverted"}


@pytest.mark.parametrize(
    ("network", "side"), [(nnx_network, "flax"), (linen_network, "flax"), (linen_network, "torch")]
)
def test_either_line_mends_the_mistake(network, side):
    """All of one framework written as its cards say: what is left is how the variance is kept, in the libraries."""
    x = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
    report = parity.check(torch_network(), network(), x)
    told = {card.places[0].torch_layer: card for card in cards(report) if not card.convention}
    assert {name: card.code for name, card in told.items()} == MISTAKES
    assert {card.advice for card in told.values()} == {OWN}
    lines = {name: getattr(card.fix, side)[1] for name, card in told.items()}
    pair = (torch_network(lines), network()) if side == "torch" else (torch_network(), network(lines))
    assert [d.code for d in parity.check(*pair, x).diagnoses] == ["unbiased-variance"]
    known = next(card for card in cards(report) if card.convention)
    assert known.advice == EXAMPLE
    assert "write    for example:" in str(report)
    assert f"write    {OWN}:" in str(report)


def test_no_such_argument_is_an_error():
    with pytest.raises(NotSayableError, match="one argument for scale and bias"):
        line(of(nn.GroupNorm(2, 6)).like(of(nn.LayerNorm(6, bias=False)), ["bias"]))
