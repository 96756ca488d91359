"""Mistakes of batch norm: conventions, mode, axes, epsilon, parameters, derivative, devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as linen
import jax.numpy as jnp
import torch
from torch import nn

import jax_bn
import torch_bn
from parity_tests.parity.planted import flax_norms, torch_norms
from parity_tests.parity.planted.chain import (
    Case,
    LinenChain,
    TorchChain,
    deep_linen,
    deep_torch,
    flax_norm,
    hand_norm,
    images,
    layer,
    native_norm,
    planted,
    vectors,
)
from parity_tests.parity.zoo.others import own_norm


class TorchOffset(torch_norms.HandNorm):
    """The scale is gamma - 1."""

    def affine(self, x_hat):
        return super().affine(x_hat) + x_hat


class FlaxOffset(flax_norms.HandNorm):
    """The scale is gamma - 1."""

    def affine(self, x_hat, scale, bias):
        return x_hat * (1 + scale) + bias


class TorchOffsetRMSNorm(nn.RMSNorm):
    """As Gemma's."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class FlaxOffsetRMSNorm(linen.Module):
    """As Gemma's."""

    epsilon: float

    @linen.compact
    def __call__(self, x):
        scale = self.param("scale", linen.initializers.zeros, x.shape[-1:])
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) * (1 + scale)


class Mistake(NamedTuple):
    """A wrong norm in one wing, the right one in the other, for blocks and alone."""

    code: str
    wing: str
    variant: str
    wrong: Callable[..., Any]
    mode: str
    phase: str | None
    right_torch: Callable[[int], nn.Module] = own_norm
    right_flax: Callable = flax_norm
    also: tuple[str, ...] = ()
    fresh: bool = False


def pytorch_norm(x, train):
    """PyTorch's convention in Flax."""
    return jax_bn.BatchNorm(use_running_average=not train, momentum=0.9, unbiased_moving_var=True)(x)


def biased_native(channels: int) -> nn.Module:
    return torch_norms.BiasedBatchNorm2d(channels)


def linen_norm(**kwargs: Any) -> Callable:
    return lambda x, train: linen.BatchNorm(use_running_average=not train, **{"momentum": 0.9, **kwargs})(x)


def own(**kwargs: Any) -> Callable[[int], nn.Module]:
    return lambda c: torch_bn.BatchNorm(num_features=c, num_dims=4, **{"initial_moving_var": 1.0, **kwargs})


def torch_hand(make: type[nn.Module], **kwargs: Any) -> Callable[[int], nn.Module]:
    return lambda c: make(c, **kwargs)


def native(**kwargs: Any) -> Callable[[int], nn.Module]:
    return lambda c: nn.BatchNorm2d(c, **kwargs)


T, F = torch_norms, flax_norms
NATIVE = {"right_torch": native_norm}
MOVING = ("statistics-frozen",)  # who never looks at the batch keeps the statistics as well
MISTAKES = [
    # statistics
    Mistake("momentum-inverted", "torch", "native", native(momentum=0.9), "train", "statistics", native_norm,
            pytorch_norm),
    Mistake("momentum-inverted", "torch", "hand", torch_hand(T.HandNorm, momentum=0.1), "train", "statistics"),
    Mistake("momentum-inverted", "flax", "linen", linen_norm(momentum=0.1), "train", "statistics"),
    Mistake("momentum-inverted", "flax", "hand", hand_norm(F.HandNorm, momentum=0.01), "train", "statistics",
            own(momentum=0.99), linen_norm(momentum=0.99)),
    Mistake("momentum", "torch", "", own(momentum=0.99), "train", "statistics"),
    Mistake("momentum", "flax", "", linen_norm(momentum=0.99), "train", "statistics"),
    Mistake("unbiased-variance", "torch", "native", native_norm, "train", "statistics"),
    Mistake("unbiased-variance", "torch", "hand", torch_hand(T.Unbiased), "train", "statistics"),
    Mistake("unbiased-variance", "flax", "own", pytorch_norm, "train", "statistics"),
    Mistake("unbiased-variance", "flax", "hand", hand_norm(F.Unbiased), "train", "statistics", biased_native),
    Mistake("variance-ddof", "torch", "", torch_hand(T.Ddof), "train", "forward"),
    Mistake("variance-ddof", "flax", "", hand_norm(F.Ddof), "train", "forward"),
    Mistake("statistics-frozen", "torch", "hand", torch_hand(T.Frozen), "train", "statistics"),
    Mistake("statistics-frozen", "torch", "momentum-0", native(momentum=0.0), "train", "statistics", native_norm,
            pytorch_norm),
    Mistake("statistics-frozen", "flax", "hand", hand_norm(F.Frozen), "train", "statistics"),
    Mistake("statistics-frozen", "flax", "momentum-1", linen_norm(momentum=1.0), "train", "statistics", biased_native),
    # epsilon
    Mistake("epsilon", "torch", "eval", native(eps=1e-3), "eval", "forward", native_norm),
    Mistake("epsilon", "torch", "train", own(eps=1e-3), "train", "forward"),
    Mistake("epsilon", "torch", "1e-6", torch_hand(T.HandNorm, eps=1e-6), "train", "forward"),
    Mistake("epsilon", "flax", "eval", linen_norm(epsilon=1e-3), "eval", "forward", native_norm),
    Mistake("epsilon", "flax", "train", linen_norm(epsilon=1e-3), "train", "forward"),
    Mistake("epsilon", "flax", "1e-8", hand_norm(F.HandNorm, eps=1e-8), "eval", "forward", native_norm),
    Mistake("epsilon-outside-sqrt", "torch", "eval", torch_hand(T.EpsOutside), "eval", "forward"),
    Mistake("epsilon-outside-sqrt", "torch", "train", torch_hand(T.EpsOutside), "train", "forward"),
    Mistake("epsilon-outside-sqrt", "torch", "large", torch_hand(T.EpsOutside, eps=1e-3), "train", "forward",
            own(eps=1e-3), linen_norm(epsilon=1e-3)),
    Mistake("epsilon-outside-sqrt", "flax", "eval", hand_norm(F.EpsOutside), "eval", "forward", native_norm),
    Mistake("epsilon-outside-sqrt", "flax", "train", hand_norm(F.EpsOutside), "train", "forward"),
    # mode
    Mistake("eval-uses-batch-statistics", "torch", "hand", torch_hand(T.AlwaysBatch), "eval", "forward"),
    Mistake("eval-uses-batch-statistics", "torch", "subclass", torch_hand(T.ModeIgnored), "eval", "forward"),
    Mistake("eval-uses-batch-statistics", "torch", "untracked", native(track_running_stats=False), "eval", "forward"),
    Mistake("eval-uses-batch-statistics", "flax", "linen",
            lambda x, train: linen.BatchNorm(False, momentum=0.9)(x), "eval", "forward", native_norm),
    Mistake("eval-uses-batch-statistics", "flax", "hand", hand_norm(F.AlwaysBatch), "eval", "forward", native_norm),
    Mistake("train-uses-moving-statistics", "torch", "hand", torch_hand(T.AlwaysMoving), "train", "forward",
            also=MOVING),
    Mistake("train-uses-moving-statistics", "torch", "subclass", torch_hand(T.StaysInEval), "train", "forward",
            also=MOVING),
    Mistake("train-uses-moving-statistics", "flax", "linen",
            lambda x, train: linen.BatchNorm(True)(x), "train", "forward",
            also=MOVING),
    Mistake("train-uses-moving-statistics", "flax", "hand", hand_norm(F.AlwaysMoving), "train", "forward",
            biased_native, also=MOVING),
    # axes
    *(
        Mistake("wrong-reduction-axes", wing, variant, wrong, "train", "forward")
        for wing, variant, wrong in (
            ("torch", "row", torch_hand(T.PerRow)),
            ("torch", "pixel", torch_hand(T.PerPixel)),
            ("torch", "image", torch_hand(T.PerImage)),
            ("flax", "row", hand_norm(F.PerRow)),
            ("flax", "pixel", hand_norm(F.PerPixel)),
            ("flax", "image", hand_norm(F.PerImage)),
            ("torch", "instance-norm", lambda c: nn.InstanceNorm2d(c, affine=True)),
        )
    ),
    # parameters
    Mistake("affine-swapped", "torch", "arithmetic", torch_hand(T.Swapped), "train", "forward"),
    Mistake("affine-swapped", "flax", "arithmetic", hand_norm(F.Swapped), "eval", "forward", native_norm),
    Mistake("affine-missing", "torch", "native", native(affine=False), "eval", None, native_norm),
    Mistake("affine-missing", "torch", "arithmetic", torch_hand(T.NoAffine), "train", "forward"),
    Mistake("affine-missing", "flax", "linen", linen_norm(use_scale=False, use_bias=False), "eval", "forward",
            native_norm),
    Mistake("affine-missing", "flax", "arithmetic", hand_norm(F.NoAffine), "train", "forward"),
    Mistake("bias-missing", "torch", "norm", own(use_bias=False), "train", None),
    Mistake("bias-missing", "torch", "norm-arithmetic", torch_hand(T.NoBeta), "train", "forward"),
    Mistake("bias-missing", "flax", "norm", linen_norm(use_bias=False), "eval", "forward", native_norm),
    Mistake("bias-missing", "flax", "norm-arithmetic", hand_norm(F.NoBeta), "train", "forward"),
    Mistake("norm-offset", "torch", "batch-norm", torch_hand(TorchOffset), "train", "forward"),
    Mistake("norm-offset", "flax", "batch-norm", hand_norm(FlaxOffset), "eval", "forward", native_norm),
    # derivative and devices
    Mistake("stopped-statistics-gradient", "torch", "both", torch_hand(T.Stopped), "train", "backward"),
    Mistake("stopped-statistics-gradient", "torch", "variance", torch_hand(T.StoppedVariance), "train", "backward"),
    Mistake("stopped-statistics-gradient", "torch", "no-grad", torch_hand(T.StoppedNoGrad), "train", "backward",
            native_norm, pytorch_norm),
    Mistake("stopped-statistics-gradient", "flax", "both", hand_norm(F.Stopped), "train", "backward"),
    Mistake("stopped-statistics-gradient", "flax", "mean", hand_norm(F.StoppedMean), "train", "backward",
            biased_native),
    Mistake("per-device-statistics", "torch", "2", torch_hand(T.PerDevice), "train", "forward"),
    Mistake("per-device-statistics", "torch", "4", torch_hand(T.PerFourDevices), "train", "forward"),
    Mistake("per-device-statistics", "torch", "first-kept", torch_hand(T.PerDeviceFirstKept), "train", "forward"),
    Mistake("per-device-statistics", "flax", "2", hand_norm(F.PerDevice), "train", "forward"),
    Mistake("per-device-statistics", "flax", "4", hand_norm(F.PerFourDevices), "train", "forward", biased_native),
    Mistake("per-device-statistics", "flax", "first-kept", hand_norm(F.PerDeviceFirstKept), "train", "forward"),
]  # fmt: skip


def alone(mistake: Mistake) -> Case:
    def make():
        torch.manual_seed(0)
        torch_norm = mistake.wrong if mistake.wing == "torch" else mistake.right_torch
        linen_part = mistake.wrong if mistake.wing == "flax" else mistake.right_flax
        x = 1.5 * images(6, 5) + 0.3
        module = TorchChain({"norm": torch_norm(6)})
        return planted(module, LinenChain((linen_part,)), x, train=mistake.mode == "train")

    also = mistake.also
    return Case(mistake.code, mistake.wing, "alone", mistake.variant, make, ("norm",), mistake.phase, also)


def deep(mistake: Mistake, block: int = 2) -> Case:
    def make():
        torch.manual_seed(0)
        changed = {f"bn{block}": None}
        if mistake.wing == "torch":
            changed[f"bn{block}"] = mistake.wrong(8 if block == 3 else 6)
            module, flax_module = deep_torch(mistake.right_torch, **changed), deep_linen(mistake.right_flax)
        else:
            changed[f"bn{block}"] = mistake.wrong
            module = deep_torch(mistake.right_torch)
            flax_module = deep_linen(mistake.right_flax, **changed)
        return planted(module, flax_module, images(), train=mistake.mode == "train")

    also = mistake.also
    return Case(mistake.code, mistake.wing, "deep", mistake.variant, make, (f"bn{block}",), mistake.phase, also)


def everywhere(mistake: Mistake) -> Case:
    """Every norm of the network is wrong: the first is charged first (of a stopped gradient, the last)."""
    case = deep(mistake)

    def make():
        torch.manual_seed(0)
        if mistake.wing == "torch":
            module, flax_module = deep_torch(mistake.wrong), deep_linen(mistake.right_flax)
        else:
            module, flax_module = deep_torch(mistake.right_torch), deep_linen(mistake.wrong)
        return planted(module, flax_module, images(), train=mistake.mode == "train")

    first = "bn3" if mistake.phase == "backward" else "bn1"
    return case._replace(make=make, layers=(first,), variant="-".join(filter(None, (mistake.variant, "everywhere"))))


def offset_rms_norms() -> Iterator[Case]:
    """An RMS norm alone, and behind the first linear layer of the deep chain."""
    names = list(deep_torch().order)
    order = [*names[: names.index("act4")], "rms", *names[names.index("act4") :]]

    def make(wing: str, depth: str):
        def build():
            torch.manual_seed(0)
            wrong = wing == "torch", wing == "flax"
            torch_part = (TorchOffsetRMSNorm if wrong[0] else nn.RMSNorm)(16, eps=1e-6)
            flax_part = layer(FlaxOffsetRMSNorm if wrong[1] else linen.RMSNorm, epsilon=1e-6)
            if depth == "alone":
                return planted(TorchChain({"rms": torch_part}), LinenChain((flax_part,)), vectors(16), train=True)
            module, flax_module = deep_torch(rms=torch_part, order=order), deep_linen(rms=flax_part, order=order)
            return planted(module, flax_module, images(), train=True)

        return build

    for wing in ("torch", "flax"):
        for depth in ("alone", "deep"):
            yield Case("norm-offset", wing, depth, "rms-norm", make(wing, depth), ("rms",))


class TorchDeviationNorm(nn.Module):
    """Layer norm by `x.std(-1)`, which divides by n - 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        x_hat = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)
        return self.weight * x_hat + self.bias


class FlaxDeviationNorm(linen.Module):
    """The same, with `ddof=1`."""

    @linen.compact
    def __call__(self, x):
        scale = self.param("scale", linen.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", linen.initializers.zeros, (x.shape[-1],))
        x_hat = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5)
        return scale * x_hat + bias


def deviation_norms() -> Iterator[Case]:
    """A layer norm by hand, alone and behind the first linear layer of the deep chain."""
    names = list(deep_torch().order)
    order = [*names[: names.index("act4")], "ln", *names[names.index("act4") :]]

    def make(wing: str, depth: str):
        def build():
            torch.manual_seed(0)
            torch_part = TorchDeviationNorm(16) if wing == "torch" else nn.LayerNorm(16)
            flax_part = layer(FlaxDeviationNorm) if wing == "flax" else layer(linen.LayerNorm, epsilon=1e-5)
            if depth == "alone":
                return planted(TorchChain({"ln": torch_part}), LinenChain((flax_part,)), vectors(16), train=True)
            module, flax_module = deep_torch(ln=torch_part, order=order), deep_linen(ln=flax_part, order=order)
            return planted(module, flax_module, images(), train=True)

        return build

    for wing in ("torch", "flax"):
        for depth in ("alone", "deep"):
            yield Case("variance-ddof", wing, depth, "layer-norm", make(wing, depth), ("ln",))


EVERYWHERE = (
    "momentum-inverted",
    "unbiased-variance",
    "epsilon",
    "stopped-statistics-gradient",
    "per-device-statistics",
)


def cases() -> Iterator[Case]:
    """All of them."""
    seen: set[tuple[str, str]] = set()
    for i, mistake in enumerate(MISTAKES):
        yield alone(mistake)
        yield deep(mistake, 1 + i % 3)
        if mistake.code in EVERYWHERE and (mistake.code, mistake.wing) not in seen:
            seen.add((mistake.code, mistake.wing))
            yield everywhere(mistake)
    yield from offset_rms_norms()
    yield from deviation_norms()
