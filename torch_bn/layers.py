"""BatchNorm: the nn.Module over `torch_bn.batch_norm`. It only keeps the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from bn_common.checks import (
    FLOAT_DTYPES,
    channel_axes,
    check_epsilon,
    check_initial_moving_var,
    check_int,
    check_momentum,
    require,
)
from bn_common.conventions import PYTORCH, Convention, complement, convert_moving_var
from torch_bn.arrays import check_array, dtype_name, to_dtype, wide_dtype
from torch_bn.batch_norm import Options, batch_norm_with


class BatchNorm(nn.Module):
    """Batch normalisation over every axis but the channels'.

    Parameters gamma and beta, buffers moving_mean and moving_var, each [C]: all four are in the state_dict, move with
    `.to(device)` and survive `torch.save`; `.half()` leaves the statistics in float32. In training mode a call moves
    the moving statistics as `torch_bn.batch_norm` says; in eval mode it predicts with them. With momentum None there
    is a fifth, the buffer num_batches_tracked.

    The defaults are this project's convention: momentum 0.9 is the weight of the OLD value, moving_var starts at 0 and
    is kept from the biased variance (PyTorch: 0.1 as weight of the new value, 1, unbiased). `BatchNorm.from_native`
    takes a layer of PyTorch's over as it is.

    Args:
      num_features: C.
      num_dims: rank of the input, 2 or more: 2 behind a linear layer, 4 behind a convolution; several, if it may vary.
      momentum: weight of the OLD value; None: every batch weighs the same.
      eps: added to the variance.
      unbiased_moving_var: see `torch_bn.batch_norm`.
      initial_moving_var: value that moving_var starts with.
      use_scale, use_bias: have gamma, have beta.
      axis: the channel axis.
      frozen_statistics: predict with the moving statistics in training mode too, and leave them: gamma and beta are
        trained on.
      device, dtype: of the parameters; the statistics have that dtype too, but at least float32.

    Raises:
      ValueError: num_features < 1, num_dims < 2, a momentum or eps that `torch_bn.batch_norm` refuses, or a negative
        initial_moving_var.
    """

    moving_mean: Tensor
    moving_var: Tensor
    num_batches_tracked: Tensor | None
    group: dist.ProcessGroup | None = None
    """See `torch_bn.batch_norm`; set by `synchronize`."""

    def __init__(
        self,
        *,
        num_features: int,
        num_dims: int | Sequence[int],
        momentum: float | None = 0.9,
        eps: float = 1e-5,
        unbiased_moving_var: bool = False,
        initial_moving_var: float = 0.0,
        use_scale: bool = True,
        use_bias: bool = True,
        axis: int = 1,
        frozen_statistics: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("num_features", num_features, 1)
        ranks = num_dims if isinstance(num_dims, Sequence) else [num_dims]
        require(len(ranks) > 0, "num_dims", repr(num_dims), "a rank of 2 or more, or several")
        for rank in ranks:
            check_int("num_dims", rank, 2)
            channel_axes(axis, rank)
        name = dtype_name(torch.get_default_dtype() if dtype is None else dtype)
        require(name in FLOAT_DTYPES, "dtype", name, ", ".join(FLOAT_DTYPES))
        check_momentum(momentum)
        check_epsilon("eps", eps)
        check_initial_moving_var(initial_moving_var)
        self.num_features, self.num_dims = num_features, num_dims
        self.momentum, self.eps = momentum, eps
        self.unbiased_moving_var, self.initial_moving_var = unbiased_moving_var, initial_moving_var
        self.axis, self.frozen_statistics = axis, frozen_statistics
        ones = torch.ones(num_features, device=device, dtype=dtype)
        self.gamma = nn.Parameter(ones) if use_scale else None
        self.beta = nn.Parameter(torch.zeros_like(ones)) if use_bias else None
        mean = torch.zeros_like(ones, dtype=wide_dtype(ones.dtype))
        self.register_buffer("moving_mean", mean)
        self.register_buffer("moving_var", torch.full_like(mean, initial_moving_var))
        counter = torch.zeros((), dtype=torch.int64, device=device) if momentum is None else None
        self.register_buffer("num_batches_tracked", counter)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise x [N, C, ...], or with the channels where axis says.

        Args:
          x: of rank num_dims.
          mask: which positions count in the statistics, see `torch_bn.batch_norm`.

        Raises:
          ValueError: another rank, and all that `torch_bn.batch_norm` refuses; the moving statistics stay as they were.
        """
        check_array("x", x)
        ranks = self.num_dims if isinstance(self.num_dims, Sequence) else (self.num_dims,)
        allowed = " or ".join(map(str, ranks))
        require(x.ndim in ranks, "the rank of x", f"{x.ndim} (shape {tuple(x.shape)})", allowed)
        train = self.training and not self.frozen_statistics
        y, moving_mean, moving_var = batch_norm_with(
            x,
            torch.ones_like(self.moving_mean) if self.gamma is None else self.gamma,
            torch.zeros_like(self.moving_mean) if self.beta is None else self.beta,
            self.moving_mean,
            self.moving_var,
            options_of(self, mask, self.num_batches_tracked),
            train=train,
        )
        if train:
            with torch.no_grad():
                self.moving_mean.copy_(moving_mean)
                self.moving_var.copy_(moving_var)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        return to_dtype(y, x.dtype)

    if TYPE_CHECKING:  # `nn.Module` declares that a call gives anything

        def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor: ...  # noqa: D102

    @classmethod
    def from_native(cls, native: nn.Module) -> BatchNorm:
        """The same layer as an `nn.BatchNorm1d`, `nn.BatchNorm2d` or `nn.BatchNorm3d`, in PyTorch's convention.

        It goes on where the native layer stands: momentum becomes the weight of the old value, the moving variance
        stays unbiased. Parameters and buffers are the same tensors, so that an optimiser keeps its hold on them (but
        for statistics below float32, which are widened); train or eval mode is kept.

        Raises:
          TypeError: another module (synchronised and lazy ones, too).
          ValueError: it tracks no statistics.
        """
        ranks = {kind: num_dims for num_dims, kind in reversed(NATIVE.items())}
        if not isinstance(native, _BatchNorm) or type(native) not in ranks:
            raise TypeError(f"the layer is {type(native).__name__}; allowed: nn.BatchNorm1d, 2d or 3d")
        tracks = native.running_mean is not None
        require(tracks, "track_running_stats", False, "True: without statistics there is nothing to predict with")
        layer = cls(
            num_features=native.num_features,
            num_dims=ranks[type(native)],
            momentum=complement(native.momentum),
            eps=native.eps,
            unbiased_moving_var=True,
            initial_moving_var=PYTORCH.initial_moving_var,
            device="meta",
        )
        layer.gamma, layer.beta = native.weight, native.bias
        for name, value in ("moving_mean", native.running_mean), ("moving_var", native.running_var):
            assert value is not None
            layer.register_buffer(name, value.to(wide_dtype(value.dtype)))
        layer.register_buffer("num_batches_tracked", native.num_batches_tracked)
        return layer.train(native.training)

    def to_native(self, *, values_per_channel: int | None = None, num_batches: int | None = None) -> _BatchNorm:
        """The same layer as PyTorch's own; of what came from `from_native`, with the same tensors again.

        A native layer keeps the unbiased variance. If this one keeps the biased, its moving variance is converted,
        for which m must be known, and n if it did not start at 0 (`bn_common.conventions.convert_moving_var`). Merely
        to predict, no conversion is wanted: load the four tensors into a native layer with `parity.weights`.

        Args:
          values_per_channel: m of every batch that this layer has seen.
          num_batches: n, how many these were.

        Raises:
          ValueError: a rank or axis that no native layer has, gamma without beta or beta without gamma, frozen
            statistics, or a biased moving variance without m.
        """
        num_dims = self.num_dims if isinstance(self.num_dims, int) else tuple(self.num_dims)
        require(num_dims in NATIVE, "num_dims", num_dims, "2, 3, (2, 3), 4 or 5, as native layers have")
        require(self.axis == 1, "axis", self.axis, "1, as native layers have")
        both = (self.gamma is None) == (self.beta is None)
        require(both, "the layer's affine map", "gamma or beta alone", "both or none, as native layers have")
        require(not self.frozen_statistics, "frozen_statistics", True, "False, as native layers have")
        moving_var = self.moving_var
        if not self.unbiased_moving_var:
            kept = Convention(self.momentum, False, self.initial_moving_var)
            converted = convert_moving_var(
                moving_var.detach().cpu().numpy(),
                kept,
                kept._replace(unbiased_moving_var=True),
                values_per_channel=values_per_channel,
                num_batches=num_batches,
            )
            moving_var = torch.from_numpy(converted).to(moving_var.device)
        native = NATIVE[num_dims](
            self.num_features,
            eps=self.eps,
            momentum=complement(self.momentum),
            affine=self.gamma is not None,
            device="meta",
        )
        native.register_parameter("weight", self.gamma)
        native.register_parameter("bias", self.beta)
        native.running_mean, native.running_var = self.moving_mean, moving_var
        counted = self.num_batches_tracked
        native.num_batches_tracked = (
            torch.tensor(num_batches or 0, device=moving_var.device) if counted is None else counted
        )
        return native.train(self.training)

    def _apply(self, fn, recurse: bool = True) -> BatchNorm:
        # `.half()` and `.to(torch.bfloat16)` come through here: the statistics follow to the device, but stay wide.
        before = {"moving_mean": self.moving_mean, "moving_var": self.moving_var}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != wide_dtype(new.dtype):
                setattr(self, name, old.to(new.device))
        return self

    def extra_repr(self) -> str:
        """What print(module) shows in the brackets: what differs from the defaults, too."""
        shown = [
            f"num_features={self.num_features}, num_dims={self.num_dims}, momentum={self.momentum}, eps={self.eps}"
        ]
        others = {
            "unbiased_moving_var": (self.unbiased_moving_var, False),
            "initial_moving_var": (self.initial_moving_var, 0.0),
            "use_scale": (self.gamma is not None, True),
            "use_bias": (self.beta is not None, True),
            "axis": (self.axis, 1),
            "frozen_statistics": (self.frozen_statistics, False),
        }
        return ", ".join(shown + [f"{name}={value}" for name, (value, usual) in others.items() if value != usual])


def synchronize(module: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Have every `torch_bn.BatchNorm` in the module take its statistics over a group (None: all processes).

    What `nn.SyncBatchNorm.convert_sync_batchnorm` does for PyTorch's own layers; changes the module in place, and
    returns it. Under `DistributedDataParallel` the gradients are then those of the whole batch. PyTorch only: in JAX
    the layers are made with an axis_name.
    """
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            layer.group = dist.group.WORLD if group is None else group
    return module


def options_of(layer: BatchNorm, mask: Tensor | None, tracked: Tensor | None) -> Options:
    """The attributes of a layer, as `batch_norm` takes them."""
    return Options(
        momentum=layer.momentum,
        epsilon=layer.eps,
        unbiased=layer.unbiased_moving_var,
        axis=layer.axis,
        mask=mask,
        tracked=tracked,
        group=layer.group,
    )


NATIVE: dict[int | tuple[int, ...], type[_BatchNorm]] = {
    (2, 3): nn.BatchNorm1d,
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
"""Rank of the input -> PyTorch's layer. PyTorch only: in JAX the layer is a drop-in for Flax's own."""
