"""What an optimiser of PyTorch answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from parity.records.answers import ProbeError, Run

TorchFactory = Callable[[list[nn.Parameter]], Any]
"""Parameters, in order -> a torch Optimizer, or (Optimizer, scheduler), whose scheduler makes a step after each."""


def run_torch(factory, shapes, serials, gradients: NDArray, parameters: NDArray) -> Run:
    """One episode of an optimiser of PyTorch, from a fresh state."""
    tensors = {name: nn.Parameter(torch.zeros(np.shape(v), dtype=torch.float64)) for name, v in shapes.items()}
    made = factory(list(tensors.values()))
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in tensors.values()}:
        raise ProbeError("PyTorch's optimiser holds none of the parameters that its factory was given")
    updates, rates = np.zeros_like(gradients), np.full(gradients.shape, np.nan)
    first_state = []
    for t, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
        before = {}
        for name, serial in serials.items():
            before[name] = torch.from_numpy(parameter[serial])
            tensors[name].data.copy_(before[name])
            tensors[name].grad = torch.from_numpy(gradient[serial])
        for group in optimizer.param_groups:
            of_group = {id(p) for p in group["params"]}
            for name, serial in serials.items():
                if id(tensors[name]) in of_group and "lr" in group:
                    rates[t, serial.ravel()] = float(group["lr"])
        _torch_step(optimizer)
        if scheduler is not None:
            scheduler.step()
        for name, serial in serials.items():
            updates[t, serial.ravel()] = (tensors[name].detach() - before[name]).numpy().ravel()
        if t == 0:
            first_state = _torch_state(optimizer, tensors, serials, gradient.shape)
    return Run(updates, first_state, None if np.isnan(rates).all() else rates)


def _torch_step(optimizer) -> None:
    try:
        optimizer.step()
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ProbeError(f"PyTorch's {type(optimizer).__name__} makes no step from gradients alone: {error}") from error


def _torch_state(optimizer, tensors, serials, shape) -> list[NDArray]:
    """Every kind of buffer that is as large as its parameter, laid out as the Flax tree."""
    kinds: dict[Any, NDArray] = {}
    for name, serial in serials.items():
        for key, value in optimizer.state.get(tensors[name], {}).items():
            if isinstance(value, torch.Tensor) and value.shape == tensors[name].shape and value.numel():
                kind = kinds.setdefault(key, np.full(shape, np.nan))
                kind[serial.ravel()] = value.detach().double().numpy().ravel()
    return list(kinds.values())
