"""What the matrix runs: batch norm as a function and as layers, and BLeNet, in both wings and on the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from numpy.typing import NDArray

import jax_bn
import torch_bn
from parity import weights
from parity.wings.blenet import BLENET_GAUGES

Arrays = dict[str, NDArray]
"""Name -> array in PyTorch's layout."""


class Convention(NamedTuple):
    """Of the moving statistics."""

    momentum: float
    unbiased: bool
    initial_var: float


CONVENTIONS = {
    "seed": Convention(0.9, False, 0.0),
    "PyTorch": Convention(0.9, True, 1.0),
    "Flax": Convention(0.99, False, 1.0),
}


class Given(NamedTuple):
    """Inputs of a batch norm in training or prediction; x and dy [N, C, ...], the others [C]; float64."""

    x: NDArray
    dy: NDArray
    gamma: NDArray
    beta: NDArray
    mean: NDArray
    var: NDArray


def given(shape: tuple[int, ...], dtype: str, convention: Convention, *, train: bool, hard: bool) -> Given:
    """Random numbers as that dtype holds them; a prediction has statistics that are not the initial ones."""
    rng = np.random.default_rng(shape[0])
    c = shape[1]
    x = rng.normal(1e4 if hard else 0.0, 1.0, shape)
    var = np.full(c, convention.initial_var) if train else rng.uniform(0.5, 2, c)
    arrays = x, rng.normal(size=shape), rng.uniform(0.5, 2, c), rng.normal(size=c), x.mean() + rng.normal(size=c), var
    rounded = [rounded_to(a, dtype) for a in arrays[:2]]
    return Given(*rounded, *(rounded_to(a, wide(dtype)) for a in arrays[2:]))


def wide(dtype: str) -> str:
    """The dtype of parameters and statistics."""
    return "float64" if dtype == "float64" else "float32"


def rounded_to(a: NDArray, dtype: str) -> NDArray:
    """In float64, with values that the dtype holds."""
    return np.asarray(a, jnp.dtype(dtype)).astype(np.float64)


def truth(g: Given, convention: Convention, *, train: bool, eps: float = 1e-5) -> tuple[Arrays, Arrays]:
    """From the definition in numpy's longdouble, and for each result the size of what cancels in it, [C]."""
    x, dy, gamma, beta, mean, var = (a.astype(np.longdouble) for a in g)
    axes = tuple(a for a in range(x.ndim) if a != 1)
    m = x.size // x.shape[1]

    def over(v: NDArray) -> NDArray:
        return v.reshape(-1, *[1] * (x.ndim - 2))

    mu, sigma2 = mean, var
    if train:
        mu = x.mean(axes)
        sigma2 = ((x - over(mu)) ** 2).mean(axes)
        kept = sigma2 * m / (m - 1) if convention.unbiased else sigma2
        mean = convention.momentum * mean + (1 - convention.momentum) * mu
        var = convention.momentum * var + (1 - convention.momentum) * kept
    r = 1 / np.sqrt(sigma2 + eps)
    x_hat = (x - over(mu)) * over(r)
    dx = dy * over(gamma * r)
    if train:
        dx = dx - over(gamma * r) * (over(dy.mean(axes)) + x_hat * over((dy * x_hat).mean(axes)))
    values = {
        "y": over(gamma) * x_hat + over(beta),
        "moving_mean": mean,
        "moving_var": var,
        "dx": dx,
        "dgamma": (dy * x_hat).sum(axes),
        "dbeta": dy.sum(axes),
    }
    largest = np.abs(dy).max(axes)
    scales = {name: np.abs(v).max(axes) if v.ndim > 1 else np.abs(v) for name, v in values.items()}
    scales["moving_mean"] = np.maximum(np.abs(x).max(axes), np.abs(g.mean))
    scales["dx"] = np.abs(gamma) * largest * r
    scales["dgamma"], scales["dbeta"] = np.maximum(largest, scales["dgamma"]), np.maximum(largest, scales["dbeta"])
    return values, scales


NAMES = "y", "moving_mean", "moving_var", "dx", "dgamma", "dbeta"


def run_jax(kind: str, g: Given, dtype: str, convention: Convention, *, train: bool, how: str) -> Arrays:
    """`kind`: "function", "linen" or "nnx"; `how`: "jit" or "eager"."""
    x, dy = (jnp.asarray(np.moveaxis(a, 1, -1)).astype(dtype) for a in (g.x, g.dy))
    gamma, beta, mean, var = (jnp.asarray(a).astype(wide(dtype)) for a in g[2:])
    forward = _JAX[kind](convention, train)

    def loss(x, gamma, beta):
        y, mean_, var_ = forward(x, gamma, beta, mean, var)
        return (y.astype(wide(dtype)) * dy.astype(wide(dtype))).sum(), (y, mean_, var_)

    step = jax.grad(loss, (0, 1, 2), has_aux=True)
    (dx, dgamma, dbeta), (y, *stats) = (jax.jit(step) if how == "jit" else step)(x, gamma, beta)
    found = (
        np.moveaxis(_plain(y), -1, 1),
        *map(_plain, stats),
        np.moveaxis(_plain(dx), -1, 1),
        _plain(dgamma),
        _plain(dbeta),
    )
    return dict(zip(NAMES, found, strict=True))


def _plain(a: Any) -> NDArray:
    return np.asarray(a).astype(np.float64)


def _jax_function(c: Convention, train: bool) -> Callable:
    def forward(x, gamma, beta, mean, var):
        stats = jax_bn.BatchStats(mean, var)
        y, stats = jax_bn.batch_norm(
            x, gamma, beta, stats, train=train, momentum=c.momentum, unbiased_moving_var=c.unbiased
        )
        return y, *stats

    return forward


def _linen(c: Convention, train: bool) -> Callable:
    layer = jax_bn.BatchNorm(use_running_average=not train, momentum=c.momentum, unbiased_moving_var=c.unbiased)

    def forward(x, gamma, beta, mean, var):
        variables = {"params": {"scale": gamma, "bias": beta}, "batch_stats": {"mean": mean, "var": var}}
        y, new = layer.clone(dtype=x.dtype).apply(variables, x, mutable=["batch_stats"])
        return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]

    return forward


def _nnx(c: Convention, train: bool) -> Callable:
    def forward(x, gamma, beta, mean, var):
        options = {"momentum": c.momentum, "unbiased_moving_var": c.unbiased, "dtype": x.dtype}
        layer = jax_bn.nnx.BatchNorm(len(gamma), use_running_average=not train, rngs=nnx.Rngs(0), **options)
        assert layer.scale is not None
        assert layer.bias is not None
        layer.scale.set_value(gamma)
        layer.bias.set_value(beta)
        layer.mean.set_value(mean)
        layer.var.set_value(var)
        return layer(x), layer.mean.get_value(), layer.var.get_value()

    return forward


_JAX = {"function": _jax_function, "linen": _linen, "nnx": _nnx}


def run_torch(kind: str, g: Given, dtype: str, convention: Convention, *, train: bool, how: str) -> Arrays:
    """`kind`: "function" or "layer"; `how`: "eager" or "compile"."""
    x, dy = (torch.tensor(a).to(getattr(torch, dtype)) for a in (g.x, g.dy))
    gamma, beta, mean, var = (torch.tensor(a).to(getattr(torch, wide(dtype))) for a in g[2:])
    for v in (x, gamma, beta):
        v.requires_grad_()
    if kind == "function":
        function: Any = torch.compile(torch_bn.batch_norm, fullgraph=True) if how == "compile" else torch_bn.batch_norm
        options = {"train": train, "momentum": convention.momentum, "unbiased_moving_var": convention.unbiased}
        y, *stats = function(x, gamma, beta, mean, var, **options)
    else:
        layer = torch_bn.BatchNorm(
            num_features=len(gamma),
            num_dims=x.ndim,
            momentum=convention.momentum,
            unbiased_moving_var=convention.unbiased,
            dtype=gamma.dtype,
        ).train(train)
        layer.gamma, layer.beta = torch.nn.Parameter(gamma.detach()), torch.nn.Parameter(beta.detach())
        layer.moving_mean, layer.moving_var = mean, var
        gamma, beta = layer.gamma, layer.beta
        y = layer(x)
        stats = [layer.moving_mean, layer.moving_var]
    gradients = torch.autograd.grad((y.to(gamma.dtype) * dy.to(gamma.dtype)).sum(), (x, gamma, beta))
    found = [v.detach().double().numpy() for v in (y, *stats, *gradients)]
    return dict(zip(NAMES, found, strict=True))


def blenet(channels: int, fig_size: int, dtype: str) -> tuple[torch.nn.Module, NDArray, NDArray]:
    """A BLeNet whose statistics have moved; images as `dtype` holds them, and labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch_bn.BLeNet(channels=channels, fig_size=fig_size, num_class=10)
        for name, value in model.state_dict().items():
            if "gamma" in name or "moving_var" in name:
                value.uniform_(0.5, 1.5)
            elif "beta" in name or "moving_mean" in name:
                value.normal_(0, 0.3)
    rng = np.random.default_rng(0)
    x = rounded_to(rng.normal(size=(16, channels, fig_size, fig_size)), dtype)
    return model.to(getattr(torch, dtype)), x, rng.integers(0, 10, 16)


def blenet_torch(model: torch.nn.Module, x: NDArray, labels: NDArray, dtype: str, *, train: bool) -> Arrays:
    """Logits, the input's gradient, the parameters' as one vector (without gauges in training), the statistics."""
    copy = torch_bn.BLeNet(channels=x.shape[1], fig_size=x.shape[2], num_class=10).to(getattr(torch, dtype))
    copy.load_state_dict(model.state_dict())
    copy.train(train)
    images = torch.tensor(x).to(getattr(torch, dtype)).requires_grad_()
    logits = copy(images)
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
    gradients = {n: p.grad.double().numpy() for n, p in copy.named_parameters() if p.grad is not None}
    statistics = {n: b.double().numpy() for n, b in copy.named_buffers()}
    assert images.grad is not None
    return _outcome(logits.detach().double().numpy(), images.grad.double().numpy(), gradients, statistics, train)


def blenet_jax(model: torch.nn.Module, x: NDArray, labels: NDArray, dtype: str, *, train: bool, how: str) -> Arrays:
    """The same from the other wing."""
    flax_model = jax_bn.BLeNet(channels=x.shape[1], fig_size=x.shape[2], num_class=10)
    variables = weights.to_flax(model, flax_model)

    def loss(params, x):
        state = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, new = flax_model.apply(state, x, train=train, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels, jnp.int32))
        return losses.mean(), (logits, new["batch_stats"])

    step = jax.grad(loss, (0, 1), has_aux=True)
    images = jnp.asarray(np.moveaxis(x, 1, -1)).astype(dtype)
    (gradients, dx), (logits, stats) = (jax.jit(step) if how == "jit" else step)(variables["params"], images)
    both = {
        n: v.double().numpy() for n, v in weights.to_torch({"params": gradients, "batch_stats": stats}, model).items()
    }
    parameters = {n: both[n] for n, _ in model.named_parameters()}
    statistics = {n: both[n] for n, _ in model.named_buffers()}
    return _outcome(_plain(logits), np.moveaxis(_plain(dx), -1, 1), parameters, statistics, train)


def _outcome(logits: NDArray, dx: NDArray, gradients: Arrays, statistics: Arrays, train: bool) -> Arrays:
    names = sorted(n for n in gradients if not (train and n in BLENET_GAUGES))
    vector = np.concatenate([gradients[n].ravel() for n in names])
    return {"logits": logits, "dx": dx, "gradient": vector, **{n: statistics[n] for n in sorted(statistics)}}
