"""PyTorch's batch norms behind one call, channels on axis 1, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

import torch_bn
from benchmarks.peers import EPSILON, Layer, Peer, Result, Start


def _layer(start: Start, train: Callable, predict: Callable, *, unbiased: bool = False) -> Layer:
    params = tuple(torch.tensor(v, requires_grad=True) for v in (start.gamma, start.beta))
    stats = tuple(torch.tensor(v) for v in (start.mean, start.var))
    return Layer(train, predict, params, stats, tuple, tuple, 1, unbiased)


def _torch_bn(start: Start) -> Layer:
    def train(params, stats, x):
        (gamma, beta), (mean, var) = params, stats
        y, *new = torch_bn.batch_norm(x, gamma, beta, mean, var, train=True, momentum=start.momentum, eps=EPSILON)
        return y, new

    def predict(params, stats, x):
        (gamma, beta), (mean, var) = params, stats
        return torch_bn.batch_norm(x, gamma, beta, mean, var, train=False, eps=EPSILON)[0]

    return _layer(start, train, predict)


def _native(start: Start) -> Layer:
    def train(params, stats, x):
        (gamma, beta), (mean, var) = params, stats
        # Changes mean and var in place, as it does in a network.
        y = functional.batch_norm(x, mean, var, gamma, beta, training=True, momentum=1 - start.momentum, eps=EPSILON)
        return y, stats

    def predict(params, stats, x):
        (gamma, beta), (mean, var) = params, stats
        return functional.batch_norm(x, mean, var, gamma, beta, training=False, eps=EPSILON)

    return _layer(start, train, predict, unbiased=True)


def _by_hand(start: Start) -> Layer:
    """The formula as it stands in the paper, and autograd."""
    axes, wide = tuple(a for a in range(len(start.shape)) if a != 1), (1, -1, *[1] * (len(start.shape) - 2))

    def normalize(params, mean, var, x):
        gamma, beta = (v.reshape(wide) for v in params)
        return gamma * ((x - mean) / torch.sqrt(var + EPSILON)) + beta

    def train(params, stats, x):
        mean = x.mean(axes, keepdim=True)
        var = ((x - mean) ** 2).mean(axes, keepdim=True)
        moved = [
            start.momentum * old + (1 - start.momentum) * new.detach().reshape(-1)
            for old, new in zip(stats, (mean, var), strict=True)
        ]
        return normalize(params, mean, var, x), moved

    def predict(params, stats, x):
        mean, var = (v.reshape(wide) for v in stats)
        return normalize(params, mean, var, x)

    return _layer(start, train, predict)


PEERS = {
    "torch_bn": Peer(_torch_bn, "torch"),
    "torch native": Peer(_native, "torch"),
    "torch by hand": Peer(_by_hand, "torch"),
}


def about() -> dict[str, str]:
    """Version, device and threads, for the report."""
    return {"torch": torch.__version__, "PyTorch device": f"cpu, {torch.get_num_threads()} threads"}


def calls(layer: Layer, x: NDArray, dy: NDArray) -> Mapping[str, Callable[[], Any]]:
    """Mode -> a function that computes it once. Forward alone and prediction record nothing for a derivative."""
    placed_x, placed_dy = _place(x).requires_grad_(), _place(dy)

    def silent(function: Callable) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return function(layer.params, layer.stats, placed_x)

        return call

    functions = silent(layer.train), lambda: _step(layer, placed_x, placed_dy), silent(layer.predict)
    return dict(zip(("forward", "forward+backward", "eval"), functions, strict=True))


def read_step(_: Layer, output: tuple) -> Result:
    """What forward+backward has returned."""
    y, stats, gradients = output
    return Result(*(v.detach().numpy().copy() for v in (y, *stats, *gradients)))


def read_eval(_: Layer, y: torch.Tensor) -> NDArray:
    """The y that eval has returned."""
    return y.numpy()


def _step(layer: Layer, x: torch.Tensor, dy: torch.Tensor) -> tuple:
    """(y, stats, gradients by x, gamma and beta)."""
    y, stats = layer.train(layer.params, layer.stats, x)
    return y, stats, torch.autograd.grad(y, (x, *layer.params), dy)


def _place(x: NDArray) -> torch.Tensor:
    # Contiguous: where memory is laid out otherwise, PyTorch's own batch norm has other formulas, and other errors.
    return torch.tensor(np.ascontiguousarray(x))
