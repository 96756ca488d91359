"""Seeded mini-batches: an epoch's order is a pure function of (seed, epoch), the same for both wings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> NDArray[np.int32]:
    """A permutation of 0 ... num_examples - 1, a pure function of its arguments.

    Raises:
      ValueError: num_examples < 1, or a seed or epoch below 0.
    """
    for name, value, low in (("num_examples", num_examples, 1), ("seed", seed, 0), ("epoch", epoch, 0)):
        if value < low:
            raise ValueError(f"{name} is {value}; allowed: an integer >= {low}")
    return np.random.default_rng((seed, epoch)).permutation(num_examples).astype(np.int32)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Whole batches in an epoch; what is left over is seen in other epochs, whose order differs.

    Raises:
      ValueError: batch_size < 1 or above num_examples.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(f"batch_size is {batch_size}; allowed: 1 to {num_examples}, the number of examples")
    return num_examples // batch_size


def epoch_batches(
    num_examples: int, batch_size: int, *, seed: int, epoch: int, first_step: int = 0
) -> Iterator[NDArray[np.int32]]:
    """The index arrays [batch_size] of one epoch, from step `first_step` on.

    Args:
      num_examples: size of the training set.
      batch_size: examples in a batch; see `steps_per_epoch` for what is left over.
      seed: see `epoch_order`.
      epoch: see `epoch_order`.
      first_step: resume here: the batches from this step on are the same as in an uninterrupted epoch.

    Raises:
      ValueError: see `steps_per_epoch` and `epoch_order`; first_step below 0 or above the steps of an epoch. Raised
        by the call, not by the first batch.
    """
    steps = steps_per_epoch(num_examples, batch_size)
    if not 0 <= first_step <= steps:
        raise ValueError(f"first_step is {first_step}; allowed: 0 to {steps}, the steps of an epoch")
    order = epoch_order(num_examples, seed=seed, epoch=epoch)
    return iter(order[: steps * batch_size].reshape(steps, batch_size)[first_step:])


def padded_batches(
    num_examples: int, batch_size: int, *, multiple: int = 1
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """(indices, weights), each [batch_size], of batches that cover every example once, in order.

    For evaluation under a compiler that wants one shape: the last batch is padded with the last example at weight 0.
    So is a batch whose size is no multiple of so many devices, which want equal shares: it is made one.
    """
    size = -(-min(batch_size, num_examples) // multiple) * multiple
    for first in range(0, num_examples, size):
        indices = np.arange(first, first + size, dtype=np.int32)
        yield np.minimum(indices, num_examples - 1), (indices < num_examples).astype(np.float32)
