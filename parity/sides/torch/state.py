"""A state_dict's tensors as numpy arrays, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from parity.records.kinds import Shape
from parity.records.structure import Structure
from parity.sides.torch import layers


def state_of(source: Any) -> tuple[dict[str, Tensor], str]:
    """The tensors of a module or a state_dict by clean names, and the prefix that was taken off.

    Raises:
      TypeError: neither of the two.
      ValueError: a lazy module that has never been called.
    """
    if isinstance(source, nn.Module):
        module, prefix = layers.unwrapped(source)
        layers.check_lazy(module)
        return {name: v for name, v in module.state_dict().items() if isinstance(v, Tensor)}, prefix
    if not isinstance(source, Mapping) or not all(isinstance(v, Tensor) for v in source.values()):
        raise TypeError(f"the source is {type(source).__name__}; allowed: a torch module or its state_dict")
    return layers.clean_names(source)


def structure_of(source: Any, shapes: Mapping[str, Shape]) -> Structure:
    """The layers of a module, or those that the names of a state_dict tell of."""
    if isinstance(source, nn.Module):
        return layers.of_module(layers.unwrapped(source)[0])
    return layers.of_state(shapes)


def tied(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Name -> all names of the same tensor: layers that share a weight."""
    by_place: dict[Any, list[str]] = {}
    for name, v in state.items():
        place = (v.data_ptr(), tuple(v.shape), v.stride()) if v.numel() and v.device.type != "meta" else name
        by_place.setdefault(place, []).append(name)
    return {name: names for names in by_place.values() for name in names}


def filled(state: Mapping[str, Tensor], arrays: Mapping[str, NDArray], prefix: str) -> dict[str, Tensor]:
    """The state_dict with copies of these arrays in it; what they do not name as it is. Shared tensors stay shared."""
    names, result = tied(state), {}
    carried = {
        name: from_numpy(a) if state[name].is_floating_point() else torch.tensor(np.asarray(a), dtype=state[name].dtype)
        for name, a in arrays.items()
    }
    for name, value in state.items():
        source = next((n for n in names[name] if n in carried), None)
        result[prefix + name] = value.clone() if source is None else carried[source]
    return result


def to_numpy(tensor: Tensor) -> NDArray:
    """The tensor as an array of its dtype; of bfloat16, which numpy knows through ml_dtypes only, too."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_numpy(array: NDArray) -> Tensor:
    """The array as a tensor of its own."""
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
