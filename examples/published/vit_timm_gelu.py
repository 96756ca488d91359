"""timm's ViT and Google's: exact GELU against its tanh approximation.

Where: https://github.com/google-research/vision_transformer, commit c6de1e5378c9831a8477feb30994971bdc409e46,
vit_jax/models_vit.py:90 calls `nn.gelu(x)`, in Flax the tanh approximation: so these networks were trained.
https://github.com/huggingface/pytorch-image-models, commit aa4b5850c1543fa488abf260f18390eda46cf85d,
timm/models/vision_transformer.py:803 takes `nn.GELU`, the exact one, for the same weights.

What it does: at most 5e-4 at each activation. timm has `act_layer="gelu_tanh"` for those who want it as it was trained.

Run: python -m examples.published.vit_timm_gelu
"""

import flax.linen as nn
import numpy as np
import torch

import parity


class FlaxMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.gelu(nn.Dense(32)(x)))


def check(approximate: str = "none") -> parity.Report:
    """The MLP of a block: `activation`. With `approximate="tanh"` in PyTorch it is gone."""
    torch.manual_seed(0)
    torch_mlp = torch.nn.Sequential(
        torch.nn.Linear(8, 32), torch.nn.GELU(approximate=approximate), torch.nn.Linear(32, 8)
    )
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    return parity.check(torch_mlp, FlaxMLP(), x, train=False, flax_inputs=[x])


if __name__ == "__main__":
    print(check())
