"""Which tensors the two sides draw from different distributions, with both in words and in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from parity.diagnosis.finding import Finding
from parity.diagnosis.initialisation import chance
from parity.diagnosis.initialisation.draws import Drawn
from parity.diagnosis.initialisation.schemes import Fans, words
from parity.records import kinds
from parity.records.kinds import Shape

SAME = 1e-5
"""How far two constants may be apart, relative to the largest: float32's rounding of a table."""
MOST_NAMED = 3


class Tensor(NamedTuple):
    """A tensor that both sides have.

    Attributes:
      name: PyTorch's full name.
      fans: of its layer, by Flax's layout.
      torch, flax: what either side drew, in Flax's layout.
      is_variance: it is the moving variance of a norm.
      is_sum: it is the sum of two tensors in PyTorch, as the biases of a cell.
    """

    name: str
    fans: Fans
    torch: Drawn
    flax: Drawn
    is_variance: bool = False
    is_sum: bool = False

    @property
    def is_random(self) -> bool:
        """Both sides draw some of the numbers at random, and the same ones."""
        return self.torch.is_random and self.flax.is_random and self.size >= chance.LEAST

    @property
    def size(self) -> int:
        """How many numbers of either side are compared."""
        return min(len(self.torch.numbers), len(self.flax.numbers))


class Outcome(NamedTuple):
    """What is found of one tensor: how improbable it is by chance (in powers of ten), what is allowed, the finding."""

    tensor: Tensor
    error: float
    bound: float
    finding: Finding | None


def outcomes(tensors: Sequence[Tensor]) -> list[Outcome]:
    """Of every tensor. All the random ones share one probability of a false alarm, `chance.FALSE_ALARM`."""
    bound = chance.bound(sum(t.is_random for t in tensors))
    found = []
    for tensor in tensors:
        error = math.inf if _fixed_otherwise(tensor) else _improbability(tensor)
        found.append(Outcome(tensor, error, bound, _finding(tensor) if error > bound else None))
    return found


def fans(kind: str, shape: Shape, kernel: Shape | None) -> Fans:
    """Of a tensor of a layer.

    Args:
      kind: of the layer.
      shape: the tensor's, in Flax's layout; a kernel's is [*k, in / groups, out].
      kernel: of the layer's kernel, where it has one and this is not it: of a bias.
    """
    if kind in kinds.PRODUCTS:
        shape = shape if len(shape) >= 2 else kernel or ()
        positions = math.prod(shape[:-2])
        return Fans(positions * shape[-2], positions * shape[-1]) if len(shape) >= 2 else Fans()
    return Fans(width=shape[-1]) if kind == "embedding" and len(shape) == 2 else Fans()


def unseen(tensors: Sequence[Tensor], networks: int) -> list[str]:
    """What could not have been seen, in sentences."""
    random = [t for t in tensors if t.is_random]
    told = []
    if random:
        most, least = max(random, key=lambda t: t.size), min(random, key=lambda t: t.size)
        ratio = {t.name: f"{chance.unseen_ratio(t.size, len(random)):.3g} in {t.name}" for t in (least, most)}
        told.append(
            f"{networks} new networks a side; the probability of a false alarm is below {chance.FALSE_ALARM:.0e}. A "
            f"factor between two standard deviations is not seen below {', '.join(ratio.values())}; seeds= lowers it"
        )
    small = [t.name for t in random if t.size < chance.least_cut(len(random))]
    if small:
        named = ", ".join(small[:MOST_NAMED])
        named += f" and {len(small) - MOST_NAMED} more" if len(small) > MOST_NAMED else ""
        told.append(f"whether a normal is cut off at two standard deviations is not seen in {named}: too few numbers")
    return told


def numbers(drawn: Drawn) -> dict[str, Any]:
    """Mean, standard deviation, the farthest number in deviations from the mean, and how many numbers these are of."""
    count = len(drawn.numbers) if drawn.is_random else drawn.first.size
    return {"mean": drawn.mean, "std": drawn.std, "extreme": drawn.reach, "numbers": count}


def told(outcome: Outcome) -> str:
    """The numbers of a tensor that differs."""
    sides = [
        f"mean {of['mean']:.3g}, std {of['std']:.3g}, farthest at {of['extreme']:.3g} std in {name}"
        for name, of in (("PyTorch", numbers(outcome.tensor.torch)), ("Flax", numbers(outcome.tensor.flax)))
    ]
    return f"{outcome.tensor.name}: {'; '.join(sides)}"


def _fixed_otherwise(tensor: Tensor) -> bool:
    """Whether what never changes is not the same on both sides: numbers, or right angles."""
    torch, flax = tensor.torch, tensor.flax
    if torch.is_random != flax.is_random:
        return True
    if torch.is_random and not (torch.is_continuous and flax.is_continuous):
        return False
    if torch.is_orthogonal != flax.is_orthogonal or not np.array_equal(torch.fixed, flax.fixed):
        return True
    a, b = torch.first[torch.fixed], flax.first[flax.fixed]
    return bool(np.abs(a - b).max(initial=0) > SAME * np.abs(a).max(initial=1e-30))


def _improbability(tensor: Tensor) -> float:
    return chance.improbability(tensor.torch.numbers, tensor.flax.numbers) if tensor.is_random else 0.0


def _finding(tensor: Tensor) -> Finding:
    ways = [words(drawn, tensor.fans) for drawn in (tensor.torch, tensor.flax)]
    if tensor.is_sum and tensor.torch.is_random:
        ways[0] = f"a sum of two tensors, std {tensor.torch.std:.3g}"
    if tensor.is_variance and not tensor.torch.is_random and not tensor.flax.is_random:
        return Finding("initial-variance", f"the moving variance is {ways[0]} in PyTorch, {ways[1]} in Flax")
    if ways[0] == ways[1]:
        ways = [f"{way}, mean {d.mean:.4g}, std {d.std:.4g}, farthest at {d.reach:.3g} std" for way, d in
                zip(ways, (tensor.torch, tensor.flax), strict=True)]  # fmt: skip
    local = tensor.name.rpartition(".")[2]
    return Finding("initialisation", f"the {local} of new networks is in PyTorch {ways[0]}; in Flax {ways[1]}")
