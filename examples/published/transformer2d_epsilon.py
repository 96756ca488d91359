"""Stable Diffusion's FlaxTransformer2DModel: the group norm's epsilon is 1e-5 for 1e-6.

Where: https://github.com/huggingface/diffusers, commit 13a7bee4878d62fccc8d25f97e480e68de96fa03 (the last with Flax),
src/diffusers/models/attention_flax.py:388 has `nn.GroupNorm(num_groups=32, epsilon=1e-5)`;
src/diffusers/models/transformers/transformer_2d.py:177, the same layer in PyTorch, eps=1e-6.

What it does: 4.5e-6 of the norm's output at a variance of 1, more where the image is flat.

Run: python -m examples.published.transformer2d_epsilon
"""

import flax.linen as nn
import numpy as np
import torch

import parity


class FlaxEntrance(nn.Module):
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        return nn.Conv(16, (1, 1))(nn.GroupNorm(num_groups=4, epsilon=self.epsilon)(x))


def check(epsilon: float = 1e-5) -> parity.Report:
    """The norm and the projection behind it, in prediction: `epsilon`, 1e-6 in PyTorch, 1e-5 in Flax."""
    torch.manual_seed(0)
    torch_entrance = torch.nn.Sequential(torch.nn.GroupNorm(4, 16, eps=1e-6), torch.nn.Conv2d(16, 16, 1))
    x = np.random.default_rng(0).normal(size=(2, 16, 6, 6)).astype(np.float32)
    return parity.check(torch_entrance, FlaxEntrance(epsilon), x, train=False)


if __name__ == "__main__":
    print(check())
