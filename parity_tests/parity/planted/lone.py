"""A layer that one side has forgotten, or a tensor that it shares."""

from __future__ import annotations

from collections.abc import Iterator

import flax.linen as linen
import torch
from torch import nn

from parity_tests.parity.planted.chain import (
    Case,
    LinenChain,
    TorchChain,
    deep_linen,
    deep_torch,
    function,
    images,
    layer,
    planted,
    vectors,
)

PARTS = [
    "conv1", "bn1", "act1", "conv2", "bn2", "act2", "pool2", "conv3", "bn3", "act3", "pool3", "flatten", "fc1", "act4",
    "drop", "fc2", "act5", "head",
]  # fmt: skip


def tied(depth: str):
    """Two layers whose matrix is one tensor in PyTorch: wrong there, or of the copies in Flax."""
    torch.manual_seed(0)
    if depth == "alone":
        parts = {"fc1": nn.Linear(12, 12), "act": nn.Tanh(), "fc2": nn.Linear(12, 12)}
        made = layer(linen.Dense, 12), function(linen.tanh), layer(linen.Dense, 12)
        module, flax_module, x = TorchChain(parts), LinenChain(made), vectors(12)
        module.fc2.weight = module.fc1.weight
    else:
        module, flax_module, x = deep_torch(conv1=nn.Conv2d(6, 6, 3, padding=1)), deep_linen(), images(6)
        module.conv2.weight = module.conv1.weight
    return planted(module, flax_module, x, train=True)


def alone(forgetful: str):
    """A group norm between two convolutions."""
    torch.manual_seed(0)
    parts = {"conv1": nn.Conv2d(3, 8, 3, padding=1), "norm": nn.GroupNorm(2, 8), "conv2": nn.Conv2d(8, 4, 3, padding=1)}
    made = [layer(linen.Conv, 8, (3, 3)), layer(linen.GroupNorm, 2, epsilon=1e-5), layer(linen.Conv, 4, (3, 3))]
    if forgetful == "torch":
        del parts["norm"]
    else:
        del made[1]
    return planted(TorchChain(parts), LinenChain(tuple(made)), images(3, 6), train=False)


def deep(forgetful: str):
    """The batch norm of the second of three blocks."""
    torch.manual_seed(0)
    order = [name for name in PARTS if name != "bn2"]
    changed = [{"order": order} if wing == forgetful else {} for wing in ("torch", "flax")]
    return planted(deep_torch(**changed[0]), deep_linen(**changed[1]), images(), train=True)


def cases() -> Iterator[Case]:
    """Every case."""
    for wing in "torch", "flax":
        has = () if wing == "torch" else ("norm",)
        yield Case("no-partner", wing, "alone", "norm", lambda wing=wing: alone(wing), has)
        yield Case("no-partner", wing, "deep", "norm", lambda wing=wing: deep(wing), has and ("bn2",))
    for wing in "torch", "flax":
        yield Case("tied-weights", wing, "alone", "", lambda: tied("alone"), ("fc2",), "backward")
        yield Case("tied-weights", wing, "deep", "", lambda: tied("deep"), ("conv2",), "backward")
