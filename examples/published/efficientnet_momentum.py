"""bonsai's EfficientNet b5 to b7: momentum 0.1 in an NNX batch norm, where the checkpoint's has 0.99.

Where: https://github.com/jax-ml/bonsai, commit 36284254cf738d99c1c5d1e3a292d27656a0a365,
bonsai/models/efficientnet/modeling.py:92, :96, :100 (`"SAME", 1e-1, 1e-3`) hand 0.1 to `nnx.BatchNorm(momentum=...)`,
the weight of the old value; b0 to b4 have 0.99 there. The port is compared with timm's `tf_efficientnet_b5_ap`, whose
batch norm has `BN_MOMENTUM_TF_DEFAULT = 1 - 0.99` (timm/models/_efficientnet_builder.py:36 at commit
aa4b5850c1543fa488abf260f18390eda46cf85d), 0.01 as the weight of the new value. Its test compares prediction.

What it does: nothing in prediction. Fine-tuned with moving statistics, they follow the last batch.

Run: python -m examples.published.efficientnet_momentum
"""

import numpy as np
import torch
from flax import nnx

import parity


class TorchStem(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8, momentum=1 - 0.99, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(self.norm(self.conv(x)))


class FlaxStem(nnx.Module):
    def __init__(self, momentum: float, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=momentum, epsilon=1e-3, rngs=rngs)

    def __call__(self, x):
        return nnx.silu(self.norm(self.conv(x)))


def check(momentum: float = 0.1) -> parity.Report:
    """The stem in a training step: `momentum`, 0.99 in PyTorch, 0.1 in Flax."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    return parity.check(TorchStem(), FlaxStem(momentum, rngs=nnx.Rngs(0)), x)


if __name__ == "__main__":
    print(check())
