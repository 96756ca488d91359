"""Which optimiser of PyTorch is which of optax, with the options that make them one rule, and where each keeps what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import optax
import torch


class PairedOptimizer(NamedTuple):
    """One update rule on both sides.

    Attributes:
      torch: (parameters, learning rate) -> torch Optimizer.
      optax: learning rate -> optax GradientTransformation.
      state: PyTorch's name of a buffer -> optax's name of the field that holds the same.
    """

    torch: Callable[[Iterable[torch.nn.Parameter], float], torch.optim.Optimizer]
    optax: Callable[[float], optax.GradientTransformation]
    state: Mapping[str, str] = {}  # a NamedTuple's default, never written to


MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}
MOMENTUM = {"momentum_buffer": "trace"}
DECAY = 0.01

OPTIMIZERS: dict[str, PairedOptimizer] = {
    "sgd": PairedOptimizer(lambda p, lr: torch.optim.SGD(p, lr), lambda lr: optax.sgd(lr)),
    "momentum": PairedOptimizer(
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), lambda lr: optax.sgd(lr, momentum=0.9), MOMENTUM
    ),
    "nesterov": PairedOptimizer(
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
        lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True),
        MOMENTUM,
    ),
    "adam": PairedOptimizer(lambda p, lr: torch.optim.Adam(p, lr), lambda lr: optax.adam(lr), MOMENTS),
    # PyTorch adds it to the gradient.
    "adam-l2": PairedOptimizer(
        lambda p, lr: torch.optim.Adam(p, lr, weight_decay=DECAY),
        lambda lr: optax.chain(optax.add_decayed_weights(DECAY), optax.adam(lr)),
        MOMENTS,
    ),
    # The defaults of the decay differ: 1e-2 in PyTorch, 1e-4 in optax.
    "adamw": PairedOptimizer(
        lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=DECAY),
        lambda lr: optax.adamw(lr, weight_decay=DECAY),
        MOMENTS,
    ),
    # Here too (0.99 and 0.9), and optax adds epsilon inside the root unless told otherwise.
    "rmsprop": PairedOptimizer(
        lambda p, lr: torch.optim.RMSprop(p, lr, alpha=0.99),
        lambda lr: optax.rmsprop(lr, decay=0.99, eps_in_sqrt=False),
        {"square_avg": "nu"},
    ),
    # Optax begins with 0.1, and its epsilon is inside the root, where PyTorch has none: 0 is common to both.
    "adagrad": PairedOptimizer(
        lambda p, lr: torch.optim.Adagrad(p, lr, initial_accumulator_value=0.1, eps=0.0),
        lambda lr: optax.adagrad(lr, initial_accumulator_value=0.1, eps=0.0),
        {"sum": "sum_of_squares"},
    ),
}


def paired(optimizer: str | PairedOptimizer) -> PairedOptimizer:
    """The table's entry, or what was given.

    Raises:
      ValueError: no such name in the table.
    """
    if isinstance(optimizer, PairedOptimizer):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {optimizer!r}; allowed: {', '.join(OPTIMIZERS)}, or a PairedOptimizer")
    return OPTIMIZERS[optimizer]
