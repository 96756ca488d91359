"""What weights alone do not carry over: the conventions that norms are meant in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from parity.evidence.guessed import settle
from parity.pairing.pairs import LayerPair, Pairing
from parity.records.inputs import calls
from parity.records.structure import Structure
from parity.sides.torch import layers as torch_layers

if TYPE_CHECKING:
    import torch
    from flax import linen as nn
    from flax import nnx


def notes(torch_module: torch.nn.Module, flax_module: nn.Module | nnx.Module, **options: Any) -> list[str]:
    """What weights alone do not carry over: conventions in which the paired layers differ.

    Args:
      torch_module: PyTorch's.
      flax_module: Flax's.
      **options: `inputs`, `keywords`, `flax_inputs`, `flax_call`, `layer_map`, see `to_flax`.

    Returns:
      A sentence each: momentum, the moving variance's bias, epsilon.
    """
    module, _ = torch_layers.unwrapped(torch_module)
    structure = torch_layers.of_module(module)
    found, _flax = _settled(module, structure, flax_module, **options)
    return [note for pair in found.layers for note in _notes_of(pair, module)]


def conventions(
    torch_module: torch.nn.Module, flax_module: nn.Module | nnx.Module, **options: Any
) -> dict[str, dict[str, dict[str, Any]]]:
    """What the batch norms say of themselves: {"torch": {path: {momentum, unbiased_moving_var, ...}}, "flax": ...}."""
    module, _ = torch_layers.unwrapped(torch_module)
    structure = torch_layers.of_module(module)
    _found, flax = _settled(module, structure, flax_module, **options)
    return {
        "torch": {
            layer.path: torch_layers.convention(module.get_submodule(layer.path))
            for layer in structure.layers
            if layer.kind == "batch_norm"
        },
        "flax": {layer.path: flax_convention(layer.config) for layer in flax.layers if layer.kind == "batch_norm"},
    }


def _settled(
    module: torch.nn.Module,
    structure: Structure,
    flax_module: Any,
    *,
    layer_map: Mapping[str, str] | None = None,
    **called: Any,
) -> tuple[Pairing, Structure]:
    return settle(module, structure, flax_module, calls(**called), layer_map)


def _notes_of(pair: LayerPair, module: torch.nn.Module) -> list[str]:
    where = f"{pair.torch.path or 'the layer'} and {pair.flax.path or 'the layer'}"
    # A part of a layer that is cut otherwise in Flax is no module.
    layer = dict(module.named_modules()).get(pair.torch.path)
    if layer is None:
        return []
    torch_says, flax_says = torch_layers.convention(layer), flax_convention(pair.flax.config)
    return [
        f"{where}: {name} is {torch_says[key]} in PyTorch and {flax_says[key]} in Flax"
        for key, name in CONVENTION.items()
        if key in torch_says and key in flax_says and torch_says[key] != flax_says[key]
    ]


CONVENTION = {
    "momentum": "momentum (weight of the old value)",
    "unbiased_moving_var": "unbiased_moving_var",
    "initial_moving_var": "initial_moving_var",
    "epsilon": "epsilon",
}


def flax_convention(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of Flax's."""
    return {name: config[name] for name in CONVENTION if name in config}
