"""Mistakes of the loss and of the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from parity_tests.parity.planted.chain import (
    Case,
    LinenChain,
    TorchChain,
    deep_linen,
    deep_torch,
    function,
    images,
    layer,
    planted,
    vectors,
)

LABELS = np.arange(8) % 4


def small(**options: Any):
    torch.manual_seed(0)
    module = TorchChain({"fc1": nn.Linear(6, 12), "act": nn.Tanh(), "fc2": nn.Linear(12, 5)})
    parts = (layer(linen.Dense, 12), function(jnp.tanh), layer(linen.Dense, 5))
    return planted(module, LinenChain(parts), vectors(6), train=True, **options)


def deep(**options: Any):
    torch.manual_seed(0)
    return planted(deep_torch(), deep_linen(), images(), train=True, **options)


def cross_entropy(shift: int = 0, reduction: str = "mean") -> Callable:
    return lambda out: F.cross_entropy(out, torch.from_numpy(LABELS + shift), reduction=reduction)


def optax_cross_entropy(shift: int = 0, reduce: Callable = jnp.mean) -> Callable:
    return lambda out: reduce(optax.softmax_cross_entropy_with_integer_labels(out, jnp.asarray(LABELS + shift)))


TARGETS = np.random.default_rng(5).normal(size=(8, 5)).astype(np.float32)


def squares(reduction: str) -> Callable:
    return lambda out: F.mse_loss(out, torch.from_numpy(TARGETS).to(out), reduction=reduction)


def optax_squares(reduce: Callable) -> Callable:
    return lambda out: reduce((out - jnp.asarray(TARGETS, out.dtype)) ** 2)


PADDED = np.where(np.arange(8) % 4 == 2, -100, LABELS)


def padded_cross_entropy(labels: np.ndarray = PADDED) -> Callable:
    """The mean over the labels that are not -100."""
    return lambda out: F.cross_entropy(out, torch.from_numpy(labels))


def padded_optax(reduce: Callable, counted: np.ndarray = PADDED >= 0) -> Callable:
    def loss(out):
        each = optax.softmax_cross_entropy_with_integer_labels(out, jnp.asarray(np.maximum(PADDED, 0)))
        return reduce(jnp.where(jnp.asarray(counted), each, 0.0))

    return loss


DELTA = 0.25


def smooth_l1() -> tuple[Callable, Callable]:
    """With beta, on either side."""

    def in_jax(out):
        x = jnp.abs(out - jnp.asarray(TARGETS, out.dtype))
        return jnp.where(x < DELTA, x * x / (2 * DELTA), x - DELTA / 2).mean()

    return lambda out: F.smooth_l1_loss(out, torch.from_numpy(TARGETS).to(out), beta=DELTA), in_jax


def huber() -> tuple[Callable, Callable]:
    """With delta, on either side."""
    return (
        lambda out: F.huber_loss(out, torch.from_numpy(TARGETS).to(out), delta=DELTA),
        lambda out: optax.huber_loss(out, jnp.asarray(TARGETS, out.dtype), delta=DELTA).mean(),
    )


# code, wing, variant, the losses
LOSSES: list[tuple[str, str, str, tuple[Callable, Callable]]] = [
    ("loss-reduction", "torch", "sum", (cross_entropy(reduction="sum"), optax_cross_entropy())),
    ("loss-reduction", "flax", "sum", (cross_entropy(), optax_cross_entropy(reduce=jnp.sum))),
    ("loss-reduction", "torch", "squares", (squares("sum"), optax_squares(jnp.mean))),
    ("loss-reduction", "flax", "squares", (squares("mean"), optax_squares(lambda v: v.sum(-1).mean()))),
    ("huber-delta", "torch", "", (huber()[0], smooth_l1()[1])),
    ("huber-delta", "flax", "", (smooth_l1()[0], huber()[1])),
    (
        "ignore-index",
        "torch",
        "counted",
        (padded_cross_entropy(np.maximum(PADDED, 0)), padded_optax(lambda v: v.sum() / 6)),
    ),
    ("ignore-index", "flax", "counted", (padded_cross_entropy(), padded_optax(jnp.mean, np.full(8, True)))),
    (
        "ignore-index",
        "torch",
        "mean",
        (
            lambda out: F.cross_entropy(out, torch.from_numpy(PADDED), reduction="none").mean(),
            padded_optax(lambda v: v.sum() / 6),
        ),
    ),
    ("ignore-index", "flax", "mean", (padded_cross_entropy(), padded_optax(jnp.mean))),
    ("label-offset", "torch", "", (cross_entropy(1), optax_cross_entropy())),
    ("label-offset", "flax", "", (cross_entropy(), optax_cross_entropy(1))),
    (
        "label-offset",
        "flax",
        "one-hot",
        (
            cross_entropy(),
            lambda out: optax.softmax_cross_entropy(out, jax.nn.one_hot(LABELS + 1, 5, dtype=out.dtype)).mean(),
        ),
    ),
]


class TorchAdam(torch.optim.Optimizer):
    """Adam by hand, with the ways to write it otherwise."""

    def __init__(self, params, lr=1e-2, eps=1e-8, inside=False, corrected=True) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "inside": inside, "corrected": corrected})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 0.1)
                state["exp_avg_sq"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                t = state["step"] if group["corrected"] else 10**9
                m, v = state["exp_avg"] / (1 - 0.9**t), state["exp_avg_sq"] / (1 - 0.999**t)
                root = (v + group["eps"]).sqrt() if group["inside"] else v.sqrt() + group["eps"]
                p.sub_(group["lr"] * m / root)


class Moments(NamedTuple):
    mu: Any
    nu: Any


def adam_without_correction(rate: float) -> optax.GradientTransformation:
    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Moments(zeros, zeros)

    def update(grads, state, params=None):
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state.nu, grads)
        return jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + 1e-8), mu, nu), Moments(mu, nu)

    return optax.GradientTransformation(init, update)


class Buffer(NamedTuple):
    count: Any
    trace: Any


def dampened(rate: float) -> optax.GradientTransformation:
    """PyTorch's dampening, which leaves the first step alone."""

    def init(params):
        return Buffer(0, jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        new = jax.tree.map(lambda b, g: jnp.where(state.count == 0, g, 0.9 * b + 0.1 * g), state.trace, grads)
        return jax.tree.map(lambda b: -rate * b, new), Buffer(state.count + 1, new)

    return optax.GradientTransformation(init, update)


def _torch(make: Callable, **kwargs: Any) -> Callable:
    return lambda params: make(params, **kwargs)


def clipped(make: Callable, clip: Callable) -> Callable:
    """With gradients clipped before every step."""

    def factory(params):
        params = list(params)
        optimizer = make(params)

        def before_step(*_) -> None:
            clip(params)

        optimizer.register_step_pre_hook(before_step)
        return optimizer

    return factory


def to_norm(params: list) -> None:
    """As optax does it; torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm."""
    norm = torch.sqrt(sum(p.grad.square().sum() for p in params))
    for p in params:
        p.grad.mul_(torch.clamp(1 / norm, max=1.0))


def to_norm_each(params: list) -> None:
    for p in params:
        to_norm([p])


def to_norm_added(params: list) -> None:
    torch.nn.utils.clip_grad_norm_(params, 1.0)


def to_value(params: list) -> None:
    torch.nn.utils.clip_grad_value_(params, 0.5)


ADAM, SGD = torch.optim.Adam, torch.optim.SGD
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
# code, wing, variant, (PyTorch's, optax's)
OPTIMIZERS: list[tuple[str, str, str, tuple[Callable, optax.GradientTransformation]]] = [
    ("gradient-clipping", "torch", "none",
     (_torch(ADAM, lr=1e-2), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)))),
    ("gradient-clipping", "torch", "added",
     (clipped(_torch(SGD, **MOMENTUM), to_norm_added),
      optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)))),
    ("gradient-clipping", "torch", "each",
     (clipped(_torch(ADAM, lr=1e-2), to_norm_each), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)))),
    ("gradient-clipping", "torch", "value",
     (clipped(_torch(SGD, lr=0.1), to_value), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)))),
    ("gradient-clipping", "flax", "none", (clipped(_torch(SGD, lr=0.1), to_norm), optax.sgd(0.1))),
    ("gradient-clipping", "flax", "value",
     (clipped(_torch(ADAM, lr=1e-2), to_norm), optax.chain(optax.clip(0.5), optax.adam(1e-2)))),
    ("gradient-clipping", "flax", "behind",
     (clipped(_torch(SGD, **MOMENTUM), to_norm),
      optax.chain(optax.sgd(0.1, momentum=0.9), optax.clip_by_global_norm(1.0)))),
    ("gradient-clipping", "flax", "decay-before",
     (clipped(_torch(SGD, weight_decay=0.01, **MOMENTUM), to_norm),
      optax.chain(optax.add_decayed_weights(0.01), optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)))),
    ("adam-epsilon", "torch", "value", (_torch(ADAM, lr=1e-2, eps=1e-4), optax.adam(1e-2))),
    ("adam-epsilon", "flax", "value", (_torch(ADAM, lr=1e-2), optax.adam(1e-2, eps=1e-3))),
    ("adam-epsilon", "torch", "inside", (_torch(TorchAdam, inside=True, eps=1e-6), optax.adam(1e-2, eps=1e-6))),
    ("adam-epsilon", "flax", "inside", (_torch(ADAM, lr=1e-2), optax.adam(1e-2, eps=0.0, eps_root=1e-8))),
    ("bias-correction", "torch", "", (_torch(TorchAdam, corrected=False), optax.adam(1e-2))),
    ("bias-correction", "flax", "", (_torch(ADAM, lr=1e-2), adam_without_correction(1e-2))),
    ("weight-decay-coupling", "torch", "",
     (_torch(ADAM, lr=1e-2, weight_decay=0.1), optax.adamw(1e-2, weight_decay=0.1))),
    ("weight-decay-coupling", "flax", "", (_torch(torch.optim.AdamW, lr=1e-2, weight_decay=0.05),
     optax.chain(optax.add_decayed_weights(0.05), optax.adam(1e-2)))),
    ("momentum-dampening", "torch", "", (_torch(SGD, dampening=0.9, **MOMENTUM), optax.sgd(0.1, momentum=0.9))),
    ("momentum-dampening", "torch", "half", (_torch(SGD, dampening=0.5, **MOMENTUM), optax.sgd(0.1, momentum=0.9))),
    ("momentum-dampening", "flax", "", (_torch(SGD, **MOMENTUM), dampened(0.1))),
    ("nesterov", "torch", "", (_torch(SGD, nesterov=True, **MOMENTUM), optax.sgd(0.1, momentum=0.9))),
    ("nesterov", "flax", "", (_torch(SGD, **MOMENTUM), optax.sgd(0.1, momentum=0.9, nesterov=True))),
    ("learning-rate", "torch", "sgd", (_torch(SGD, lr=0.01), optax.sgd(0.1))),
    ("learning-rate", "flax", "sgd", (_torch(SGD, lr=0.1), optax.sgd(0.05))),
    ("learning-rate", "torch", "adam", (_torch(ADAM, lr=1e-3), optax.adam(1e-2))),
    ("learning-rate", "flax", "adamw",
     (_torch(torch.optim.AdamW, lr=1e-3, weight_decay=0.01), optax.adamw(2e-3, weight_decay=0.01))),
    ("learning-rate", "flax", "momentum", (_torch(SGD, **MOMENTUM), optax.sgd(0.2, momentum=0.9))),
]  # fmt: skip
# The same optimiser on both sides
RIGHT: dict[str, tuple[Callable, optax.GradientTransformation]] = {
    "sgd": (_torch(SGD, lr=0.1), optax.sgd(0.1)),
    "momentum": (_torch(SGD, **MOMENTUM), optax.sgd(0.1, momentum=0.9)),
    "nesterov": (_torch(SGD, nesterov=True, **MOMENTUM), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "adam": (_torch(ADAM, lr=1e-2), optax.adam(1e-2)),
    "adamw": (_torch(torch.optim.AdamW, lr=1e-2, weight_decay=0.1), optax.adamw(1e-2, weight_decay=0.1)),
    "adam-l2": (_torch(ADAM, lr=1e-2, weight_decay=0.1), optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-2))),
    "adam-by-hand": (_torch(TorchAdam), optax.adam(1e-2)),
    "clipped": (
        clipped(_torch(ADAM, lr=1e-2), to_norm),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    ),
}


def cases() -> Iterator[Case]:
    """All of them; no layer is charged."""
    for code, wing, variant, loss in LOSSES:
        for depth, make in ("alone", small), ("deep", deep):
            yield Case(code, wing, depth, variant, lambda make=make, loss=loss: make(loss=loss), (), "loss")
    for code, wing, variant, optimizers in OPTIMIZERS:
        for depth, make in ("alone", small), ("deep", deep):
            options = {"steps": 4, "optimizers": optimizers}
            if depth == "deep":
                options["loss"] = (cross_entropy(), optax_cross_entropy())
            yield Case(code, wing, depth, variant, lambda make=make, o=options: make(**o), (), "optimizer")
