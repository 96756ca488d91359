"""Carries weights between PyTorch and Flax, both ways, strictly and bit for bit.

Which layer is which is found by `matching.py`, which tensor of a layer is which by the table in `rules.py`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from flax.traverse_util import unflatten_dict
from numpy.typing import NDArray

from bn_common.conventions import complement
from parity import flax_side, flax_structure, kinds, matching, torch_structure
from parity.flax_side import NnxSide
from parity.pairing import LayerPair, Pairing
from parity.recording import Layer
from parity.rules import OIHW, OUT_IN, SAME, Layout, behind_flatten, register
from parity.structure import Flattened, Guess, Structure, given_guesses, guesses

__all__ = [
    "BLENET_GAUGES",
    "OIHW",
    "OUT_IN",
    "SAME",
    "Layout",
    "ParityWarning",
    "behind_flatten",
    "notes",
    "register",
    "to_flax",
    "to_torch",
]

Variables = dict[str, Any]
"""{"params": ..., "batch_stats": ...}, nested as Flax has it; the leaves are arrays."""


class ParityWarning(UserWarning):
    """Weights are carried as they are, but the reader should know something about them."""


# A bias before a batch norm is a gauge: it shifts the batch's mean and nothing else. Its true gradient is 0, and what
# the network does depends on bias - moving_mean only. PyTorch's name of the bias -> of the moving mean.
BLENET_GAUGES = {
    "conv.0.bias": "conv.1.moving_mean",
    "conv.4.bias": "conv.5.moving_mean",
    "fc.0.bias": "fc.1.moving_mean",
    "fc.3.bias": "fc.4.moving_mean",
}

MOST_ATTEMPTS = 200


def to_flax(
    torch_module_or_state_dict: torch.nn.Module | Mapping[str, Any],
    flax_module: nn.Module | nnx.Module,
    *,
    inputs: Sequence[NDArray] | None = None,
    flax_inputs: Sequence[NDArray] | None = None,
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
      inputs: numpy arrays that the modules take, in PyTorch's layout; floating ones of rank 3 and more are given to
        Flax channels last. Only their shapes and dtypes count.
      flax_inputs: the same in Flax's layout, where that is another.
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
      ParityWarning: a tensor holds NaN or infinity.
    """
    source = torch_module_or_state_dict
    if not isinstance(flax_module, nn.Module | nnx.Module):
        raise TypeError(f"flax_module is {type(flax_module).__name__}; allowed: a flax.linen.Module or nnx.Module")
    state, prefix = _state_of(source)
    arrays = {name: _to_numpy(v) for name, v in state.items()}
    whose = source if isinstance(source, torch.nn.Module) else torch_module
    torch_structure_ = _torch_structure(whose, {name: a.shape for name, a in arrays.items()})
    module = torch_structure.unwrapped(whose)[0] if isinstance(whose, torch.nn.Module) else None
    found, flax = _settle(module, torch_structure_, flax_module, inputs, flax_inputs, layer_map)
    if module is not None:
        _check_single_layers(found, torch_structure_, flax, module, flax_module)
    problems = [
        f"{prefix}{name} is {a.dtype}, but jax_enable_x64 is off, so it would be rounded"
        for name, a in arrays.items()
        if a.dtype == np.float64 and jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype
    ]
    problems += _wrong(found, torch_structure_, flax, arrays, to="flax")
    problems += _left_over_of_torch(found, torch_structure_, state, is_module=whose is source)
    problems += [f"{full} is missing (for {f})" for full, f in _missing_in_torch(found)]
    _raise(problems)
    carried = found.to_flax(arrays)
    _warn_unless_finite(arrays)
    flax_names = [full for layer in flax.layers for full in layer.tensors.values()]
    leaves = {name: jnp.array(carried[name]) for name in flax_names}
    partner = {pair.flax.path: pair.torch.path for pair in found.layers}
    for path, name in flax.counters.items():
        count = arrays.get(torch_structure_.counters.get(partner.get(path, ""), ""), np.zeros(()))
        leaves[name] = jnp.array(count, jnp.int32)
    if isinstance(flax_module, nnx.Module):
        side = NnxSide(flax_module)
        return nnx.from_flat_state(
            [
                (path, v.replace(leaves[side.names[path]]))
                for path, v in side.state.items()
                if side.names[path] in leaves
            ]
        )
    variables = unflatten_dict(leaves, sep="/")
    return {collection: variables.get(collection, {}) for collection in ("params", "batch_stats")}


def to_torch(
    variables: Mapping[str, Any] | nnx.State | nnx.Module,
    torch_module: torch.nn.Module,
    *,
    flax_module: nn.Module | nnx.Module | None = None,
    inputs: Sequence[NDArray] | None = None,
    flax_inputs: Sequence[NDArray] | None = None,
    layer_map: Mapping[str, str] | None = None,
) -> dict[str, torch.Tensor]:
    """Flax's variables as a state_dict for a PyTorch module, ready for `load_state_dict`.

    Args:
      variables: {"params": ..., "batch_stats": ...}, an `nnx.State`, or an NNX module.
      torch_module: where they go. It is not changed.
      flax_module: whose variables they are. Without it the layers' order is that of the variables, and where these
        have been sorted by name, that of the names.
      inputs: see `to_flax`.
      flax_inputs: see `to_flax`.
      layer_map: see `to_flax`.

    Returns:
      The state_dict: copies in the dtype that they have in Flax; what has no counterpart there, such as
      `num_batches_tracked` and constant buffers, as the module has it.

    Raises:
      TypeError: an argument of another kind.
      ValueError: an array is missing, left over, of the wrong shape or no floating point; one message lists all
        problems. Or the variables' order is lost, and needed.

    Warns:
      ParityWarning: an array holds NaN or infinity.
    """
    if isinstance(variables, nnx.Module):
        flax_module = variables if flax_module is None else flax_module
        variables = nnx.state(variables)
    if not isinstance(variables, Mapping | nnx.State):
        raise TypeError(f"the variables are {type(variables).__name__}; allowed: a dict of collections, an nnx.State")
    if not isinstance(torch_module, torch.nn.Module):
        raise TypeError(f"torch_module is {type(torch_module).__name__}; allowed: a torch.nn.Module")
    if not (flax_module is None or isinstance(flax_module, nn.Module | nnx.Module)):
        raise TypeError(f"flax_module is {type(flax_module).__name__}; allowed: a flax.linen.Module or nnx.Module")
    arrays = {
        name: np.asarray(a)
        for name, a in flax_structure.flat_in_order(variables).items()
        if name.split("/")[0] in flax_structure.CARRIED
    }
    module, prefix = torch_structure.unwrapped(torch_module)
    target = torch_structure.of_module(module)
    given = flax_structure.of_variables({name: a.shape for name, a in arrays.items()})
    if flax_module is None:
        found = _settle_torch(module, target, given, inputs, flax_inputs, layer_map)
    else:
        found, given = _settle(module, target, flax_module, inputs, flax_inputs, layer_map)
    problems = _wrong(found, target, given, arrays, to="torch")
    expected = {full for layer in given.layers for full in layer.tensors.values()} | set(given.counters.values())
    left = [*found.left()[1], *(name for name in arrays if name not in expected)]
    problems += [
        f"{name} is left over: the target has no place for it" for name in dict.fromkeys(left) if name in arrays
    ]
    state = module.state_dict()
    tied = _tied(state)
    problems += _missing_in_flax(found, target, tied)
    _raise(problems)
    _warn_unless_finite(arrays)
    carried = {name: _from_numpy(a) for name, a in found.to_torch(arrays).items()}
    partner = {pair.torch.path: pair.flax.path for pair in found.layers}
    for path, name in target.counters.items():
        count = arrays.get(given.counters.get(partner.get(path, ""), ""))
        if count is not None:
            carried[name] = torch.tensor(np.asarray(count), dtype=state[name].dtype)
    result = {}
    for name, value in state.items():
        source = next((n for n in tied[name] if n in carried), None)
        result[prefix + name] = value.clone() if source is None else carried[source]
    return result


def notes(torch_module: torch.nn.Module, flax_module: nn.Module | nnx.Module, **options: Any) -> list[str]:
    """What weights alone do not carry over: conventions in which the paired layers differ.

    Args:
      torch_module: PyTorch's.
      flax_module: Flax's.
      **options: `inputs`, `flax_inputs`, `layer_map`, see `to_flax`.

    Returns:
      A sentence each: momentum, the moving variance's bias, epsilon.
    """
    module, _ = torch_structure.unwrapped(torch_module)
    structure = torch_structure.of_module(module)
    given = (options.get("inputs"), options.get("flax_inputs"), options.get("layer_map"))
    found, _flax = _settle(module, structure, flax_module, *given)
    return [note for pair in found.layers for note in _notes_of(pair, module)]


def conventions(
    torch_module: torch.nn.Module, flax_module: nn.Module | nnx.Module, **options: Any
) -> dict[str, dict[str, dict[str, Any]]]:
    """What the batch norms say of themselves: {"torch": {path: {momentum, unbiased_moving_var, ...}}, "flax": ...}."""
    module, _ = torch_structure.unwrapped(torch_module)
    structure = torch_structure.of_module(module)
    given = (options.get("inputs"), options.get("flax_inputs"), options.get("layer_map"))
    _found, flax = _settle(module, structure, flax_module, *given)
    return {
        "torch": {
            layer.path: torch_convention(module.get_submodule(layer.path))
            for layer in structure.layers
            if layer.kind == "batch_norm"
        },
        "flax": {layer.path: flax_convention(layer.config) for layer in flax.layers if layer.kind == "batch_norm"},
    }


def _notes_of(pair: LayerPair, module: torch.nn.Module) -> list[str]:
    where = f"{pair.torch.path or 'the layer'} and {pair.flax.path or 'the layer'}"
    layer = module.get_submodule(pair.torch.path)
    torch_says, flax_says = torch_convention(layer), flax_convention(pair.flax.config)
    return [
        f"{where}: {name} is {torch_says[key]} in PyTorch and {flax_says[key]} in Flax"
        for key, name in CONVENTION.items()
        if key in torch_says and key in flax_says and torch_says[key] != flax_says[key]
    ]


CONVENTION = {
    "momentum": "momentum (weight of the old value)",
    "unbiased_moving_var": "unbiased_moving_var",
    "epsilon": "epsilon",
}


def torch_convention(layer: torch.nn.Module) -> dict[str, Any]:
    """What a norm says of itself, in this project's words; momentum is the weight of the old value."""
    says: dict[str, Any] = {}
    if (eps := getattr(layer, "eps", None)) is not None:
        says["epsilon"] = eps
    if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
        says |= {"momentum": complement(layer.momentum), "unbiased_moving_var": True}
    elif hasattr(layer, "unbiased_moving_var"):
        says |= {"momentum": layer.momentum, "unbiased_moving_var": layer.unbiased_moving_var}
    return says


def flax_convention(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of Flax's; only norms have an epsilon."""
    says: dict[str, Any] = {name: config[name] for name in ("epsilon", "momentum") if name in config}
    if "momentum" in says:
        says["unbiased_moving_var"] = bool(config.get("unbiased_moving_var", False))
    return says


# How a network is run to learn its structure.


def _settle(
    module: torch.nn.Module | None,
    torch_: Structure,
    flax_module: nn.Module | nnx.Module,
    inputs: Sequence[NDArray] | None,
    flax_inputs: Sequence[NDArray] | None,
    layer_map: Mapping[str, str] | None,
) -> tuple[Pairing, Structure]:
    """The pairing on the first inputs that both modules take and on which all shapes fit; else the closest."""
    side = flax_side.side_of(flax_module)
    runner = None if module is None else torch_structure.Runner(module, torch_)
    best: tuple[int, Pairing, Structure, Guess] | None = None
    error: Exception | None = None
    original = list(torch_.layers)
    for guess in itertools.islice(_candidates(runner, torch_, flax_module, inputs, flax_inputs), MOST_ATTEMPTS):
        try:
            flax = flax_structure.of_module(side, guess)
        except Exception as refused:  # whatever a stranger's module raises
            error = error or refused
            continue
        run = None if runner is None else runner.run(guess)
        torch_.layers, torch_.feeders = _in_order(original, run), None if run is None else run.feeders
        found = matching.match(torch_, flax, layer_map)
        count = _misfits(found)
        unchanged = best is not None and best[2].shapes == flax.shapes
        if best is None or count < best[0]:
            best = count, found, flax, guess
        if count == 0 or unchanged:
            break
    if best is None:
        if isinstance(side, NnxSide):
            assert isinstance(flax_module, nnx.Module)
            flax = flax_structure.of_definition(flax_module, side)
            _suppose_flattened(torch_)
            return matching.match(torch_, flax, layer_map), flax
        raise ValueError(
            "flax_module takes none of the inputs that PyTorch's first layer suggests; allowed: inputs=[...], numpy "
            f"arrays in PyTorch's layout that it does take. It says: {type(error).__name__}: {error}"
        ) from error
    _, found, flax, guess = best
    run = None if runner is None else runner.run(guess)
    torch_.layers, torch_.feeders = _in_order(original, run), None if run is None else run.feeders
    if runner is not None and run is not None:
        torch_.flattened = runner.flattened(guess, run)
        if not torch_structure.may_be_flattened(run.calls, {x.path: x.kind for x in torch_.layers}, guess):
            return found, flax
    flax.flattened = flax_structure.flattened(side, flax, guess)
    if run is None and not flax.flattened:
        _suppose_flattened(torch_)
    return matching.match(torch_, flax, layer_map), flax


def _settle_torch(
    module: torch.nn.Module,
    torch_: Structure,
    flax: Structure,
    inputs: Sequence[NDArray] | None,
    flax_inputs: Sequence[NDArray] | None,
    layer_map: Mapping[str, str] | None,
) -> Pairing:
    """The pairing with variables whose module is not known."""
    runner = torch_structure.Runner(module, torch_)
    every = given_guesses(inputs, flax_inputs) if inputs is not None else guesses(torch_.layers, torch_.shapes)
    ran = next(((guess, run) for guess in every if (run := runner.run(guess)) is not None), None)
    if ran is None:
        _suppose_flattened(torch_)
    else:
        guess, run = ran
        torch_.layers, torch_.feeders = _in_order(torch_.layers, run), run.feeders
        torch_.flattened = runner.flattened(guess, run)
    return matching.match(torch_, flax, layer_map)


def _candidates(
    runner: torch_structure.Runner | None,
    torch_: Structure,
    flax_module: Any,
    inputs: Sequence[NDArray] | None,
    flax_inputs: Sequence[NDArray] | None,
) -> Iterable[Guess]:
    if inputs is not None:
        return given_guesses(inputs, flax_inputs)
    groups = getattr(flax_module, "feature_group_count", 1)
    every = list(guesses(torch_.layers, torch_.shapes, groups if isinstance(groups, int) else 1))
    if runner is None:
        return every
    return itertools.chain(itertools.islice((g for g in every if runner.run(g) is not None), 3), every)


def _in_order(layers: list[Layer], run: torch_structure.Run | None) -> list[Layer]:
    """The layers that were called first, in that order; the others as they were."""
    if run is None:
        return layers
    place = {path: i for i, path in enumerate(run.order)}
    return sorted(layers, key=lambda layer: place.get(layer.path, len(place)))


def _suppose_flattened(structure: Structure) -> None:
    """Without a run: a matrix that takes a multiple of what the convolution before it gives stands behind a flatten."""
    channels = None
    for layer in structure.layers:
        weight = max((structure.shapes[full] for full in layer.tensors.values()), key=len, default=())
        if len(weight) >= 3 and layer.is_called:
            channels = weight[1] if layer.kind == "conv_transpose" else weight[0]
        elif len(weight) == 2:
            if channels and weight[1] > channels and weight[1] % channels == 0:
                structure.flattened[layer.path] = Flattened(channels, weight[1] // channels, True)
            channels = None


# What does not fit, in words.


def _misfits(found: Pairing) -> int:
    left = found.left()
    return sum(not t.fits for pair in found.layers for t in pair.tensors) + len(left[0]) + len(left[1])


def _wrong(found: Pairing, torch_: Structure, flax: Structure, arrays: Mapping[str, NDArray], *, to: str) -> list[str]:
    """Tensors of a wrong dtype or shape, or not there."""
    problems: dict[str, None] = {}
    for torch_name, flax_name, pair in found.tensors():
        name, target = (torch_name, flax_name) if to == "flax" else (flax_name, torch_name)
        if name not in arrays:
            problems[f"{name} is missing (for {target})"] = None
            continue
        if to == "flax":
            shape = pair.to_torch(np.empty(flax.shapes[flax_name], np.bool_)).shape
            if pair.part is not None:
                shape = (shape[0] * (pair.part[2] // (pair.part[1] - pair.part[0])), *shape[1:])
        else:
            shape = pair.to_flax(np.empty(torch_.shapes[torch_name], np.bool_)).shape
        if not jnp.issubdtype(arrays[name].dtype, jnp.floating):
            problems[f"{name} is {arrays[name].dtype}; allowed: floating point (for {target})"] = None
        elif not pair.fits or arrays[name].shape != shape:
            problems[f"{name} has shape {arrays[name].shape}; allowed: {shape} (for {target})"] = None
    return list(problems)


def _missing_in_torch(found: Pairing) -> list[tuple[str, str]]:
    """(the name that PyTorch's tensor would have, Flax's name) of what nothing fills."""
    partner = {full: pair.torch for pair in found.layers for full in pair.flax.tensors.values()}
    missing = []
    for full in found.left()[1]:
        layer = partner.get(full)
        if layer is None:
            missing.append(("PyTorch's tensor", full))
            continue
        local = full.rpartition("/")[2]
        own = any(name in layer.tensors for name in ("gamma", "beta", "moving_mean"))
        names = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_var"} if own else {}
        usual = {
            "scale": "weight",
            "kernel": "weight",
            "embedding": "weight",
            "mean": "running_mean",
            "var": "running_var",
        }
        name = names.get(local, usual.get(local, local))
        missing.append((f"{layer.path}.{name}" if layer.path else name, full))
    return missing


def _missing_in_flax(found: Pairing, torch_: Structure, tied: Mapping[str, Sequence[str]]) -> list[str]:
    """PyTorch's tensors that nothing fills, with the name that Flax's would have."""
    carried = {name for name, _, _ in found.tensors()}
    partner = {full: pair.flax for pair in found.layers for full in pair.torch.tensors.values()}
    problems = []
    for full in found.left()[0]:
        if any(name in carried for name in tied.get(full, ())):
            continue
        layer = partner.get(full)
        local = full.rpartition(".")[2]
        if layer is None:
            problems.append(f"{full} has no variable that fills it")
            continue
        name = _flax_name(local, layer.kind)
        collection = "batch_stats" if name in ("mean", "var") else "params"
        problems.append(f"{'/'.join(part for part in (collection, layer.path, name) if part)} is missing (for {full})")
    return problems


def _flax_name(local: str, kind: str) -> str:
    if kinds.MEAN.fullmatch(local):
        return "mean"
    if kinds.VAR.fullmatch(local):
        return "var"
    if kinds.SHIFT.fullmatch(local):
        return "bias"
    return "scale" if kind in kinds.NORMS else "embedding" if kind == "embedding" else "kernel"


def _left_over_of_torch(
    found: Pairing, torch_: Structure, state: Mapping[str, torch.Tensor], *, is_module: bool
) -> list[str]:
    carried = {name for name, _, _ in found.tensors()}
    tied = _tied(state)
    left = set(found.left()[0])
    if not is_module:  # a module's tensors outside of its layers are constants
        left |= {n for n, v in state.items() if n not in torch_.shapes and n not in torch_.counters.values()}
    return [
        f"{name} is left over: the target has no place for it"
        for name in state
        if name in left and state[name].is_floating_point() and not any(n in carried for n in tied[name])
    ]


def _check_single_layers(
    found: Pairing, torch_: Structure, flax: Structure, module: torch.nn.Module, flax_module: Any
) -> None:
    """A single layer must be of the kind that its target is: names and shapes may fit where it computes otherwise."""
    if [x.path for x in torch_.layers] == [""] and [x.path for x in flax.layers] == [""]:
        t, f = torch_.layers[0], flax.layers[0]
        if not found.layers or (t.kind != f.kind and {t.kind, f.kind} <= {"conv", "conv_transpose"}):
            raise TypeError(f"the torch module is {module!r:.80}; allowed for {type(flax_module).__name__}: its like")


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{len(problems)} problem(s):\n  " + "\n  ".join(problems))


def _warn_unless_finite(arrays: Mapping[str, NDArray]) -> None:
    broken = [name for name, a in arrays.items() if a.dtype.kind != "i" and not np.isfinite(a.astype(np.float32)).all()]
    if broken:
        warnings.warn(f"{', '.join(broken)} hold NaN or infinity", ParityWarning, stacklevel=3)


# Tensors and arrays.


def _state_of(source: Any) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors by clean names, and the prefix that was taken off."""
    if isinstance(source, torch.nn.Module):
        module, prefix = torch_structure.unwrapped(source)
        torch_structure.check_lazy(module)
        return {name: v for name, v in module.state_dict().items() if isinstance(v, torch.Tensor)}, prefix
    if not isinstance(source, Mapping) or not all(isinstance(v, torch.Tensor) for v in source.values()):
        raise TypeError(f"the source is {type(source).__name__}; allowed: a torch module or its state_dict")
    return torch_structure.clean_names(source)


def _torch_structure(source: Any, shapes: Mapping[str, tuple[int, ...]]) -> Structure:
    if isinstance(source, torch.nn.Module):
        return torch_structure.of_module(torch_structure.unwrapped(source)[0])
    return torch_structure.of_state(shapes)


def _tied(state: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Name -> all names of the same tensor: layers that share a weight."""
    by_place: dict[Any, list[str]] = {}
    for name, v in state.items():
        place = (v.data_ptr(), tuple(v.shape), v.stride()) if v.numel() and v.device.type != "meta" else name
        by_place.setdefault(place, []).append(name)
    return {name: names for names in by_place.values() for name in names}


def named(variables: Any) -> dict[str, NDArray]:
    """Flax's variables by full name."""
    return {name: np.asarray(v) for name, v in flax_structure.flat_in_order(variables).items()}


def as_tensor(array: NDArray) -> torch.Tensor:
    """The array as a tensor of its own, bfloat16 too."""
    return _from_numpy(array)


def _to_numpy(tensor: torch.Tensor) -> NDArray:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # numpy knows it through ml_dtypes only
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _from_numpy(array: NDArray) -> torch.Tensor:
    array = np.array(array, order="C")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
