"""Weights of one shape in each other's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import flax.linen as linen
import jax.numpy as jnp
import torch
from torch import nn

from parity_tests.parity.planted.chain import Case, LinenChain, TorchChain, layer, planted, vectors
from parity_tests.parity.zoo.pair import linear, linen_variables

SIZE = 6


def chain(wing: str, count: int, order: Sequence[int], *, by_stack: bool = False):
    """Linear layers of one shape, with an activation behind each, converted in another order.

    Args:
      wing: whose weights were made of the other's: "flax": the variables are wrong, "torch": the module.
      count: how many.
      order: the i-th is given the weights of layer order[i].
      by_stack: Flax has them in one, along a scan.
    """
    torch.manual_seed(0)
    parts = {f"{kind}{i}": m for i in range(count) for kind, m in (("fc", nn.Linear(SIZE, SIZE)), ("act", nn.Tanh()))}
    module = TorchChain(parts)
    table = [(f"fc{i}", f"Dense_{i}", linear) for i in range(count)]
    right = linen_variables(module, table)["params"]
    mixed = {f"Dense_{i}": right[f"Dense_{j}"] for i, j in enumerate(order)}
    if wing == "torch":
        state = module.state_dict()
        for i, j in enumerate(order):
            for name in "weight", "bias":
                getattr(getattr(module, f"fc{j}"), name).data = state[f"fc{i}.{name}"].clone()
        mixed = right
    if by_stack:
        stacked = {name: jnp.stack([mixed[f"Dense_{i}"][name] for i in range(count)]) for name in ("kernel", "bias")}
        return planted(
            module, Scanned(count), vectors(SIZE), fresh=True, variables={"params": {"scan": {"Dense_0": stacked}}}
        )
    made = [part for _ in range(count) for part in (layer(linen.Dense, SIZE), lambda x, train: jnp.tanh(x))]
    return planted(module, LinenChain(tuple(made)), vectors(SIZE), fresh=True, variables={"params": mixed})


class Turn(linen.Module):
    """One layer of the scan."""

    @linen.compact
    def __call__(self, x, _):
        return jnp.tanh(linen.Dense(SIZE)(x)), None


class Scanned(linen.Module):
    """As many layers in one."""

    count: int

    @linen.compact
    def __call__(self, x, train=False):
        scan = linen.scan(Turn, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.count)
        return scan(name="scan")(x, None)[0]


def cases() -> Iterator[Case]:
    """Every case."""
    as_text = [int(name) for name in sorted(map(str, range(12)))]
    for wing in "torch", "flax":
        yield Case("weight-order", wing, "alone", "two", partial(chain, wing, 2, [1, 0]), ("fc0",))
        yield Case("weight-order", wing, "deep", "as-text", partial(chain, wing, 12, as_text), ("fc2",))
        yield Case("weight-order", wing, "deep", "scan", partial(chain, wing, 3, [2, 1, 0], by_stack=True), ("fc0",))
