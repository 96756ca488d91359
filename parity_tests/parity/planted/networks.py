"""Mistakes in other networks: NNX, a ResNet, a transformer; two mistakes at once; and what fits nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as linen
import numpy as np
import torch
from flax import nnx
from torch import nn

from parity_tests.parity.planted import flax_norms, torch_norms
from parity_tests.parity.planted.chain import (
    DEEP_TABLE,
    NNX_DEEP_TABLE,
    Case,
    LinenChain,
    Planted,
    TorchChain,
    changed_variables,
    deep_linen,
    deep_nnx,
    deep_torch,
    deep_variables,
    function,
    hand_norm,
    images,
    layer,
    native_norm,
    planted,
    vectors,
)
from parity_tests.parity.zoo.modern import VIT_TABLE, LinenVit, TextModel, Vit
from parity_tests.parity.zoo.modern import LinenTextModel as LinenText
from parity_tests.parity.zoo.others import own_norm
from parity_tests.parity.zoo.pair import linen_variables, nnx_variables, rngs
from parity_tests.parity.zoo.resnet import LINEN_TABLE, LinenResNet, NnxResNet, ResNet


def nnx_cases() -> Iterator[Case]:
    def case(code: str, layers: tuple[str, ...], train: bool, phase: str = "forward", **changed: Any) -> Case:
        def make():
            torch.manual_seed(0)
            made = {name: part() if name.startswith(("bn", "conv", "fc")) else part for name, part in changed.items()}
            module = deep_torch(own_norm if train else native_norm)
            return planted(module, deep_nnx(**made), images(), train=train)

        return Case(code, "flax", "deep", "nnx", make, layers, phase)

    def norm(**kwargs: Any) -> Callable:
        return lambda: nnx.BatchNorm(6, rngs=nnx.Rngs(0), **{"momentum": 0.9, **kwargs})

    def conv(**kwargs: Any) -> Callable:
        return lambda: nnx.Conv(6, 6, (3, 3), rngs=rngs(), **kwargs)

    yield case("momentum-inverted", ("bn2",), True, "statistics", bn2=norm(momentum=0.1))
    yield case("epsilon", ("bn1",), False, bn1=norm(epsilon=1e-3))
    yield case("dilation", ("conv2",), True, conv2=conv(kernel_dilation=2))
    yield case("activation", ("act5",), True, act5=nnx.silu)
    yield case("pool-kind", ("pool2",), False, pool2=lambda x: nnx.avg_pool(x, (2, 2), (2, 2)))
    yield case("bias-missing", ("conv2",), False, conv2=conv(use_bias=False))

    def eval_uses_batch():
        class AlwaysBatch(nnx.BatchNorm):
            def __call__(self, x, *args, **kwargs):
                return super().__call__(x, use_running_average=False)

        torch.manual_seed(0)
        wrong = AlwaysBatch(6, momentum=0.9, rngs=nnx.Rngs(0))
        return planted(deep_torch(native_norm), deep_nnx(bn2=wrong), images(), train=False)

    yield Case("eval-uses-batch-statistics", "flax", "deep", "nnx", eval_uses_batch, ("bn2",))

    def native():
        torch.manual_seed(0)
        return planted(deep_torch(native_norm), deep_nnx(), images(), train=True)

    yield Case("unbiased-variance", "torch", "deep", "nnx-native", native, ("bn1",), "statistics")

    def variables(name: str, change: Callable) -> Callable:
        def make():
            torch.manual_seed(0)
            p = planted(deep_torch(), deep_nnx(), images(), train=True)
            state = nnx_variables(p.torch_module, NNX_DEEP_TABLE, p.flax_module)
            flat = []
            for path, variable in nnx.to_flat_state(state):
                if "/".join(map(str, path)) == name:
                    value = np.asarray(variable[...])
                    variable = variable.replace(torch.from_numpy(np.ascontiguousarray(change(value))).numpy())
                flat.append((path, variable))
            return p._replace(options=p.options | {"variables": nnx.from_flat_state(flat)})

        return make

    yield Case("kernel-transposed", "flax", "deep", "nnx", variables("fc2/kernel", np.transpose), ("fc2",))
    flipped = variables("conv3/kernel", lambda k: k[::-1, ::-1])
    yield Case("kernel-flipped", "flax", "deep", "nnx", flipped, ("conv3",))


def initial_variance() -> Iterator[Case]:
    """Statistics that were not carried over, but start at another value."""

    def make(wing: str, depth: str, train: bool, everywhere: bool = False):
        def build():
            torch.manual_seed(0)
            start = 0.0 if wing == "torch" else 1.0

            def zero(channels):
                return own_norm(channels) if start == 1.0 else _from_zero(channels)

            if depth == "alone":
                module, flax_module = TorchChain({"norm": zero(6)}), LinenChain((_norm_part,))
                variables = {"params": {"BatchNorm_0": {"scale": np.ones(6, "f"), "bias": np.zeros(6, "f")}}}
                other = np.full(6, 1.0 - start, "f")
                variables["batch_stats"] = {"BatchNorm_0": {"mean": np.zeros(6, "f"), "var": other}}
                x = images(6, 5)
            else:
                module, flax_module, x = deep_torch(own_norm), deep_linen(), images()
                variables = deep_variables(module)
                for name, flax_name in ("bn1", "BatchNorm_0"), ("bn2", "BatchNorm_1"), ("bn3", "BatchNorm_2"):
                    if everywhere or name == "bn2":
                        getattr(module, name).moving_var.fill_(start)
                        path = f"batch_stats/{flax_name}/var"
                        variables = changed_variables(variables, path, lambda v: np.full_like(v, 1.0 - start))
            return planted(module, flax_module, x, train=train, variables=variables, fresh=True)

        return build

    for wing in ("torch", "flax"):
        for train in (True, False):
            phase, mode = ("statistics", "train") if train else ("forward", "eval")
            yield Case("initial-variance", wing, "alone", mode, make(wing, "alone", train), ("norm",), phase)
            yield Case("initial-variance", wing, "deep", mode, make(wing, "deep", train), ("bn2",), phase)
            every = make(wing, "deep", train, True)
            yield Case("initial-variance", wing, "deep", f"{mode}-everywhere", every, ("bn1",), phase)


def _norm_part(x, train):
    return linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)


def _from_zero(channels: int) -> nn.Module:
    module = own_norm(channels)
    module.moving_var.zero_()
    return module


def resnets() -> Iterator[Case]:
    def resnet(flax_module, train: bool, change: Callable, table: Any = None, **options: Any) -> Callable:
        def make():
            torch.manual_seed(0)
            p = planted(ResNet(), flax_module(), images(3, 16, 4), train=train)
            change(p.torch_module, p.flax_module)
            return p

        return make

    def nnx_resnet():
        return NnxResNet(rngs=rngs())

    def set_eps(module, _):
        module.layer3[0].bn1.eps = 1e-3

    def set_momentum(module, _):
        module.layer2[1].bn2.momentum = 0.9

    def set_stride(module, _):
        module.layer2[0].conv1.padding_mode = "reflect"
        module.layer2[0].conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]

    def nnx_eps(_, module):
        module.blocks[3].bn2.epsilon = 1e-3

    def stopped(module, _):
        module.layer2[1].bn1 = torch_norms.StoppedNoGrad(12)

    def frozen(module, _):
        module.layer1[1].bn1.momentum = 0.0

    cases = [
        ("epsilon", "torch", "", LinenResNet, True, set_eps, "layer3.0.bn1", "forward"),
        ("momentum-inverted", "torch", "", LinenResNet, True, set_momentum, "layer2.1.bn2", "statistics"),
        ("padding", "torch", "reflect", LinenResNet, False, set_stride, "layer2.0.conv1", "forward"),
        ("epsilon", "flax", "nnx", nnx_resnet, True, nnx_eps, "layer2.1.bn2", "forward"),
        ("stopped-statistics-gradient", "torch", "nnx", nnx_resnet, True, stopped, "layer2.1.bn1", "backward"),
        ("statistics-frozen", "torch", "", LinenResNet, True, frozen, "layer1.1.bn1", "statistics"),
    ]
    for code, wing, variant, flax_module, train, change, name, phase in cases:
        yield Case(code, wing, "resnet", variant, resnet(flax_module, train, change), (name,), phase)

    def flipped():
        torch.manual_seed(0)
        p = planted(ResNet(), LinenResNet(), images(3, 16, 4), train=True)
        variables = linen_variables(p.torch_module, LINEN_TABLE)
        path = "params/LinenBlock_3/Conv_1/kernel"
        variables = changed_variables(variables, path, lambda k: k[::-1, ::-1])
        return p._replace(options=p.options | {"variables": variables})

    yield Case("kernel-flipped", "flax", "resnet", "", flipped, ("layer2.1.conv2",))

    def tanh_gelu():
        torch.manual_seed(0)
        module = Vit()
        module.blocks[1].mlp[1] = nn.GELU(approximate="tanh")
        return planted(module, LinenVit(), images(3, 12, 4), train=True)

    yield Case("activation", "torch", "vit", "tanh-gelu", tanh_gelu, ("blocks.1.mlp.1",))

    def vit_transposed():
        torch.manual_seed(0)
        p = planted(Vit(), LinenVit(), images(3, 12, 4), train=False)
        variables = linen_variables(p.torch_module, VIT_TABLE)
        path = "params/LinenVitBlock_0/MultiHeadDotProductAttention_0/query/kernel"
        variables = changed_variables(variables, path, lambda k: k.reshape(16, 16).T.reshape(k.shape))
        return p._replace(options=p.options | {"variables": variables})

    layers = ("blocks.0.attn", "blocks.0.attn.in_proj", "blocks.0.attn.out_proj")
    yield Case("kernel-transposed", "flax", "vit", "query", vit_transposed, layers)

    def text_epsilon():
        torch.manual_seed(0)
        module = TextModel()
        module.ln_out.eps = 1e-3
        ids = np.random.default_rng(0).integers(0, 30, (6, 7)).astype(np.int32)
        return planted(module, LinenText(), ids, train=False)

    yield Case("epsilon", "torch", "text", "layer-norm", text_epsilon, ("ln_out",))


class Two(NamedTuple):
    """Two mistakes that can be told apart: {code: PyTorch's layer}."""

    name: str
    make: Callable[[], Planted]
    expected: dict[str, str]


def two_mistakes() -> Iterator[Two]:
    def made(train: bool, torch_changed: dict, flax_changed: dict, torch_norm: Callable = own_norm) -> Callable:
        def make():
            torch.manual_seed(0)
            changed = {name: part() for name, part in torch_changed.items()}
            return planted(deep_torch(torch_norm, **changed), deep_linen(**flax_changed), images(), train=train)

        return make

    epsilon = {"bn1": hand_norm(flax_norms.HandNorm, eps=1e-3)}
    yield Two(
        "epsilon-and-activation",
        made(True, {"act3": lambda: nn.LeakyReLU(0.01)}, epsilon),
        {"epsilon": "bn1", "activation": "act3"},
    )
    yield Two(
        "pool-kind-and-momentum",
        made(True, {}, {"bn3": lambda x, train: linen.BatchNorm(not train, momentum=0.1)(x), "pool2": _average}),
        {"pool-kind": "pool2", "momentum-inverted": "bn3"},
    )
    yield Two(
        "dilation-and-stopped",
        made(
            True,
            {"bn1": lambda: torch_norms.Stopped(6)},
            {"conv3": layer(linen.Conv, 8, (3, 3), kernel_dilation=(2, 2))},
        ),
        {"dilation": "conv3", "stopped-statistics-gradient": "bn1"},
    )
    yield Two(
        "epsilon-and-unbiased-in-one-layer",
        made(True, {"bn2": lambda: nn.BatchNorm2d(6, eps=1e-3)}, {}),
        {"epsilon": "bn2", "unbiased-variance": "bn2"},
    )
    yield Two(
        "momentum-and-unbiased-in-one-layer",
        made(True, {"bn2": lambda: nn.BatchNorm2d(6, momentum=0.9)}, {}),
        {"momentum-inverted": "bn2", "unbiased-variance": "bn2"},
    )
    yield Two(
        "dropout-and-eval-statistics",
        made(
            False,
            {"drop": lambda: lambda x: nn.functional.dropout(x)},
            {"bn2": hand_norm(flax_norms.AlwaysBatch)},
            native_norm,
        ),
        {"dropout-active": "fc2", "eval-uses-batch-statistics": "bn2"},
    )

    def weights():
        torch.manual_seed(0)
        p = planted(deep_torch(native_norm), deep_linen(), images(), train=False)
        variables = linen_variables(p.torch_module, DEEP_TABLE)
        variables = changed_variables(variables, "params/Conv_1/kernel", lambda k: k.swapaxes(0, 1))
        variables = changed_variables(variables, "params/Dense_1/kernel", np.transpose)
        return p._replace(options=p.options | {"variables": variables})

    yield Two("two-conversions", weights, {"kernel-hw-swapped": "conv2", "kernel-transposed": "fc2"})


def _average(x, train):
    return linen.avg_pool(x, (2, 2), (2, 2))


def unexplained() -> Iterator[tuple[str, Callable[[], Planted], tuple[str, ...]]]:
    """Differences that are no known mistake: name, case, layers that may be charged."""

    def noise(path: str) -> Callable:
        def make():
            torch.manual_seed(0)
            p = planted(deep_torch(native_norm), deep_linen(), images(), train=False)
            rng = np.random.default_rng(0)
            change = lambda k: k + 0.01 * rng.normal(size=k.shape).astype("f")  # noqa: E731
            variables = changed_variables(deep_variables(p.torch_module), path, change)
            return p._replace(options=p.options | {"variables": variables})

        return make

    def rolled():
        torch.manual_seed(0)
        module = deep_torch(act2=lambda x: torch.relu(x + 0.3 * x.roll(1, 3) * x.roll(1, 2)))
        return planted(module, deep_linen(), images(), train=True)

    def deviation():
        torch.manual_seed(0)

        class MeanDeviation(flax_norms.HandNorm):
            def statistics(self, x):
                mean = x.mean(self.axes, keepdims=True)
                return mean, np.pi / 2 * abs(x - mean).mean(self.axes, keepdims=True) ** 2

        return planted(deep_torch(), deep_linen(bn2=hand_norm(MeanDeviation)), images(), train=True)

    def alone():
        torch.manual_seed(0)
        p = TorchChain({"fc": nn.Linear(6, 4)})
        wrong = function(lambda x: x + 0.01 * x[::-1] ** 2)
        return planted(p, LinenChain((layer(linen.Dense, 4), wrong)), vectors(6), train=True)

    yield "conv-noise", noise("params/Conv_1/kernel"), ("conv2",)
    yield "linear-noise", noise("params/Dense_1/kernel"), ("fc2",)
    yield "glue", rolled, ("pool2", "conv3")
    yield "norm", deviation, ("bn2",)
    yield "output", alone, ()


def cases() -> Iterator[Case]:
    """The single mistakes."""
    yield from nnx_cases()
    yield from initial_variance()
    yield from resnets()
