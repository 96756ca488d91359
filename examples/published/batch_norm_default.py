"""A guide that says Flax's default momentum is 0.9; it is 0.99.

Where: https://github.com/google/flax, commit 18f8f311c275d57f46d95e41b15aa97b454754c0,
docs/guides/converting_and_upgrading/convert_pytorch_to_flax.rst:174: `torch.nn.BatchNorm2d` has 0.1 by default,
Flax's `nn.BatchNorm` 0.9, and that this is the same computation. It is, for 0.9, which the guide's own code writes out;
but the default is 0.99 (flax/linen/normalization.py:310, flax/nnx/nn/normalization.py:295).

What it does: who leaves the argument out has moving statistics that are ten times as slow.

Run: python -m examples.published.batch_norm_default
"""

import flax.linen as nn
import numpy as np
import torch

import parity


class FlaxLayers(nn.Module):
    momentum: float = 0.99

    @nn.compact
    def __call__(self, x, train: bool):
        return nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(nn.Dense(8)(x))


def check(momentum: float = 0.99) -> parity.Report:
    """Both defaults in a training step: `momentum`, 0.9 in PyTorch, 0.99 in Flax."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    torch_layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    return parity.check(torch_layers, FlaxLayers(momentum), x)


if __name__ == "__main__":
    print(check())
