"""A pair of models that are the same network, and weights carried by hand: no rule of `parity` is used here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

Tensors = dict[str, NDArray]
Kind = Callable[[Tensors], Tensors]
"""The tensors of one PyTorch layer, by name -> Flax's, by collection and name ("params/kernel")."""
Table = Sequence[tuple[str, str, Kind]]
"""Rows: PyTorch's layer, Flax's layer, its kind."""


def bias_of(state: Tensors) -> Tensors:
    return {"params/bias": state["bias"]} if "bias" in state else {}


def linear(state: Tensors) -> Tensors:
    return {"params/kernel": state["weight"].T, **bias_of(state)}


def conv(state: Tensors) -> Tensors:
    w = state["weight"]
    return {"params/kernel": w.transpose(*range(2, w.ndim), 1, 0), **bias_of(state)}


def conv_transpose(state: Tensors) -> Tensors:
    """PyTorch: [in, out, H, W], true convolution; Flax: [H, W, in, out], correlation with the spread input."""
    return {"params/kernel": state["weight"].transpose(2, 3, 0, 1)[::-1, ::-1], **bias_of(state)}


def conv_transpose_gradient(state: Tensors) -> Tensors:
    """Flax with transpose_kernel=True: [H, W, out, in], as the gradient of a convolution."""
    return {"params/kernel": state["weight"].transpose(2, 3, 1, 0), **bias_of(state)}


def behind_flatten(channels: int, *size: int) -> Kind:
    def kind(state: Tensors) -> Tensors:
        w = state["weight"].reshape(-1, channels, *size)
        return {"params/kernel": np.moveaxis(w, 1, -1).reshape(len(w), -1).T, **bias_of(state)}

    return kind


def norm(state: Tensors) -> Tensors:
    """Batch, layer and group norm, under any of the usual names."""
    names = {
        "params/scale": ("weight", "gamma"),
        "params/bias": ("bias", "beta"),
        "batch_stats/mean": ("running_mean", "moving_mean"),
        "batch_stats/var": ("running_var", "moving_var"),
    }
    return {to: state[name] for to, given in names.items() for name in given if name in state}


def embedding(state: Tensors) -> Tensors:
    return {"params/embedding": state["weight"]}


def attention(heads: int) -> Kind:
    """nn.MultiheadAttention -> flax's query, key, value and out."""

    def kind(state: Tensors) -> Tensors:
        width = state["in_proj_weight"].shape[1]
        moved: Tensors = {}
        for i, name in enumerate(("query", "key", "value")):
            rows = slice(i * width, (i + 1) * width)
            moved[f"params/{name}/kernel"] = state["in_proj_weight"][rows].T.reshape(width, heads, -1)
            moved[f"params/{name}/bias"] = state["in_proj_bias"][rows].reshape(heads, -1)
        moved["params/out/kernel"] = state["out_proj.weight"].T.reshape(heads, -1, width)
        return moved | {"params/out/bias": state["out_proj.bias"]}

    return kind


def bare(torch_name: str, flax_name: str | None = None) -> Kind:
    """A parameter that is no layer's."""
    return lambda state: {f"params/{flax_name or torch_name}": state[torch_name]}


def carry(module: torch.nn.Module, table: Table) -> dict[str, Tensors]:
    """Flax's variables, flat: {"params/Conv_0/kernel": ...}."""
    state = {name: v.detach().numpy() for name, v in module.state_dict().items()}
    moved: Tensors = {}
    for torch_layer, flax_layer, kind in table:
        start = f"{torch_layer}." if torch_layer else ""
        tensors = kind({name[len(start) :]: v for name, v in state.items() if name.startswith(start)})
        for name, array in tensors.items():
            collection, rest = name.split("/", 1)
            moved["/".join(part for part in (collection, flax_layer, rest) if part)] = array
    return moved


def linen_variables(module: torch.nn.Module, table: Table) -> dict[str, Any]:
    """{"params": ..., "batch_stats": ...} of float32 arrays."""
    return unflatten_dict({name: jnp.asarray(v.copy()) for name, v in carry(module, table).items()}, sep="/")


def nnx_variables(module: torch.nn.Module, table: Table, flax_module: nnx.Module) -> nnx.State:
    """The state of an NNX module: its own variables, with the values carried over."""
    moved = {name.split("/", 1)[1]: v for name, v in carry(module, table).items()}
    state = nnx.state(flax_module, nnx.Any(nnx.Param, nnx.BatchStat))
    flat = [
        (path, variable.replace(jnp.asarray(moved["/".join(map(str, path))].copy())))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(flat)


class Pair(NamedTuple):
    """Two models that are one network.

    Attributes:
      name: for the test's id.
      torch: makes the PyTorch module.
      flax: makes the Flax module, linen or NNX.
      inputs: (random numbers, batch) -> the inputs, in PyTorch's layout.
      table: which layer is which.
      modes: in which they are the same.
      flax_inputs: the inputs as Flax takes them, where they are not channels last of PyTorch's.
      options: further arguments of `parity.check`.
      bound: of the relative difference in float64.
    """

    name: str
    torch: Callable[[], torch.nn.Module]
    flax: Callable[[], linen.Module | nnx.Module]
    inputs: Callable[[np.random.Generator, int], tuple[NDArray, ...]]
    table: Table
    modes: tuple[str, ...] = ("train", "eval")
    flag: str = "train"
    flax_inputs: Callable[[tuple[NDArray, ...]], tuple[NDArray, ...]] | None = None
    options: Mapping[str, Any] = {}
    bound: float = 1e-12


def rngs() -> nnx.Rngs:
    """For an NNX module whose first weights are replaced: XLA compiles this kind of random numbers much faster."""
    return nnx.Rngs(params=jax.random.key(0, impl="rbg"), dropout=0)


def images(channels: int, size: int, width: int | None = None):
    def make(rng: np.random.Generator, batch: int) -> tuple[NDArray, ...]:
        return (rng.normal(size=(batch, channels, size, width or size)).astype(np.float32),)

    return make


def features(*shape: int):
    return lambda rng, batch: (rng.normal(size=(batch, *shape)).astype(np.float32),)


def tokens(length: int, vocabulary: int):
    return lambda rng, batch: (rng.integers(0, vocabulary, (batch, length)).astype(np.int32),)


def randomise(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Scales, biases and moving statistics away from 1 and 0, as after some training."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(v: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(v.shape, generator=generator, dtype=v.dtype)

    with torch.no_grad():
        for name, v in (*module.named_parameters(), *module.named_buffers()):
            last = name.rpartition(".")[2]
            if last in ("running_var", "moving_var"):
                v.copy_(uniform(v, 0.5, 2.0))
            elif last in ("running_mean", "moving_mean"):
                v.copy_(uniform(v, -0.5, 0.5))
            elif v.ndim == 1 and last in ("weight", "gamma"):
                v.copy_(uniform(v, 0.5, 1.5))
            elif v.ndim == 1 and last in ("bias", "beta"):
                v.copy_(uniform(v, -0.5, 0.5))
    return module


def default_flax_inputs(inputs: tuple[NDArray, ...]) -> tuple[NDArray, ...]:
    return tuple(np.moveaxis(x, 1, -1) if x.ndim > 2 and x.dtype.kind == "f" else x for x in inputs)


def outputs(pair: Pair, seed: int, batch: int, train: bool) -> tuple[list[NDArray], list[NDArray]]:
    """Both sides' outputs in float64 (jax_enable_x64 is on), weights carried by hand, dropout off."""
    torch.manual_seed(seed)
    module = randomise(pair.torch(), seed).double().train(train)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.eval()
    given = pair.inputs(np.random.default_rng(seed), batch)
    given = tuple(x.astype(np.float64) if x.dtype.kind == "f" else x for x in given)
    flax_given = [jnp.asarray(x) for x in (pair.flax_inputs or default_flax_inputs)(given)]
    flax_module = pair.flax()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if isinstance(flax_module, nnx.Module):
            nnx.update(flax_module, nnx_variables(module, pair.table, flax_module))
            flax_module.train() if train else flax_module.eval()
            for _, layer in nnx.iter_modules(flax_module):
                if isinstance(layer, nnx.Dropout):
                    layer.deterministic = True
            in_call = pair.flag in inspect.signature(type(flax_module).__call__).parameters
            kwargs = {pair.flag: train} if in_call else {}
            flax_out = nnx.jit(lambda module, *given: module(*given, **kwargs))(flax_module, *flax_given)
        else:
            flax_out = _linen_outputs(pair, flax_module, linen_variables(module, pair.table), flax_given, train)
    torch_out = module(*map(torch.as_tensor, given))
    return [v.detach().numpy() for v in _leaves(torch_out)], [np.asarray(v) for v in _leaves(flax_out)]


def _linen_outputs(pair: Pair, module: linen.Module, variables: Any, given: list[Any], train: bool) -> Any:
    opposite = pair.flag.rpartition(".")[2] in ("deterministic", "use_running_average")
    value = not train if opposite else train
    if pair.flag.startswith("self."):
        module, kwargs = module.clone(**{pair.flag[5:]: value}), {}
    else:
        kwargs = {pair.flag: value} if pair.flag else {}

    def no_dropout(call, args, kwargs, context):
        return args[0] if isinstance(context.module, linen.Dropout) else call(*args, **kwargs)

    with linen.intercept_methods(no_dropout):
        out, _ = module.apply(variables, *given, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}, **kwargs)
    return out


def _leaves(out: Any) -> list[Any]:
    if isinstance(out, Mapping):
        return [leaf for name in sorted(out) for leaf in _leaves(out[name])]
    if isinstance(out, tuple | list):
        return [leaf for part in out for leaf in _leaves(part)]
    return [out]


def same_names(variables: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    return flatten_dict(dict(variables), sep="/").keys() == flatten_dict(dict(given), sep="/").keys()
