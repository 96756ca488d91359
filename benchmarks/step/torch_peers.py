"""PyTorch's training step as its tutorials have it, with nn.BatchNorm and with torch_bn, eager and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import torch_bn
from benchmarks.step.network import (
    EPSILON,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASS,
    Data,
    Network,
    Norm,
    Weights,
    pooled_size,
)


def _native(fig_size: int) -> nn.Module:
    norm: dict[str, Any] = {"momentum": 1 - MOMENTUM, "eps": EPSILON}
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.BatchNorm2d(6, **norm),
        nn.Sigmoid(),
        nn.AvgPool2d(2, 2),
        nn.Conv2d(6, 16, 5),
        nn.BatchNorm2d(16, **norm),
        nn.Sigmoid(),
        nn.AvgPool2d(2, 2),
        nn.Flatten(),
        nn.Linear(16 * pooled_size(fig_size) ** 2, 120),
        nn.BatchNorm1d(120, **norm),
        nn.Sigmoid(),
        nn.Linear(120, 84),
        nn.BatchNorm1d(84, **norm),
        nn.Sigmoid(),
        nn.Linear(84, NUM_CLASS),
    )


def _ours(fig_size: int) -> nn.Module:
    return torch_bn.BLeNet(channels=1, fig_size=fig_size, num_class=NUM_CLASS, momentum=MOMENTUM, eps=EPSILON)


def _load(model: nn.Module, weights: Weights) -> None:
    """In both networks the tensors stand in the order of Weights; PyTorch's own also count the batches."""
    given = [v for layer in weights for v in layer]
    tensors = [v for name, v in model.state_dict().items() if not name.endswith("num_batches_tracked")]
    with torch.no_grad():
        for tensor, value in zip(tensors, given, strict=True):
            tensor.copy_(torch.from_numpy(value).reshape(tensor.shape))
    assert sum(isinstance(layer, Norm) for layer in weights) == 4
    assert sum(v.numel() for v in tensors) == sum(math.prod(v.shape) for v in given)


def _place(data: Data) -> list[tuple[Tensor, Tensor]]:
    return [(torch.from_numpy(x[:, None]), torch.from_numpy(labels).long()) for x, labels in data.batches()]


def _as_it_is(function: Any) -> Any:
    return function


def _make(
    build: Callable[[int], nn.Module],
    weights: Weights,
    fig_size: int,
    *,
    compile_model: Callable = _as_it_is,
    compile_step: Callable = _as_it_is,
    **of_adam: Any,
) -> Network:
    model = build(fig_size)
    _load(model, weights)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, **of_adam)
    loss_fn = compile_model(lambda x, labels: functional.cross_entropy(model(x), labels))

    def step(x: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(x, labels)
        loss.backward()
        optimizer.step()
        return loss

    whole_step, forward = compile_step(step), compile_model(model)

    def train(batch: tuple[Tensor, Tensor]) -> Tensor:
        model.train()
        return whole_step(*batch)

    def predict(batch: tuple[Tensor, Tensor]) -> Tensor:
        model.eval()
        with torch.inference_mode():
            return forward(batch[0])

    return Network(_place, train, lambda loss: [loss.item()], predict, lambda _: None)


# Whole graphs; of one shape each, which is compiled to more than one for any shape would be.
_compile = partial(torch.compile, fullgraph=True, dynamic=False)

native = partial(_make, _native)
native_compiled = partial(_make, _native, compile_model=_compile)
native_max_autotune = partial(_make, _native, compile_model=partial(_compile, mode="max-autotune"))
native_fused_adam = partial(_make, _native, fused=True)
# The step as a whole is no single graph: PyTorch compiles what is between the backward pass and the rest by itself.
native_whole_step = partial(_make, _native, compile_step=partial(torch.compile, dynamic=False))
ours = partial(_make, _ours)
ours_compiled = partial(_make, _ours, compile_model=_compile)
