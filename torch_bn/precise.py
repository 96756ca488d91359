"""Precise statistics: the moving statistics of a trained network estimated anew, over a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_common.checks import require
from image_data import FeatureStatistics
from torch_bn.batch_norm import Options, Statistics, batch_statistics
from torch_bn.layers import BatchNorm


def precise_statistics(
    module: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Replace the moving statistics of every batch norm by those of a whole data set (paper, Algorithm 2).

    A moving average remembers the last batches only, and the network has changed under it. Here the network stays as
    it is: each batch goes through it once, normalised with its own statistics, as in training; and of all that comes in
    at a batch norm, over all batches, mean and variance are taken, merged exactly from (m, mean, squared deviations) in
    float64 (Chan, Golub and LeVeque 1979). One batch is held at a time; batches may differ in size, but behind a
    linear layer two examples are the least (`drop_last=True` of a loader).

    The variance is the unbiased one, as in Algorithm 2, where the layer keeps the unbiased (PyTorch's layers do), else
    the biased. Dropout and all that is no batch norm runs in eval mode meanwhile; the modes are then as they were.
    Layers with frozen statistics keep them.

    Args:
      module: the trained network; its batch norms are `torch_bn.BatchNorm` or PyTorch's own.
      batches: the data set; an iterable, read once.
      forward: how a batch goes through the module (default: module(batch)); for a loader of pairs of images and
        labels, lambda module, batch: module(batch[0]).

    Raises:
      ValueError: no batch norm in the module, no batch, a batch norm that no batch came through, or whose input is not
        finite. No statistic has changed then.
    """
    layers: dict[BatchNorm | _BatchNorm, str] = {}
    for name, layer in module.named_modules():
        if (isinstance(layer, BatchNorm) and not layer.frozen_statistics) or (
            isinstance(layer, _BatchNorm) and layer.running_mean is not None
        ):
            layers[layer] = name
    require(bool(layers), "the number of batch norms in the module", 0, "1 or more, with statistics that move")
    seen: dict[BatchNorm | _BatchNorm, FeatureStatistics] = {}

    def observe(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["x" if isinstance(layer, BatchNorm) else "input"]
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        options = Options(axis=layer.axis if isinstance(layer, BatchNorm) else 1, mask=mask)
        _add(seen, layer, batch_statistics(x, options), layers[layer])

    modes = {child: child.training for child in module.modules()}
    before = {layer: {name: value.clone() for name, value in layer.named_buffers()} for layer in layers}
    hooks = [layer.register_forward_pre_hook(observe, with_kwargs=True) for layer in layers]
    try:
        module.eval()
        for layer in layers:
            layer.train()
        with torch.no_grad():
            for batch in batches:
                module(batch) if forward is None else forward(module, batch)
    finally:
        for hook in hooks:
            hook.remove()
        for child, mode in modes.items():
            child.training = mode
        for layer, buffers in before.items():
            for name, value in buffers.items():
                layer.get_buffer(name).copy_(value)
    missing = [name for layer, name in layers.items() if layer not in seen]
    require(bool(seen), "the number of batches that came through a batch norm", 0, "1 or more")
    require(not missing, f"the number of batches that came through {', '.join(missing)}", 0, "1 or more")
    moving = {layer: _moving(layer, statistics, layers[layer]) for layer, statistics in seen.items()}
    for layer, values in moving.items():
        for name, new in values.items():
            layer.get_buffer(name).copy_(torch.from_numpy(new))


def _add(seen: dict[Any, FeatureStatistics], layer: Any, statistics: Statistics, name: str) -> None:
    num_values, *others = (value.cpu().numpy() if isinstance(value, Tensor) else value for value in statistics)
    shift, rest, var = (np.asarray(value, np.float64) for value in others)
    finite = np.isfinite(rest).all() and np.isfinite(var).all()
    require(bool(finite), f"the input of {name}", "NaN or infinite", "finite numbers")
    m = np.asarray(num_values).astype(np.int64)
    batch = FeatureStatistics(m, shift, rest, m * var)
    seen[layer] = seen[layer].merge(batch) if layer in seen else batch


def _moving(layer: Any, statistics: FeatureStatistics, name: str) -> dict[str, np.ndarray]:
    enough = np.min(statistics.num_examples) >= 2
    require(bool(enough), f"the number of values per channel of {name}", 1, "2 or more")
    unbiased = not isinstance(layer, BatchNorm) or layer.unbiased_moving_var
    prefix = "moving" if isinstance(layer, BatchNorm) else "running"
    var = statistics.m2 / (statistics.num_examples - int(unbiased))
    return {f"{prefix}_mean": statistics.mean, f"{prefix}_var": var}
