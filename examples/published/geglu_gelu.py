"""Stable Diffusion's FlaxGEGLU: the gate is the tanh approximation of GELU, in PyTorch the exact one.

Where: https://github.com/huggingface/diffusers, commit 13a7bee4878d62fccc8d25f97e480e68de96fa03 (the last with Flax),
src/diffusers/models/attention_flax.py:524 multiplies with `nn.gelu(hidden_gelu)`;
src/diffusers/models/activations.py:111, the same layer in PyTorch, with `F.gelu(gate)`.

What it does: at most 5e-4 of the other half, in each feed-forward layer.

Run: python -m examples.published.geglu_gelu
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch

import parity


class TorchGEGLU(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(8, 32)
        self.out = torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * torch.nn.functional.gelu(gate))


class FlaxGEGLU(nn.Module):
    approximate: bool = True

    @nn.compact
    def __call__(self, x):
        value, gate = jnp.split(nn.Dense(32, name="proj")(x), 2, axis=-1)
        return nn.Dense(8, name="out")(value * nn.gelu(gate, approximate=self.approximate))


def check(approximate: bool = True) -> parity.Report:
    """The layer in prediction: `gate`, exact GELU in PyTorch, its tanh approximation in Flax."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    return parity.check(TorchGEGLU(), FlaxGEGLU(approximate), x, train=False, flax_inputs=[x])


if __name__ == "__main__":
    print(check())
