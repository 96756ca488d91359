"""Batch norm as a user writes it in PyTorch, and the ways to write it wrongly: each class changes one method."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class HandNorm(nn.Module):
    """Biased variance; momentum is the weight of the old value; moving_var starts at 1."""

    axes: tuple[int, ...] = (0, 2, 3)

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.9) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.register_buffer("moving_mean", torch.zeros(channels))
        self.register_buffer("moving_var", torch.ones(channels))

    def uses_batch(self) -> bool:
        return self.training

    def statistics(self, x):
        mean = x.mean(self.axes, keepdim=True)
        return mean, ((x - mean) ** 2).mean(self.axes, keepdim=True)

    def move(self, mean, var, x) -> None:
        others = (0, 2, 3)
        with torch.no_grad():
            self.moving_mean.mul_(self.momentum).add_((1 - self.momentum) * mean.mean(others))
            self.moving_var.mul_(self.momentum).add_((1 - self.momentum) * var.mean(others))

    def normalise(self, x, mean, var):
        return (x - mean) / torch.sqrt(var + self.eps)

    def affine(self, x_hat):
        return x_hat * self.gamma[:, None, None] + self.beta[:, None, None]

    def forward(self, x):
        if self.uses_batch():
            mean, var = self.statistics(x)
            if self.training:
                self.move(mean, var, x)
        else:
            mean, var = self.moving_mean[:, None, None], self.moving_var[:, None, None]
        return self.affine(self.normalise(x, mean, var))


class Unbiased(HandNorm):
    def move(self, mean, var, x):
        m = x.numel() // x.shape[1]
        super().move(mean, var * m / (m - 1), x)


class Ddof(HandNorm):
    def statistics(self, x):
        mean, var = super().statistics(x)
        m = x.numel() // x.shape[1]
        return mean, var * m / (m - 1)

    def move(self, mean, var, x):
        m = x.numel() // x.shape[1]
        super().move(mean, var * (m - 1) / m, x)


class Frozen(HandNorm):
    def move(self, mean, var, x):
        """Forgotten."""


class EpsOutside(HandNorm):
    def normalise(self, x, mean, var):
        return (x - mean) / (torch.sqrt(var) + self.eps)


class AlwaysBatch(HandNorm):
    def uses_batch(self):
        return True


class AlwaysMoving(HandNorm):
    def uses_batch(self):
        return False


class PerRow(HandNorm):
    axes = (0, 3)


class PerPixel(HandNorm):
    axes = (0,)


class PerImage(HandNorm):
    axes = (2, 3)


class Swapped(HandNorm):
    def affine(self, x_hat):
        return x_hat * self.beta[:, None, None] + self.gamma[:, None, None]


class NoAffine(HandNorm):
    def affine(self, x_hat):
        return x_hat


class NoBeta(HandNorm):
    def affine(self, x_hat):
        return x_hat * self.gamma[:, None, None]


class Stopped(HandNorm):
    def statistics(self, x):
        mean, var = super().statistics(x)
        return mean.detach(), var.detach()


class StoppedVariance(HandNorm):
    def statistics(self, x):
        mean, var = super().statistics(x)
        return mean, var.detach()


class StoppedNoGrad(nn.BatchNorm2d):
    """A subclass: the statistics under no_grad, PyTorch's own function for the rest."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            m = x.numel() // x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * m / (m - 1), self.momentum)
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)


class PerDevice(HandNorm):
    """As on two devices without synchronisation; the moving statistics are their average."""

    parts = 2

    def statistics(self, x):
        pieces = [super(PerDevice, self).statistics(part) for part in x.chunk(self.parts)]
        size = len(x) // self.parts
        return tuple(torch.cat([v.expand(size, -1, -1, -1) for v in vs]) for vs in zip(*pieces, strict=True))


class PerFourDevices(PerDevice):
    parts = 4


class PerDeviceFirstKept(PerDevice):
    """The moving statistics are the first device's."""

    def move(self, mean, var, x):
        super().move(mean[:1], var[:1], x)


class BiasedBatchNorm2d(nn.BatchNorm2d):
    """PyTorch's class, with Flax's biased variance."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
                self.running_mean.mul_(1 - self.momentum).add_(self.momentum * mean)
                self.running_var.mul_(1 - self.momentum).add_(self.momentum * var)
        return F.batch_norm(
            x,
            None if self.training else self.running_mean,
            None if self.training else self.running_var,
            self.weight,
            self.bias,
            self.training,
            0.0,
            self.eps,
        )


class ModeIgnored(nn.BatchNorm2d):
    """Always with the batch's own statistics."""

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class StaysInEval(nn.BatchNorm2d):
    """A "frozen" batch norm: .train() does not reach it."""

    def train(self, mode: bool = True):
        return super().train(False)
