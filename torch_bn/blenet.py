"""BLeNet: LeNet-5 (LeCun et al. 1998) with batch norm before every sigmoid, as an nn.Module.

`jax_bn/blenet.py` is the same network in Flax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bn_common.checks import check_blenet, check_blenet_input, require
from torch_bn.arrays import check_array, dtype_name, wide_dtype
from torch_bn.devices import num_shards
from torch_bn.layers import BatchNorm


class BLeNet(nn.Module):
    """LeNet-5 with batch norm: 62,158 parameters at the defaults.

    conv: Conv 5x5 channels->6 padding 2, BN, sigmoid, average pool 2x2; Conv 5x5 6->16 no padding, BN, sigmoid,
    average pool 2x2. fc: flatten; Linear 16 f f->120, BN, sigmoid; Linear 120->84, BN, sigmoid; Linear 84->num_class,
    where f = (fig_size // 2 - 4) // 2. Initial weights and biases are PyTorch's default, uniform in +-1/sqrt(fan_in).

    Args:
      channels: channels of the images, >= 1.
      fig_size: height and width of the images, >= 12.
      num_class: number of classes, >= 1.
      momentum: of every batch norm, the weight of the OLD value.
      eps: of every batch norm.
      dtype: to compute in (None: that of x and the parameters), under `torch.autocast`: convolutions, linear layers and
        what lies between are computed in it; parameters, their gradients, the statistics and arithmetic of batch norm,
        and the logits are float32.

    Raises:
      ValueError: channels, fig_size or num_class is no integer or too small; a momentum or eps that
        `torch_bn.batch_norm` refuses.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        fig_size: int = 28,
        num_class: int = 10,
        momentum: float = 0.9,
        eps: float = 1e-5,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_blenet(channels=channels, fig_size=fig_size, num_class=num_class)
        name = dtype if dtype is None else dtype_name(dtype)
        require(name in (None, *AUTOCAST), "dtype", name, f"None, {', '.join(AUTOCAST)}")
        self.dtype = dtype
        self.channels, self.fig_size, self.num_class = channels, fig_size, num_class
        f = (fig_size // 2 - 4) // 2

        def norm(num_features: int, num_dims: int) -> BatchNorm:
            return BatchNorm(num_features=num_features, num_dims=num_dims, momentum=momentum, eps=eps)

        self.conv = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2),
            norm(6, 4),
            nn.Sigmoid(),
            nn.AvgPool2d(2, 2),
            nn.Conv2d(6, 16, 5),
            norm(16, 4),
            nn.Sigmoid(),
            nn.AvgPool2d(2, 2),
        )
        self.fc = nn.Sequential(
            nn.Linear(16 * f * f, 120),
            norm(120, 2),
            nn.Sigmoid(),
            nn.Linear(120, 84),
            norm(84, 2),
            nn.Sigmoid(),
            nn.Linear(84, num_class),
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image, [C, H, W]."""
        return self.channels, self.fig_size, self.fig_size

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_class] of images x [N, channels, fig_size, fig_size].

        Raises:
          ValueError: another shape, a dtype that is no float, or fewer than two images in training mode; no moving
            statistic has changed.
        """
        check_array("x", x)
        check_blenet_input(
            shape=x.shape,
            dtype=dtype_name(x.dtype),
            layout="NCHW",
            image=self.image_shape,
            train=self.training,
            shards=num_shards(getattr(self.conv[1], "group", None)),
        )
        if self.dtype is None:
            return self.fc(self.conv(x).flatten(1))
        with torch.autocast(x.device.type, self.dtype):
            return self.fc(self.conv(x).flatten(1)).to(wide_dtype(self.dtype))

    if TYPE_CHECKING:  # `nn.Module` declares that a call gives anything

        def __call__(self, x: Tensor) -> Tensor: ...  # noqa: D102


# What `torch.autocast` computes in. PyTorch only: Flax's layers take any dtype.
AUTOCAST = ("float16", "bfloat16")
