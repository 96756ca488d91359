"""What an optimiser of PyTorch answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from parity.records.answers import ProbeError, Response, Run, ask

TorchFactory = Callable[[list[nn.Parameter]], Any]
"""Parameters, in order -> a torch Optimizer, or (Optimizer, scheduler), whose scheduler makes a step after each."""


def answers(factory: TorchFactory, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Response]:
    """What the optimiser answers for each of these parameters.

    Args:
      factory: makes the optimiser from the parameters, in this order; called once an episode.
      shapes: of the parameters by name.

    Raises:
      ProbeError: it cannot be asked.
    """
    serials = {name: np.arange(math.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    offsets = np.cumsum([0, *(serial.size for serial in serials.values())])
    places = {name: offset + serial for offset, (name, serial) in zip(offsets, serials.items(), strict=False)}
    return ask(serials, lambda gradients, parameters: _run(factory, places, gradients, parameters), whole_state=True)


def _run(factory: TorchFactory, places: Mapping[str, NDArray], gradients: NDArray, parameters: NDArray) -> Run:
    """One episode, from a fresh state."""
    tensors = {name: nn.Parameter(torch.zeros(v.shape, dtype=torch.float64)) for name, v in places.items()}
    made = factory(list(tensors.values()))
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in tensors.values()}:
        raise ProbeError("PyTorch's optimiser holds none of the parameters that its factory was given")
    updates, rates = np.zeros_like(gradients), np.full(gradients.shape, np.nan)
    first_state = []
    for t, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
        before = {}
        for name, serial in places.items():
            before[name] = torch.from_numpy(parameter[serial])
            tensors[name].data.copy_(before[name])
            tensors[name].grad = torch.from_numpy(gradient[serial])
        for group in optimizer.param_groups:
            of_group = {id(p) for p in group["params"]}
            for name, serial in places.items():
                if id(tensors[name]) in of_group and "lr" in group:
                    rates[t, serial.ravel()] = float(group["lr"])
        _torch_step(optimizer)
        if scheduler is not None:
            scheduler.step()
        for name, serial in places.items():
            updates[t, serial.ravel()] = (tensors[name].detach() - before[name]).numpy().ravel()
        if t == 0:
            first_state = _torch_state(optimizer, tensors, places, gradient.shape)
    return Run(updates, first_state, None if np.isnan(rates).all() else rates)


def _torch_step(optimizer) -> None:
    try:
        optimizer.step()
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ProbeError(f"PyTorch's {type(optimizer).__name__} makes no step from gradients alone: {error}") from error


def _torch_state(optimizer, tensors, places, shape) -> list[NDArray]:
    """Every kind of buffer that is as large as its parameter, laid out as all of them."""
    kinds: dict[Any, NDArray] = {}
    for name, serial in places.items():
        for key, value in optimizer.state.get(tensors[name], {}).items():
            if isinstance(value, torch.Tensor) and value.shape == tensors[name].shape and value.numel():
                kind = kinds.setdefault(key, np.full(shape, np.nan))
                kind[serial.ravel()] = value.detach().double().numpy().ravel()
    return list(kinds.values())
