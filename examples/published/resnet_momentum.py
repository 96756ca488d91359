"""flaxmodels' ResNet: 0.1 is PyTorch's momentum; Flax's is the weight of the old value.

Where: https://github.com/matthias-wright/flaxmodels, commit 09bc77215032375d124e3f1eba828dd89c80a850,
flaxmodels/resnet/resnet.py:76 (and the other calls of `ops.batch_norm`) passes momentum=0.1 to a layer whose rule is
`momentum * old + (1 - momentum) * new` (ops.py:132). torchvision's ResNet, whose weights it loads, has
`nn.BatchNorm2d(momentum=0.1)`, where 0.1 is the weight of the new value.

What it does: nothing to a pretrained network that predicts. In training the moving statistics are nearly those of the
last batch, and prediction is as noisy as they are.

Run: python -m examples.published.resnet_momentum
"""

import flax.linen as nn
import numpy as np
import torch

import parity


class TorchBlock(torch.nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class FlaxBlock(nn.Module):
    channels: int = 8
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.Conv(self.channels, (3, 3), use_bias=False)(x)
        y = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(y)
        y = nn.Conv(self.channels, (3, 3), use_bias=False)(nn.relu(y))
        y = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(y)
        return nn.relu(y + x)


def check(momentum: float = 0.1) -> parity.Report:
    """Both blocks in a training step: `momentum-inverted`, in both norms. With momentum 0.9 it is gone."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(4, 8, 6, 6)).astype(np.float32)
    return parity.check(TorchBlock(), FlaxBlock(momentum=momentum), x)


if __name__ == "__main__":
    print(check())
