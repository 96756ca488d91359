"""bonsai's ConvNeXt: one epsilon, 1e-12, for all layer norms, where all but the last have 1e-6.

Where: https://github.com/jax-ml/bonsai, commit 36284254cf738d99c1c5d1e3a292d27656a0a365,
bonsai/models/convnext/modeling.py:19 (`layernorm_eps: float = 1e-12`), used at :73, :100, :125 and :132. In
transformers' ConvNext `layer_norm_eps = 1e-12` is of the last norm alone; the embeddings', the blocks' and those in
front of a downsampling have 1e-6, as the original has everywhere.

What it does: a relative error of 1e-6 / (2 variance): not seen at a variance of 1, and 5 % where it is 1e-5.

Run: python -m examples.published.convnext_epsilon
"""

import numpy as np
import torch
from flax import nnx

import parity


class TorchBlock(torch.nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.dwconv = torch.nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = torch.nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = torch.nn.Linear(dim, 4 * dim)
        self.pwconv2 = torch.nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(torch.nn.functional.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class FlaxBlock(nnx.Module):
    def __init__(self, epsilon: float, dim: int = 8, *, rngs: nnx.Rngs) -> None:
        self.dwconv = nnx.Conv(dim, dim, (7, 7), padding=3, feature_group_count=dim, rngs=rngs)
        self.norm = nnx.LayerNorm(dim, epsilon=epsilon, rngs=rngs)
        self.pwconv1 = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.pwconv2 = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x):
        y = self.pwconv1(self.norm(self.dwconv(x)))
        return x + self.pwconv2(nnx.gelu(y, approximate=False))


def check(epsilon: float = 1e-12) -> parity.Report:
    """A block in prediction: `epsilon`, 1e-6 in PyTorch, 1e-12 in Flax."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(2, 8, 9, 9)).astype(np.float32)
    return parity.check(TorchBlock(), FlaxBlock(epsilon, rngs=nnx.Rngs(0)), x, train=False)


if __name__ == "__main__":
    print(check())
