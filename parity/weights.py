"""Carries weights between PyTorch and Flax, both ways, strictly and bit for bit.

Which layer is which is found by `pairing/alignment.py`, which tensor of it is which by the table in
`pairing/rules.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bn_common.shown import printable
from parity.conventions import conventions, notes
from parity.evidence.guessed import settle, settle_torch
from parity.pairing import problems as misfits
from parity.pairing.layouts import OIHW, OUT_IN, SAME, Layout, behind_flatten
from parity.pairing.pairs import Pairing
from parity.pairing.rules import register
from parity.records.inputs import calls
from parity.records.recording import Recording
from parity.records.structure import UNSEEN, Structure
from parity.sides.jax import layers as flax_layers
from parity.sides.jax import variables as flax_variables
from parity.sides.jax.variables import named
from parity.sides.module import is_torch_module
from parity.sides.torch import layers as torch_layers
from parity.sides.torch import state as torch_state

if TYPE_CHECKING:
    import torch
    from flax import linen as nn
    from flax import nnx

__all__ = [
    "OIHW",
    "OUT_IN",
    "SAME",
    "Layout",
    "ParityWarning",
    "as_tensor",
    "behind_flatten",
    "conventions",
    "named",
    "notes",
    "register",
    "to_flax",
    "to_torch",
]


Variables = dict[str, Any]
"""{"params": ..., "batch_stats": ...}, nested as Flax has it; the leaves are arrays."""


class ParityWarning(UserWarning):
    """Weights are carried as they are, but the reader should know something about them."""


def to_flax(
    torch_module_or_state_dict: torch.nn.Module | Mapping[str, Any],
    flax_module: nn.Module | nnx.Module,
    *,
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    keywords: Mapping[str, Any] | None = None,
    flax_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    flax_call: Callable[..., Any] | None = None,
    layer_map: Mapping[str, str] | None = None,
    torch_module: torch.nn.Module | None = None,
) -> Any:
    """PyTorch's weights and moving statistics as the variables of a Flax module.

    Layers are paired by order of execution, kind and shapes; where a linear layer stands behind a flatten, its inputs
    are reordered. For this the modules are run once on inputs made up from the first layer's shape; a network that
    takes others (several inputs, images that are no squares) needs `inputs`.

    Args:
      torch_module_or_state_dict: what to carry. Prefixes of `torch.compile` and `DistributedDataParallel` are taken
        off. `num_batches_tracked` is carried where Flax has a place for it (momentum None).
      flax_module: a linen module, or an NNX module; neither is changed.
      inputs: what the modules take, in PyTorch's layout, see `parity.check`: a sequence of arguments, or a dict of
        keywords. Of arrays only shapes and dtypes count.
      keywords: further arguments by name.
      flax_inputs: what Flax is called with instead, in its layout; likewise.
      flax_call: see `parity.check`.
      layer_map: {PyTorch's dotted name: Flax's path "a/b"} of layers that are paired otherwise than by themselves.
      torch_module: whose state_dict it is. A state_dict alone tells layers and their order by its names only.

    Returns:
      For linen {"params": ..., "batch_stats": ...}; for NNX an `nnx.State`, for `nnx.update(flax_module, state)`.
      Copies, in the dtype that they have in PyTorch.

    Raises:
      TypeError: an argument of another kind, or single layers of different kinds.
      ValueError: a tensor is missing, left over, of the wrong shape, no floating point, or float64 while
        jax_enable_x64 is off (it would be rounded); one message lists all problems. Or no inputs are found that the
        Flax module takes.

    Warns:
      ParityWarning: a tensor holds NaN or infinity, or a moving variance below 0; or it could not be seen what stands
        behind a flatten; or layers are cut otherwise on the other side (query, key and value in one), and no numbers
        show how: it says the guess.
    """
    source = torch_module_or_state_dict
    called = calls(inputs, keywords, flax_inputs, flax_call)
    flax_module = flax_variables.checked_module(flax_module)
    state, prefix = torch_state.state_of(source)
    arrays = {name: torch_state.to_numpy(v) for name, v in state.items()}
    whose = source if is_torch_module(source) else torch_module
    given = torch_state.structure_of(whose, {name: a.shape for name, a in arrays.items()})
    module = torch_layers.unwrapped(whose)[0] if is_torch_module(whose) else None
    found, flax = settle(module, given, flax_module, called, layer_map)
    if module is not None:
        _check_single_layers(found, given, flax, module, flax_module)
    problems = [
        f"{prefix}{name} is {a.dtype}, but jax_enable_x64 is off, so it would be rounded"
        for name, a in arrays.items()
        if flax_variables.would_round(a)
    ]
    problems += _complex(flax)
    problems += misfits.folded(found.of_flax())
    problems += misfits.wrong(found, arrays, to="flax")
    problems += misfits.left_over_of_torch(found, given, arrays, torch_state.tied(state), is_module=whose is source)
    problems += [f"{full} is missing (for {f})" for full, f in misfits.missing_in_torch(found)]
    _raise(problems, found)
    carried = found.to_flax(arrays)
    _warn(found, arrays, given, flax, below_zero=_below_zero(given, arrays))
    flax_names = [full for layer in flax.layers for full in layer.tensors.values()]
    partner = {pair.flax.path: pair.torch.path for pair in found.layers}
    counters = {
        name: arrays.get(given.counters.get(partner.get(path, ""), ""), np.zeros(()))
        for path, name in flax.counters.items()
    }
    own = {name: a for name, a in flax.tables.items() if name.split("/")[0] in flax_layers.CARRIED}
    return flax_variables.packed(flax_module, own | {name: carried[name] for name in flax_names}, counters)


def to_torch(
    variables: Mapping[str, Any] | nnx.State[Any, Any] | nnx.Module,
    torch_module: torch.nn.Module,
    *,
    flax_module: nn.Module | nnx.Module | None = None,
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    keywords: Mapping[str, Any] | None = None,
    flax_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    flax_call: Callable[..., Any] | None = None,
    layer_map: Mapping[str, str] | None = None,
) -> dict[str, torch.Tensor]:
    """Flax's variables as a state_dict for a PyTorch module, ready for `load_state_dict`.

    Args:
      variables: {"params": ..., "batch_stats": ...}, an `nnx.State`, or an NNX module.
      torch_module: where they go. It is not changed.
      flax_module: whose variables they are; to be exact, give it. Without it the layers' order is that of the
        variables, and where JAX has sorted these, that of the numbers in their names; what is flattened is taken to
        be channels last, and `transpose_kernel` to be False.
      inputs: see `to_flax`.
      keywords: see `to_flax`.
      flax_inputs: see `to_flax`.
      flax_call: see `parity.check`.
      layer_map: see `to_flax`.

    Returns:
      The state_dict: copies in the dtype that they have in Flax; what has no counterpart there, such as
      `num_batches_tracked` and constant buffers, as the module has it.

    Raises:
      TypeError: an argument of another kind.
      ValueError: an array is missing, left over, of the wrong shape or no floating point; one message lists all
        problems. Or the variables' order is lost, and needed.

    Warns:
      ParityWarning: an array holds NaN or infinity, or a moving variance below 0; or it could not be seen what stands
        behind a flatten; or a guess, see `to_flax`; or Flax has one tensor where PyTorch has two (the biases of an
        LSTM): it says where it goes.
    """
    called = calls(inputs, keywords, flax_inputs, flax_call)
    variables, holder = flax_variables.opened(variables)
    flax_module = holder if flax_module is None else flax_module
    if not is_torch_module(torch_module):
        raise TypeError(f"torch_module is {type(torch_module).__name__}; allowed: a torch.nn.Module")
    if flax_module is not None:
        flax_module = flax_variables.checked_module(flax_module)
    arrays = flax_variables.carried(variables)
    module, prefix = torch_layers.unwrapped(torch_module)
    target = torch_layers.of_module(module)
    given = flax_layers.of_variables({name: a.shape for name, a in arrays.items()})
    if flax_module is None:
        found = settle_torch(module, target, given, called, layer_map)
    else:
        found, given = settle(module, target, flax_module, called, layer_map)
    problems = [*_complex(given), *misfits.folded(found.of_torch())]
    arrays = {name: a for name, a in arrays.items() if name not in given.tables}
    problems += misfits.wrong(found, arrays, to="torch")
    expected = {full for layer in given.layers for full in layer.tensors.values()} | set(given.counters.values())
    left = [*found.left()[1], *(name for name in arrays if name not in expected)]
    problems += [
        f"{name} is left over: the target has no place for it" for name in dict.fromkeys(left) if name in arrays
    ]
    state = module.state_dict()
    problems += misfits.missing_in_flax(found, target, torch_state.tied(state))
    _raise(problems, found)
    carried = found.to_torch(arrays)
    told = _below_zero(target, carried)
    _warn(found, arrays, target, given, below_zero=told, loses=found.loses())
    partner = {pair.torch.path: pair.flax.path for pair in found.layers}
    for path, name in target.counters.items():
        count = arrays.get(given.counters.get(partner.get(path, ""), ""))
        if count is not None:
            carried[name] = count
    return torch_state.filled(state, carried, prefix)


def _check_single_layers(
    found: Pairing, torch_: Structure, flax: Structure, module: torch.nn.Module, flax_module: Any
) -> None:
    """A single layer must be of the kind that its target is: names and shapes may fit where it computes otherwise."""
    if [x.path for x in torch_.layers] == [""] and [x.path for x in flax.layers] == [""]:
        t, f = torch_.layers[0], flax.layers[0]
        if not found.layers or (t.kind != f.kind and {t.kind, f.kind} <= {"conv", "conv_transpose"}):
            raise TypeError(f"the torch module is {module!r:.80}; allowed for {type(flax_module).__name__}: its like")


def _complex(flax: Structure) -> list[str]:
    """Parameters that would be left as the module makes them: what is complex is not carried."""
    own = {name: a for name, a in flax.tables.items() if name.startswith("params/") and a.dtype.kind == "c"}
    return [f"{name} is {a.dtype}; allowed: floating point" for name, a in own.items()]


def _raise(problems: Sequence[str], found: Pairing) -> None:
    if problems:
        told = map(printable, [*problems, *([found.hint] if found.hint else [])])
        raise ValueError(f"{len(problems)} problem(s):\n  " + "\n  ".join(told))


def _below_zero(torch_: Structure, arrays: Mapping[str, NDArray]) -> list[str]:
    layers = {layer.path: layer for layer in torch_.layers}
    return misfits.below_zero(Recording("torch", layers, tensors=dict(arrays)))


def _warn(
    found: Pairing,
    arrays: Mapping[str, NDArray],
    *structures: Structure,
    below_zero: Sequence[str],
    loses: Sequence[str] = (),
) -> None:
    """Of numbers that cannot be, of what could not be looked at, of guesses, and of what is not brought back."""
    broken = [name for name, a in arrays.items() if a.dtype.kind != "i" and not _is_finite(a)]
    told = [f"{', '.join(broken)} hold NaN or infinity"] if broken else []
    told += below_zero
    told += [f"{UNSEEN} ({structure.unseen})" for structure in structures if structure.unseen]
    told += [sentence for structure in structures for sentence in structure.told]
    told += [f"{'; '.join(found.notes())}: look whether it is so"] if found.is_guessed else []
    told += [*found.told, *found.assumed()]
    told += loses
    told += dict.fromkeys(recut.text for recut in found.recuts if recut.folds)
    for sentence in told:
        warnings.warn(printable(sentence), ParityWarning, stacklevel=3)


def _is_finite(a: NDArray) -> bool:
    # Numpy has no such function of bfloat16.
    return bool(np.isfinite(a if a.dtype.kind in "fc" else a.astype(np.float32)).all())


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """The array as a tensor of its own, bfloat16 too."""
    return torch_state.from_numpy(array)
