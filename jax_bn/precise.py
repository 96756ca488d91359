"""Precise statistics: the moving statistics of a trained network estimated anew, over a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from bn_common.checks import require
from image_data import FeatureStatistics
from jax_bn.batch_norm import Options, Statistics, batch_statistics
from jax_bn.layers import BatchNorm
from jax_bn.nnx import BatchNorm as NNXBatchNorm
from jax_bn.nnx import Observed

# JAX only: a linen layer is known by its path.
Path = tuple[str, ...]


def precise_statistics(
    apply: Callable[[Mapping[str, Any], Any], Any], variables: Mapping[str, Any], batches: Iterable[Any]
) -> dict[str, Any]:
    """The variables with the moving statistics of every batch norm taken over a whole data set (paper, Algorithm 2).

    A moving average remembers the last batches only, and the network has changed under it. Here the network stays as
    it is: each batch goes through it once, normalised with its own statistics, as in training; and of all that comes in
    at a batch norm, over all batches, mean and variance are taken, merged exactly from (m, mean, squared deviations) in
    float64 (Chan, Golub and LeVeque 1979). One batch is held at a time; batches may differ in size.

    The variance is the unbiased one, as in Algorithm 2, where the layer keeps the unbiased, else the biased. Layers
    that predict with their moving statistics (frozen, or use_running_average=True) keep them::

        model = jax_bn.BLeNet()
        variables = precise_statistics(
            lambda variables, x: model.apply(variables, x, train=True, mutable=["batch_stats"]), variables, batches
        )

    Args:
      apply: runs a linen module in training mode, dropout off, on (variables, batch); jitted here. In the module,
        `jax_bn.BatchNorm` or `flax.linen.BatchNorm`, but not inside `nn.scan`, `nn.vmap` or `nn.remat`.
      variables: of the trained network, with "batch_stats".
      batches: the data set, in what apply takes; an iterable, read once.

    Returns:
      New variables.

    Raises:
      TypeError: apply is no function; for an NNX model, see `precise_statistics_nnx`.
      ValueError: no batch, no batch norm that moves statistics, or one whose input is not finite.
    """
    unbiased: dict[Path, bool] = {}

    def observe(variables: Mapping[str, Any], batch: Any) -> dict[Path, list[Statistics]]:
        found: dict[Path, list[Statistics]] = {}

        def interceptor(call, args, kwargs, context):
            layer = context.module
            if isinstance(layer, nn.BatchNorm) and context.method_name == "__call__" and _moves(layer, args, kwargs):
                unbiased[layer.path] = isinstance(layer, BatchNorm) and layer.unbiased_moving_var
                x = args[0] if args else kwargs["x"]
                mask, groups = kwargs.get("mask"), layer.axis_index_groups
                options = Options(axis=layer.axis, mask=mask, axis_name=layer.axis_name, groups=groups)
                found.setdefault(layer.path, []).append(batch_statistics(x, options))
            return call(*args, **kwargs)

        with nn.intercept_methods(interceptor):
            apply(variables, batch)
        return found

    if isinstance(apply, nnx.Module) or not callable(apply):
        raise TypeError(f"apply is {type(apply).__name__}; allowed: a function of (variables, batch)")
    jitted = jax.jit(observe)
    seen: dict[Path, FeatureStatistics] = {}
    for batch in batches:
        for path, calls in jitted(variables, batch).items():
            for statistics in calls:
                _add(seen, path, statistics)
    flat = flatten_dict(dict(variables))
    for path, statistics in seen.items():
        for name, value in _moving(path, statistics, unbiased[path]).items():
            old = flat["batch_stats", *path, name]
            flat["batch_stats", *path, name] = jnp.asarray(value, old.dtype)
    _require_any(seen)
    return unflatten_dict(flat)


def precise_statistics_nnx(
    model: nnx.Module, batches: Iterable[Any], forward: Callable[[Any, Any], Any] | None = None
) -> None:
    """`precise_statistics` for an NNX model: the statistics of its `jax_bn.nnx.BatchNorm` layers are replaced in place.

    JAX only: Flax has two kinds of modules.

    Everything else runs in eval mode meanwhile, the batch norms in training mode; the modes are then as they were.
    Layers with frozen statistics keep them.

    Args:
      model: the trained network.
      batches: the data set; an iterable, read once.
      forward: how a batch goes through the model, forward(model, batch); `nnx.jit` of a function if it is to be
        compiled (default: model(batch)).

    Raises:
      TypeError: no NNX model.
      ValueError: no `jax_bn.nnx.BatchNorm` that moves statistics, no batch, or an input that is not finite. No
        statistic has changed then.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"the model is {type(model).__name__}; allowed: a flax.nnx.Module")
    layers = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, NNXBatchNorm)}
    layers = {path: layer for path, layer in layers.items() if not layer.frozen_statistics}
    require(bool(layers), "the number of jax_bn.nnx.BatchNorm in the model", 0, "1 or more, with statistics that move")
    seen: dict[Any, FeatureStatistics] = {}
    before = nnx.clone(nnx.state(model))
    modes = {path: dict(_modes(module)) for path, module in nnx.iter_modules(model)}
    try:
        model.eval()
        for layer in layers.values():
            layer.use_running_average = False
            layer.observed = Observed(jnp.zeros((4, *layer.mean.shape), layer.mean.dtype))
        for batch in batches:
            model(batch) if forward is None else forward(model, batch)
            for path, layer in layers.items():
                _add(seen, path, layer.observed.get_value())
    finally:
        for path, module in nnx.iter_modules(model):
            for name, value in modes[path].items():
                setattr(module, name, value)
        for layer in layers.values():
            layer.observed = nnx.data(None)
        nnx.update(model, before)
    moving = {path: _moving(path, statistics, layers[path].unbiased_moving_var) for path, statistics in seen.items()}
    _require_any(seen)
    for path, values in moving.items():
        for name, value in values.items():
            variable = getattr(layers[path], name)
            variable.set_value(jnp.asarray(value, variable.get_value().dtype))


def _modes(module: nnx.Module) -> Iterable[tuple[str, Any]]:
    """What `.train()` and `.eval()` set. JAX only: in PyTorch it is one attribute."""
    return [(name, vars(module)[name]) for name in ("use_running_average", "deterministic") if name in vars(module)]


def _moves(layer: nn.BatchNorm, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call is made in training mode. JAX only: a linen layer may be told so in the call."""
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    predicts = layer.use_running_average if given is None else given
    return not predicts and not getattr(layer, "frozen_statistics", False)


def _add(seen: dict[Any, FeatureStatistics], path: Any, statistics: Statistics | Array) -> None:
    num_values, shift, rest, var = (np.asarray(value).astype(np.float64) for value in statistics[:4])
    finite = np.isfinite(rest).all() and np.isfinite(var).all()
    require(bool(finite), f"the input of {_name(path)}", "NaN or infinite", "finite numbers")
    m = np.broadcast_to(num_values, var.shape).astype(np.int64)
    batch = FeatureStatistics(m, shift, rest, m * var)
    seen[path] = seen[path].merge(batch) if path in seen else batch


def _moving(path: Any, statistics: FeatureStatistics, unbiased: bool) -> dict[str, np.ndarray]:
    enough = np.min(statistics.num_examples) >= 2
    require(bool(enough), f"the number of values per channel of {_name(path)}", 1, "2 or more")
    return {"mean": statistics.mean, "var": statistics.m2 / (statistics.num_examples - int(unbiased))}


def _name(path: Any) -> str:
    """How messages name a layer. JAX only: see `Path`."""
    return "/".join(map(str, path))


def _require_any(seen: Mapping[Any, FeatureStatistics]) -> None:
    """JAX only: linen's layers are known by the calls that are seen."""
    allowed = "1 or more: batches, batch norms, and these in training mode"
    require(bool(seen), "the number of batch norms that a batch came through in training mode", 0, allowed)
