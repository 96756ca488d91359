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
from torch_bn.batch_norm import batch_statistics
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
        axis = layer.axis if isinstance(layer, BatchNorm) else 1
        num_values, *others = batch_statistics(x, axis, mask)
        near, offset, var = (value.cpu().numpy().astype(np.float64) for value in others)
        m = num_values.cpu().numpy().astype(np.int64) if isinstance(num_values, Tensor) else num_values
        finite = np.isfinite(offset).all() and np.isfinite(var).all()
        require(bool(finite), f"the input of {layers[layer]}", "NaN or infinite", "finite numbers")
        batch = FeatureStatistics(m, near, offset, m * var)
        seen[layer] = seen[layer].merge(batch) if layer in seen else batch

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
    for layer, statistics in seen.items():  # all is looked at before anything is changed
        enough = np.min(statistics.num_examples) >= 2
        require(bool(enough), f"the number of values per channel of {layers[layer]}", 1, "2 or more")
    for layer, statistics in seen.items():
        unbiased = not isinstance(layer, BatchNorm) or layer.unbiased_moving_var
        prefix = "moving" if isinstance(layer, BatchNorm) else "running"
        layer.get_buffer(f"{prefix}_mean").copy_(torch.from_numpy(statistics.mean))
        var = statistics.m2 / (statistics.num_examples - int(unbiased))
        layer.get_buffer(f"{prefix}_var").copy_(torch.from_numpy(var))
