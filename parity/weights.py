"""Carries weights between PyTorch and Flax, both ways, strictly and bit for bit.

Two tables hold all there is to know. `RULES`: for each kind of layer, which tensor is which there, and how its axes
move. `BLENET`: which layer of BLeNet is which there. Everything else follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

import jax_bn
import torch_bn

Variables = dict[str, Any]
"""{"params": ..., "batch_stats": ...}, nested as Flax has it; the leaves are arrays."""

Move = Callable[[NDArray], NDArray]


class Layout(NamedTuple):
    """How a tensor's axes move from PyTorch to Flax, and back."""

    to_flax: Move
    to_torch: Move


SAME = Layout(lambda a: a, lambda a: a)
OUT_IN = Layout(lambda a: a.T, lambda a: a.T)  # [out, in] <-> [in, out]
OIHW = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # <-> HWIO


def behind_flatten(channels: int, height: int, width: int) -> Layout:
    """The matrix of a linear layer behind a flatten: PyTorch's inputs come as C, H, W, Flax's as H, W, C."""

    def to_flax(a: NDArray) -> NDArray:
        return a.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(-1, len(a))

    def to_torch(a: NDArray) -> NDArray:
        return a.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(a.shape[1], -1)

    return Layout(to_flax, to_torch)


class Rule(NamedTuple):
    """One tensor of a layer: its names in PyTorch (a layer has one of them) and its place and name in Flax."""

    torch_names: tuple[str, ...]
    collection: str
    flax_name: str
    layout: Layout = SAME


BIAS = Rule(("bias",), "params", "bias")
RULES: dict[str, tuple[Rule, ...]] = {
    "conv": (Rule(("weight",), "params", "kernel", OIHW), BIAS),
    "linear": (Rule(("weight",), "params", "kernel", OUT_IN), BIAS),
    "batch_norm": (
        Rule(("gamma", "weight"), "params", "scale"),
        Rule(("beta", "bias"), "params", "bias"),
        Rule(("moving_mean", "running_mean"), "batch_stats", "mean"),
        Rule(("moving_var", "running_var"), "batch_stats", "var"),
    ),
}

# PyTorch's layer -> Flax's, and its kind. "flatten" is the linear layer behind the flatten.
BLENET: dict[str, tuple[str, str]] = {
    "conv.0": ("Conv_0", "conv"),
    "conv.1": ("BatchNorm_0", "batch_norm"),
    "conv.4": ("Conv_1", "conv"),
    "conv.5": ("BatchNorm_1", "batch_norm"),
    "fc.0": ("Dense_0", "flatten"),
    "fc.1": ("BatchNorm_2", "batch_norm"),
    "fc.3": ("Dense_1", "linear"),
    "fc.4": ("BatchNorm_3", "batch_norm"),
    "fc.6": ("Dense_2", "linear"),
}

# A bias before a batch norm is a gauge: it shifts the batch's mean and nothing else. Its true gradient is 0, and what
# the network does depends on bias - moving_mean only. PyTorch's name of the bias -> of the moving mean.
BLENET_GAUGES = {
    "conv.0.bias": "conv.1.moving_mean",
    "conv.4.bias": "conv.5.moving_mean",
    "fc.0.bias": "fc.1.moving_mean",
    "fc.3.bias": "fc.4.moving_mean",
}


def to_flax(torch_module_or_state_dict: torch.nn.Module | Mapping[str, Any], flax_module: nn.Module) -> Variables:
    """PyTorch's weights and moving statistics as the variables of a Flax module.

    Args:
      torch_module_or_state_dict: what to carry; `num_batches_tracked`, for which Flax has no place, is left behind.
      flax_module: `jax_bn.BLeNet`, or one layer: `jax_bn.BatchNorm`, `flax.linen.BatchNorm`, `nn.Conv` (two spatial
        dimensions) or `nn.Dense`.

    Returns:
      {"params": ..., "batch_stats": ...}: copies in the dtype that they have in PyTorch.

    Raises:
      TypeError: an argument of another kind.
      ValueError: a tensor is missing, left over, of the wrong shape, no floating point, or float64 while
        jax_enable_x64 is off (it would be rounded); one message lists all problems.
    """
    source = torch_module_or_state_dict
    state = source.state_dict() if isinstance(source, torch.nn.Module) else source
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise TypeError(f"the source is {type(source).__name__}; allowed: a torch module or its state_dict")
    arrays = {name: _to_numpy(v) for name, v in state.items() if not _is_counter(name)}
    kind = _flax_kind(flax_module)
    # A layer must be of the kind that its target is; BLeNet's names and shapes say enough.
    if kind != "blenet" and isinstance(source, torch.nn.Module) and _torch_kind(source) != kind:
        raise TypeError(f"the torch module is {source!r:.80}; allowed for {type(flax_module).__name__}: its like")
    layers = _layers(kind, getattr(flax_module, "fig_size", 0))
    expected = _flax_shapes(flax_module, arrays)
    pairs = [
        Pair(torch_name, flax_name, layout.to_flax, layout.to_torch)
        for torch_name, flax_name, layout in _tensors(layers, arrays)
    ]
    problems = [
        f"{name} is {a.dtype}, but jax_enable_x64 is off, so it would be rounded"
        for name, a in arrays.items()
        if a.dtype == np.float64 and jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype
    ]
    carried = _carry(arrays, expected, pairs, problems)
    variables = unflatten_dict({name: jnp.array(a) for name, a in carried.items()}, sep="/")
    return {collection: variables.get(collection, {}) for collection in ("params", "batch_stats")}


def to_torch(variables: Mapping[str, Any], torch_module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Flax's variables as a state_dict for a PyTorch module, ready for `load_state_dict`.

    Args:
      variables: {"params": ..., "batch_stats": ...}.
      torch_module: `torch_bn.BLeNet`, or one layer: `torch_bn.BatchNorm`, `nn.BatchNorm1d/2d/3d`, `nn.Conv2d` or
        `nn.Linear`. It is not changed.

    Returns:
      The state_dict: copies in the dtype that they have in Flax; `num_batches_tracked` as the module has it.

    Raises:
      TypeError: an argument of another kind.
      ValueError: an array is missing, left over, of the wrong shape or no floating point; one message lists all
        problems.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"the variables are {type(variables).__name__}; allowed: a dict of collections")
    arrays = {name: np.asarray(a) for name, a in flatten_dict(dict(variables), sep="/").items()}
    layers = _layers(_torch_kind(torch_module), getattr(torch_module, "fig_size", 0))
    state = torch_module.state_dict()
    expected = {name: tuple(v.shape) for name, v in state.items() if not _is_counter(name)}
    pairs = [
        Pair(flax_name, torch_name, layout.to_torch, layout.to_flax)
        for torch_name, flax_name, layout in _tensors(layers, expected)
    ]
    carried = _carry(arrays, expected, pairs, [])
    return {name: _from_numpy(carried[name]) if name in carried else v.clone() for name, v in state.items()}


class Pair(NamedTuple):
    """A tensor's name where it comes from and where it goes, the layout change, and its inverse."""

    source: str
    target: str
    move: Move
    move_back: Move


def _carry(
    arrays: Mapping[str, NDArray], expected: Mapping[str, tuple[int, ...]], pairs: list[Pair], problems: list[str]
) -> dict[str, NDArray]:
    """Every array to its target; all problems in one ValueError."""
    carried: dict[str, NDArray] = {}
    for source, target, move, move_back in pairs:
        if target not in expected:
            continue
        shape = move_back(np.empty(expected[target], np.bool_)).shape
        if source not in arrays:
            problems.append(f"{source} is missing (for {target})")
        elif not jnp.issubdtype(arrays[source].dtype, jnp.floating):
            problems.append(f"{source} is {arrays[source].dtype}; allowed: floating point (for {target})")
        elif arrays[source].shape != shape:
            problems.append(f"{source} has shape {arrays[source].shape}; allowed: {shape} (for {target})")
        else:
            carried[target] = np.array(move(arrays[source]), order="C")
    used = {pair.source for pair in pairs if pair.target in expected}
    reached = {pair.target for pair in pairs}
    problems += [f"{name} is left over: the target has no place for it" for name in arrays if name not in used]
    problems += [f"{name} has no rule that fills it" for name in expected if name not in reached]
    if problems:
        raise ValueError(f"{len(problems)} problem(s):\n  " + "\n  ".join(problems))
    return carried


Layers = dict[str, tuple[str, tuple[Rule, ...]]]
"""PyTorch's layer -> Flax's, and the rules for its tensors."""


def _layers(kind: str, fig_size: int = 0) -> Layers:
    if kind != "blenet":
        return {"": ("", RULES[kind])}
    f = (fig_size // 2 - 4) // 2
    rules = RULES | {"flatten": (RULES["linear"][0]._replace(layout=behind_flatten(16, f, f)), BIAS)}
    return {torch_layer: (flax_layer, rules[kind]) for torch_layer, (flax_layer, kind) in BLENET.items()}


def _flax_kind(module: nn.Module) -> str:
    if isinstance(module, jax_bn.BLeNet):
        return "blenet"
    if isinstance(module, jax_bn.BatchNorm | nn.BatchNorm):
        return "batch_norm"
    if isinstance(module, nn.Dense):
        return "linear"
    if isinstance(module, nn.Conv) and len(_kernel_size(module)) == 2:
        return "conv"
    raise TypeError(f"the Flax module is {module!r:.80}; allowed: BLeNet, BatchNorm, Dense, Conv of two dimensions")


def _torch_kind(module: torch.nn.Module) -> str:
    if isinstance(module, torch_bn.BLeNet):
        return "blenet"
    if isinstance(module, torch_bn.BatchNorm | torch.nn.modules.batchnorm._BatchNorm):
        return "batch_norm"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, torch.nn.Conv2d):
        return "conv"
    raise TypeError(f"the torch module is {module!r:.80}; allowed: BLeNet, BatchNorm, Linear, Conv2d")


def _tensors(layers: Layers, torch_names: Mapping[str, Any]) -> list[tuple[str, str, Layout]]:
    """(name in PyTorch, name in Flax, layout) of every tensor that the layers can have."""
    found = []
    for torch_layer, (flax_layer, rules) in layers.items():
        for rule in rules:
            names = [f"{torch_layer}.{name}" if torch_layer else name for name in rule.torch_names]
            name = next((name for name in names if name in torch_names), names[0])
            path = "/".join(part for part in (rule.collection, flax_layer, rule.flax_name) if part)
            found.append((name, path, rule.layout))
    return found


def _flax_shapes(module: nn.Module, arrays: Mapping[str, NDArray]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every variable. A layer learns its input's channels from the weights that it is given."""
    weight = arrays.get("weight", np.empty(0))
    kwargs: dict[str, Any] = {}
    shape: tuple[int, ...]
    if isinstance(module, jax_bn.BLeNet):
        shape, kwargs = (1, *module.image_shape), {"train": False}
    elif isinstance(module, nn.Conv):
        per_group = weight.shape[1] if weight.ndim == 4 else 1
        # As large as the kernel can reach, so that no padding leaves an empty output.
        shape = (1, *(64 * k for k in _kernel_size(module)), per_group * module.feature_group_count)
    elif isinstance(module, nn.Dense):
        shape = (1, weight.shape[1] if weight.ndim == 2 else 1)
    else:
        shape = (2, max((a.size for a in arrays.values()), default=1))
        kwargs = {} if module.use_running_average is not None else {"use_running_average": True}
    variables = jax.eval_shape(
        lambda key: module.init(key, jnp.zeros(shape, module.param_dtype), **kwargs), jax.random.key(0)
    )
    return {name: v.shape for name, v in flatten_dict(variables, sep="/").items()}


def _kernel_size(module: nn.Conv) -> tuple[int, ...]:
    return (module.kernel_size,) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def _to_numpy(tensor: torch.Tensor) -> NDArray:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # numpy knows it through ml_dtypes only
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _from_numpy(array: NDArray) -> torch.Tensor:
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
