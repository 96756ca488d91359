"""Which peers there are, and the check that they are the same network."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import installed

REFERENCE = "torch_native"
TRAIN, PREDICT = "train", "predict"
CHECKED_STEPS = 5

# Forward in float32, relative. Two correct networks differ by some rounding errors of 6e-8 a layer; a network with
# another epsilon (1e-3), pool, padding or order of the flattened images differs by 1e-4 or far more.
FORWARD_BOUND = 1e-5
# A first step of Adam is lr * sign(gradient) for however small a gradient. Where it is rounding noise (a bias before a
# batch norm has a true gradient of 0), two correct networks step in different directions: such a bias does not reach
# the loss, and another parameter reaches it by 2 * lr * its gradient, which is as small as the noise. What is left is
# the noise of five forward passes; another learning rate, beta or loss is off by 1e-3 and more.
STEPS_BOUND = 1e-4


class Peer(NamedTuple):
    """How to make a network, and in what kind of process.

    Attributes:
      make: "module:function", a function of (weights, fig_size) that gives a Network; imported in its own process.
      module: what must be installed, by pip's extra `extra` of this project.
      framework: "jax" or "torch".
      modes: what of it is measured.
      is_quick: it is measured in a quick run too.
      compiles: it needs a C++ compiler.
      environment: variables that are set before anything is imported.
    """

    make: str
    module: str
    framework: str
    modes: tuple[str, ...] = (TRAIN, PREDICT)
    is_quick: bool = False
    compiles: bool = False
    environment: Mapping[str, str] = {}
    extra: str = "bench"


def _jax(make: str, module: str) -> Peer:
    return Peer(f"benchmarks.step.{make}", module, "jax", is_quick=True)


def _torch(make: str, **kwargs) -> Peer:
    return Peer(f"benchmarks.step.torch_peers:{make}", "torch", "torch", **kwargs)


def _keras(backend: str) -> Peer:
    return Peer(
        "benchmarks.step.keras_peer:make", "keras", backend, is_quick=True, environment={"KERAS_BACKEND": backend}
    )


PEERS = {
    "jax_bn": _jax("jax_bn_peer:loop", "jax_bn"),
    "jax_bn scan": _jax("jax_bn_peer:scan", "jax_bn")._replace(modes=(TRAIN,), is_quick=False),
    "torch_bn": _torch("ours", is_quick=True),
    "torch_bn compiled": _torch("ours_compiled", compiles=True),
    REFERENCE: _torch("native", is_quick=True),
    "torch_native compiled": _torch("native_compiled", compiles=True),
    "torch_native max-autotune": _torch("native_max_autotune", compiles=True),
    "torch_native fused Adam": _torch("native_fused_adam", modes=(TRAIN,)),
    "torch_native whole step compiled": _torch("native_whole_step", modes=(TRAIN,), compiles=True),
    "flax.linen": _jax("linen_peer:make", "flax"),
    "flax.nnx": _jax("nnx_peer:make", "flax"),
    "haiku": _jax("haiku_peer:make", "haiku"),
    "equinox": _jax("equinox_peer:make", "equinox"),
    "keras-jax": _keras("jax"),
    "keras-torch": _keras("torch"),
}
OURS = "jax_bn", "jax_bn scan", "torch_bn", "torch_bn compiled"
WITH_INPUT = "jax_bn with its input"
"""Gathering a batch from 60,000 uint8 images on the device, and standardising it, too; measured beside jax_bn."""
INPUT_PEER = _jax("jax_bn_peer:with_input", "jax_bn")


def available(peers: Mapping[str, Peer]) -> tuple[dict[str, Peer], list[str]]:
    """The peers that can be measured here, and a line about each that can't."""
    here, missing = installed(peers)
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        left_out = [name for name, peer in here.items() if peer.compiles]
        missing += [f"{name} is left out: torch.compile needs a C++ compiler, {compiler}" for name in left_out]
        here = {name: peer for name, peer in here.items() if name not in left_out}
    return here, missing


def check_losses(name: str, losses: Sequence[float], reference: Sequence[float]) -> None:
    """Raise ArithmeticError, which names the peer, unless its first steps have the losses of the reference."""
    for step, bound in ((0, FORWARD_BOUND), (CHECKED_STEPS - 1, STEPS_BOUND)):
        error = abs(losses[step] - reference[step]) / abs(reference[step])
        if not error <= bound:
            raise ArithmeticError(
                f"{name} does not train the same network: the loss of step {step + 1} is {losses[step]:.7f}, "
                f"{REFERENCE}'s is {reference[step]:.7f}; relative error {error:.1e}, bound {bound:.0e}"
            )


def check_logits(name: str, logits: NDArray, reference: NDArray) -> None:
    """Raise ArithmeticError, which names the peer, unless it predicts as the reference does."""
    error = np.abs(logits - reference).max() / np.abs(reference).max() if logits.shape == reference.shape else np.inf
    if not error <= FORWARD_BOUND:
        raise ArithmeticError(
            f"{name} does not predict with the same network: relative error of the logits {error:.1e}, "
            f"bound {FORWARD_BOUND:.0e}"
        )
