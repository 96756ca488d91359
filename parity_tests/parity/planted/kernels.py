"""Mistakes of convolutions and linear layers: converted weights, and what the layer does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from parity_tests.parity.planted.chain import (
    Case,
    LinenChain,
    TorchChain,
    change_torch,
    changed_variables,
    deep_linen,
    deep_torch,
    deep_variables,
    function,
    images,
    layer,
    native_norm,
    planted,
    vectors,
)
from parity_tests.parity.zoo.pair import conv, linear, linen_variables


def hwio(w):
    return w.transpose(2, 3, 1, 0)


def oihw(k):
    return k.transpose(3, 2, 0, 1)


# code, variant, (PyTorch's weight -> the kernel that a porter made of it, the other way: kernel -> weight)
CONV_CONVERSIONS: list[tuple[str, str, Callable, Callable]] = [
    ("kernel-layout", "reshaped", lambda w: w.reshape(*w.shape[2:], *w.shape[1::-1]),
     lambda k: k.reshape(oihw(k).shape)),
    ("kernel-layout", "in-out", lambda w: w.transpose(2, 3, 0, 1), lambda k: k.transpose(2, 3, 0, 1)),
    ("kernel-flipped", "weights", lambda w: hwio(w)[::-1, ::-1], lambda k: oihw(k[::-1, ::-1])),
    ("kernel-hw-swapped", "weights", lambda w: w.transpose(3, 2, 1, 0), lambda k: k.transpose(3, 2, 1, 0)),
]  # fmt: skip


def conversions() -> Iterator[Case]:
    """Weights converted wrongly: "flax" from PyTorch's (variables are wrong), "torch" from Flax's."""
    for code, variant, to_kernel, to_weight in CONV_CONVERSIONS:
        yield Case(code, "flax", "alone", variant, _conv_alone("flax", to_kernel), ("conv",))
        yield Case(code, "torch", "alone", variant, _conv_alone("torch", to_weight), ("conv",))
        yield Case(code, "flax", "deep", variant, _deep("flax", "conv2.weight", "Conv_1", to_kernel), ("conv2",))
        yield Case(code, "torch", "deep", variant, _deep("torch", "conv2.weight", "Conv_1", to_weight), ("conv2",))
    # A cube: three channels in and out, 3x3; as it is, nothing fits or does not fit
    yield Case("kernel-layout", "flax", "alone", "cube", _conv_alone("flax", lambda w: w, 3), ("conv",))
    yield Case("kernel-layout", "torch", "alone", "cube", _conv_alone("torch", lambda k: k, 3), ("conv",))
    for wing in ("flax", "torch"):
        yield Case("kernel-transposed", wing, "alone", "weights", _linear_alone(wing), ("fc",))
        make = _deep(wing, "fc2.weight", "Dense_1", lambda w: w)
        yield Case("kernel-transposed", wing, "deep", "weights", make, ("fc2",))
    for wing in ("flax", "torch"):
        make = _deep(wing, "fc1.weight", "Dense_0", np.transpose)
        yield Case("flatten-order", wing, "deep", "weights", make, ("fc1", "flatten"))
        yield Case("flatten-order", wing, "alone", "permuted", _flatten_alone(wing), ("fc", "flatten"))
    for wing in ("flax", "torch"):
        for code, change in (
            ("affine-missing", None),
            ("affine-swapped", "swap"),
        ):
            yield Case(code, wing, "deep", "variables", _affine(wing, change), ("bn2",))


def _conv_alone(wing: str, change: Callable, channels: int = 6) -> Callable:
    def make():
        torch.manual_seed(0)
        module = TorchChain({"conv": nn.Conv2d(channels, channels, 3, padding=1)})
        variables = linen_variables(module, [("conv", "Conv_0", conv)])
        if wing == "flax":
            weight = module.state_dict()["conv.weight"].numpy()
            variables = changed_variables(variables, "params/Conv_0/kernel", lambda _: change(weight))
        else:
            kernel = np.asarray(variables["params"]["Conv_0"]["kernel"])
            change_torch(module, "conv.weight", lambda _: change(kernel))
        part = layer(linen.Conv, channels, (3, 3))
        return planted(module, LinenChain((part,)), images(channels, 6), fresh=True, variables=variables, train=False)

    return make


def _linear_alone(wing: str) -> Callable:
    def make():
        torch.manual_seed(0)
        module = TorchChain({"fc": nn.Linear(9, 9)})
        variables = linen_variables(module, [("fc", "Dense_0", linear)])
        if wing == "flax":
            variables = changed_variables(variables, "params/Dense_0/kernel", np.transpose)
        else:
            change_torch(module, "fc.weight", np.transpose)
        part = layer(linen.Dense, 9)
        return planted(module, LinenChain((part,)), vectors(9), fresh=True, variables=variables, train=True)

    return make


def _deep(wing: str, name: str, path: str, change: Callable) -> Callable:
    def make():
        torch.manual_seed(0)
        p = planted(deep_torch(native_norm), deep_linen(), images(), train=False)
        variables = deep_variables(p.torch_module)
        if wing == "flax":
            weight = p.torch_module.state_dict()[name].numpy()
            variables = changed_variables(variables, f"params/{path}/kernel", lambda _: change(weight))
        else:
            kernel = np.asarray(variables["params"][path]["kernel"])
            change_torch(p.torch_module, name, lambda _: change(kernel))
        return p._replace(options=p.options | {"variables": variables})

    return make


def _flatten_alone(wing: str) -> Callable:
    """One side permutes before it flattens, and the matrix was carried over as if it had not (or the other way)."""

    def make():
        torch.manual_seed(0)
        flatten: Any = nn.Flatten()
        if wing == "torch":
            flatten = lambda x: x.permute(0, 2, 3, 1).flatten(1)  # noqa: E731
            flat = function(lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1))
        else:
            flat = function(lambda x: x.reshape(len(x), -1))
        module = TorchChain({"conv": nn.Conv2d(3, 4, 3), "flatten": flatten, "fc": nn.Linear(4 * 4 * 5, 6)})
        table = [("conv", "Conv_0", conv), ("fc", "Dense_0", linear)]
        parts = (layer(linen.Conv, 4, (3, 3), padding="VALID"), flat, layer(linen.Dense, 6))
        x = np.random.default_rng(0).normal(size=(8, 3, 6, 7)).astype(np.float32)
        return planted(module, LinenChain(parts), x, variables=linen_variables(module, table), train=True, fresh=True)

    return make


def _affine(wing: str, change: str | None) -> Callable:
    def make():
        torch.manual_seed(0)
        p = planted(deep_torch(native_norm), deep_linen(), images(), train=False)
        variables = deep_variables(p.torch_module)
        state = {k: v.clone() for k, v in p.torch_module.state_dict().items()}
        gamma, beta = state["bn2.weight"].numpy(), state["bn2.bias"].numpy()
        gamma, beta = (beta, gamma) if change == "swap" else (np.ones(6, "f"), np.zeros(6, "f"))
        if wing == "flax":
            variables = changed_variables(variables, "params/BatchNorm_1/scale", lambda _: gamma)
            variables = changed_variables(variables, "params/BatchNorm_1/bias", lambda _: beta)
        else:
            change_torch(p.torch_module, "bn2.weight", lambda _: gamma)
            change_torch(p.torch_module, "bn2.bias", lambda _: beta)
        return p._replace(options=p.options | {"variables": variables})

    return make


# What the layer does


class WrongConv2d(nn.Conv2d):
    """Its kernel changed by the arithmetic."""

    def __init__(self, *args: Any, change: Callable, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.change = change

    def forward(self, x):
        return self._conv_forward(x, self.change(self.weight), self.bias)


class OneSidedConv2d(nn.Conv2d):
    """Padded below and at the right only, as TensorFlow's SAME does with a stride of 2."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class WrongLinear(nn.Linear):
    def forward(self, x):
        return x @ self.weight + self.bias


class HandConv(linen.Module):
    """A convolution by hand, its kernel and inputs changed by a function."""

    features: int
    change: Callable = staticmethod(lambda k: k)
    rounded: Callable = staticmethod(lambda x: x)

    @linen.compact
    def __call__(self, x):
        kernel = self.param("kernel", linen.initializers.lecun_normal(), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", linen.initializers.zeros, (self.features,))
        numbers = ("NHWC", "HWIO", "NHWC")
        x, kernel = self.rounded(x), self.rounded(self.change(kernel))
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers) + bias


class HandDense(linen.Module):
    features: int
    transposed: bool = False
    bfloat16: bool = False

    @linen.compact
    def __call__(self, x):
        kernel = self.param("kernel", linen.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", linen.initializers.zeros, (self.features,))
        kernel = kernel.T if self.transposed else kernel
        if self.bfloat16:
            product = jnp.dot(x.astype("bfloat16"), kernel.astype("bfloat16"), preferred_element_type=jnp.float32)
            return product.astype(x.dtype) + bias
        return jnp.dot(x, kernel) + bias


def tf32_jax(x):
    """Ten bits of mantissa, as an accelerator's multiplier takes them."""
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x).astype(jnp.float32), jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), jnp.float32)
    return x + (rounded.astype(x.dtype) - jax.lax.stop_gradient(x))


def tf32_torch(x):
    bits = x.detach().float().contiguous().view(torch.int32)
    return x + (((bits + 0x1000) & -0x2000).view(torch.float32).to(x.dtype) - x.detach())


class Tf32Conv2d(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(tf32_torch(x), tf32_torch(self.weight), self.bias)


class Bfloat16Linear(nn.Linear):
    def forward(self, x):
        product = x.bfloat16().float() @ self.weight.bfloat16().float().T
        return product.to(x.dtype) + self.bias


def _torch_conv(channels: int, **kwargs: Any) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, **{"padding": 1, **kwargs})


def _conv2(**kwargs: Any) -> Callable:
    return layer(linen.Conv, 6, (3, 3), **{"padding": 1, **kwargs})


FLIP_T = lambda w: w.flip(2, 3)  # noqa: E731
FLIP_F = lambda k: k[::-1, ::-1]  # noqa: E731
SWAP_T = lambda w: w.transpose(2, 3)  # noqa: E731
SWAP_F = lambda k: k.swapaxes(0, 1)  # noqa: E731
STRIDE_2 = {"strides": (2, 2)}

# code, wing, variant, PyTorch's layer (its channels), Flax's part; in place of a convolution 6 -> 6
LAYERS: list[tuple[str, str, str, Callable[[int], nn.Module], Callable]] = [
    ("kernel-flipped", "torch", "arithmetic", lambda c: WrongConv2d(c, c, 3, padding=1, change=FLIP_T), _conv2()),
    ("kernel-flipped", "flax", "arithmetic", _torch_conv, layer(HandConv, 6, FLIP_F)),
    ("kernel-hw-swapped", "torch", "arithmetic", lambda c: WrongConv2d(c, c, 3, padding=1, change=SWAP_T), _conv2()),
    ("kernel-hw-swapped", "flax", "arithmetic", _torch_conv, layer(HandConv, 6, SWAP_F)),
    ("padding", "flax", "same-for-explicit", lambda c: _torch_conv(c, stride=2), _conv2(padding="SAME", **STRIDE_2)),
    ("padding", "torch", "one-sided", lambda c: OneSidedConv2d(c, c, 3, stride=2), _conv2(**STRIDE_2)),
    ("padding", "torch", "circular", lambda c: _torch_conv(c, padding_mode="circular"), _conv2()),
    ("padding", "torch", "reflect", lambda c: _torch_conv(c, padding_mode="reflect"), _conv2()),
    ("padding", "flax", "circular", _torch_conv, _conv2(padding="CIRCULAR")),
    ("dilation", "torch", "", lambda c: _torch_conv(c, dilation=2, padding=2), _conv2()),
    ("dilation", "flax", "", _torch_conv, _conv2(kernel_dilation=(2, 2), padding="SAME")),
    ("bias-missing", "torch", "conv", lambda c: _torch_conv(c, bias=False), _conv2()),
    ("bias-missing", "flax", "conv", _torch_conv, _conv2(use_bias=False)),
    ("matmul-precision", "torch", "tf32", lambda c: Tf32Conv2d(c, c, 3, padding=1), _conv2()),
    ("matmul-precision", "flax", "tf32", _torch_conv, layer(HandConv, 6, lambda k: k, tf32_jax)),
]  # fmt: skip
# The output has another shape, so that nothing can follow in the same network but what pools over all
SHAPES: list[tuple[str, str, str, Callable[[int], nn.Module], Callable]] = [
    ("padding", "flax", "none", _torch_conv, _conv2(padding="VALID")),
    ("padding", "torch", "none", lambda c: _torch_conv(c, padding=0), _conv2()),
    ("stride", "flax", "", _torch_conv, _conv2(**STRIDE_2)),
    ("stride", "torch", "", lambda c: _torch_conv(c, stride=2), _conv2()),
    ("dilation", "flax", "same-padding", _torch_conv, _conv2(kernel_dilation=(2, 2))),
]
LINEARS: list[tuple[str, str, str, Callable[[int], nn.Module], Callable]] = [
    ("kernel-transposed", "torch", "arithmetic", lambda c: WrongLinear(c, c), layer(linen.Dense, 16)),
    ("kernel-transposed", "flax", "arithmetic", lambda c: nn.Linear(c, c), layer(HandDense, 16, True)),
    ("bias-missing", "torch", "linear", lambda c: nn.Linear(c, c, bias=False), layer(linen.Dense, 16)),
    ("bias-missing", "flax", "linear", lambda c: nn.Linear(c, c), layer(linen.Dense, 16, use_bias=False)),
    ("matmul-precision", "torch", "bfloat16", lambda c: Bfloat16Linear(c, c), layer(linen.Dense, 16)),
    ("matmul-precision", "flax", "bfloat16", lambda c: nn.Linear(c, c), layer(HandDense, 16, False, True)),
    ("matmul-precision", "flax", "dtype", lambda c: nn.Linear(c, c),
     lambda x, train: linen.Dense(16, dtype=jnp.bfloat16)(x).astype(x.dtype)),
]  # fmt: skip


def layers() -> Iterator[Case]:
    """Layers that do something else."""
    for i, (code, wing, variant, make_torch, part) in enumerate((*LAYERS, *SHAPES)):
        phase = None if code == "bias-missing" and wing == "torch" else "forward"
        yield Case(code, wing, "alone", variant, _alone("conv", make_torch, part, images(6, 8)), ("conv",), phase)
        pooled = i >= len(LAYERS)
        yield Case(code, wing, "deep", variant, _in_deep("conv2", make_torch, part, 6, pooled), ("conv2",), phase)
    for code, wing, variant, make_torch, part in LINEARS:
        phase = None if code == "bias-missing" and wing == "torch" else "forward"
        yield Case(code, wing, "alone", variant, _alone("fc", make_torch, part, vectors(16)), ("fc",), phase)
        yield Case(code, wing, "deep", variant, _in_deep("fc2", make_torch, part, 16, False), ("fc2",), phase)


def _alone(name: str, make_torch: Callable, part: Callable, x: Any) -> Callable:
    def make():
        torch.manual_seed(0)
        module = TorchChain({name: make_torch(x.shape[1])})
        return planted(module, LinenChain((part,)), x, train=True)

    return make


def _in_deep(name: str, make_torch: Callable, part: Callable, width: int, pooled: bool) -> Callable:
    def make():
        torch.manual_seed(0)
        torch_changed: dict[str, Any] = {name: make_torch(width)}
        flax_changed: dict[str, Any] = {name: part}
        strided = getattr(torch_changed[name], "stride", None) == (2, 2) and not pooled
        if strided:  # 12 -> 6 there, in place of the pool
            torch_changed["pool2"], flax_changed["pool2"] = nn.Identity(), function(lambda x: x)
        if pooled:  # whatever the size is, its mean is taken
            torch_changed |= {"flatten": lambda x: x.mean((2, 3)), "fc1": nn.Linear(8, 16)}
            flax_changed |= {"flatten": function(lambda x: x.mean((1, 2)))}
        train = width == 6
        module = deep_torch(**torch_changed) if train else deep_torch(native_norm, **torch_changed)
        return planted(module, deep_linen(**flax_changed), images(), train=train)

    return make


def cases() -> Iterator[Case]:
    """All of them."""
    yield from conversions()
    yield from layers()
