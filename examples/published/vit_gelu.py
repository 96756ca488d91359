"""bonsai's ViT: `jax.nn.gelu` is the tanh approximation unless told otherwise.

Where: https://github.com/jax-ml/bonsai, commit 36284254cf738d99c1c5d1e3a292d27656a0a365,
bonsai/models/vit/modeling.py:118 calls `jax.nn.gelu(x)`. The checkpoint that it loads, google/vit-base-patch16-224, is
in transformers a ViT with `hidden_act="gelu"`, the exact one.

What it does: at most 5e-4 at each activation, in all twelve blocks.

Run: python -m examples.published.vit_gelu
"""

import numpy as np
import torch
from flax import nnx

import parity


class TorchMLP(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8, eps=1e-12)
        self.linear1 = torch.nn.Linear(8, 32)
        self.linear2 = torch.nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear2(torch.nn.functional.gelu(self.linear1(self.norm(x))))


class FlaxMLP(nnx.Module):
    def __init__(self, approximate: bool, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(8, epsilon=1e-12, rngs=rngs)
        self.linear1 = nnx.Linear(8, 32, rngs=rngs)
        self.linear2 = nnx.Linear(32, 8, rngs=rngs)
        self.approximate = approximate

    def __call__(self, x):
        return x + self.linear2(nnx.gelu(self.linear1(self.norm(x)), approximate=self.approximate))


def check(approximate: bool = True) -> parity.Report:
    """The block in prediction: `activation`, exact GELU in PyTorch, its tanh approximation in Flax."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    return parity.check(TorchMLP(), FlaxMLP(approximate, rngs=nnx.Rngs(0)), x, train=False, flax_inputs=[x])


if __name__ == "__main__":
    print(check())
