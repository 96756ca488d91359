"""BatchNorm: the nn.Module over `torch_bn.batch_norm`. It only keeps the state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bn_common.checks import check_epsilon, check_initial_moving_var, check_int, check_momentum, require
from torch_bn.batch_norm import batch_norm, check_tensor, wide_dtype


class BatchNorm(nn.Module):
    """Batch normalisation over every axis but axis 1.

    Parameters gamma and beta, buffers moving_mean and moving_var, each [C]: all four are in the state_dict, move with
    `.to(device)` and survive `torch.save`; `.half()` leaves the statistics in float32. In training mode a call moves
    the moving statistics as `torch_bn.batch_norm` says; in eval mode it predicts with them.

    The defaults are this project's convention: momentum 0.9 is the weight of the OLD value, moving_var starts at 0 and
    is kept from the biased variance (PyTorch: 0.1 as weight of the new value, 1, unbiased).

    Args:
      num_features: C.
      num_dims: rank of the input, 2 or more: 2 behind a linear layer, 4 behind a convolution.
      momentum: weight of the OLD value.
      eps: added to the variance.
      unbiased_moving_var: see `torch_bn.batch_norm`.
      initial_moving_var: value that moving_var starts with.
      device, dtype: of the parameters; the statistics have that dtype too, but at least float32.

    Raises:
      ValueError: num_features < 1, num_dims < 2, a momentum or eps that `torch_bn.batch_norm` refuses, or a negative
        initial_moving_var.
    """

    moving_mean: Tensor
    moving_var: Tensor

    def __init__(
        self,
        *,
        num_features: int,
        num_dims: int,
        momentum: float = 0.9,
        eps: float = 1e-5,
        unbiased_moving_var: bool = False,
        initial_moving_var: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("num_features", num_features, 1)
        check_int("num_dims", num_dims, 2)
        check_momentum(momentum)
        check_epsilon("eps", eps)
        check_initial_moving_var(initial_moving_var)
        self.num_features, self.num_dims = num_features, num_dims
        self.momentum, self.eps = momentum, eps
        self.unbiased_moving_var, self.initial_moving_var = unbiased_moving_var, initial_moving_var
        self.gamma = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        mean = torch.zeros(num_features, device=device, dtype=wide_dtype(self.gamma.dtype))
        self.register_buffer("moving_mean", mean)
        self.register_buffer("moving_var", torch.full_like(mean, initial_moving_var))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [N, C, ...] of rank num_dims.

        Raises:
          ValueError: another rank, and all that `torch_bn.batch_norm` refuses; the moving statistics stay as they were.
        """
        check_tensor("x", x)
        require(x.ndim == self.num_dims, "the rank of x", f"{x.ndim} (shape {tuple(x.shape)})", f"{self.num_dims}")
        y, moving_mean, moving_var = batch_norm(
            x,
            self.gamma,
            self.beta,
            self.moving_mean,
            self.moving_var,
            train=self.training,
            momentum=self.momentum,
            eps=self.eps,
            unbiased_moving_var=self.unbiased_moving_var,
        )
        if self.training:
            with torch.no_grad():
                self.moving_mean.copy_(moving_mean)
                self.moving_var.copy_(moving_var)
        return y

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
        """What print(module) shows in the brackets."""
        return f"num_features={self.num_features}, num_dims={self.num_dims}, momentum={self.momentum}, eps={self.eps}"
