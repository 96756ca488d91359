"""What a trained network makes of image files: class names and probabilities. `torch_bn/predict.py` is the same.

    python -m jax_bn.predict runs/mine shoe.png shirt.jpg
    python -m jax_bn.predict runs/mine photo.jpg --resize --invert --json
    python -m jax_bn.predict fashion.jaxexport shoe.png       what python -m jax_bn.export has written
    python -m jax_bn.predict fashion.onnx shoe.png            the same as ONNX, of either wing

Images are made grey, and have to be of the size that the network was trained on, bright on black, unless --resize and
--invert say otherwise. A wrong file is told in one line, the others are still predicted; the exit status is 2 then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from numpy.typing import NDArray

from bn_common.config import NUM_CLASS
from bn_common.onnx_files import SUFFIX, of_onnx
from bn_common.predict import program
from bn_common.predictions import Network
from bn_common.trained import FASHION_MNIST, Trained, check_weights, class_names, function_name, read_trained
from jax_bn.blenet import BLeNet

PROG = "python -m jax_bn.predict"


def network(run: Trained) -> tuple[BLeNet, Mapping[str, Any]]:
    """The network of a run, and its variables.

    Raises:
      ValueError: the weights are another network's.
    """
    dtype = None if run.precision == "float32" else jnp.dtype(run.precision)
    model = BLeNet(fig_size=run.fig_size, num_class=NUM_CLASS, epsilon=run.epsilon, dtype=dtype)
    x = jax.ShapeDtypeStruct((1, *model.image_shape), np.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    check_weights(run.weights, {name: v.shape for name, v in flatten_dict(variables, sep="/").items()})
    return model, unflatten_dict(dict(run.weights), sep="/")


def predictor(run: Trained) -> Callable[[Array], Array]:
    """The function that predicts, and that is exported: raw images uint8 [b, H, W] -> logits float32 [b, num_class]."""
    model, variables = network(run)

    def logits(images: Array) -> Array:
        # As values that only the run knows, by a 0 made of a pixel: what a compiler works out of constants beforehand,
        # it rounds otherwise than the module does, whose variables are arguments.
        zero = (images[:1, 0, 0] // 255 // 2)[0].astype(np.float32)
        given, levels = jax.tree.map(lambda v: v + jnp.broadcast_to(zero, v.shape), (variables, run.levels))
        x = levels.at[images].get(mode="promise_in_bounds")
        found: Any = model.apply(given, x[..., None], train=False)
        return found

    logits.__name__ = function_name(run.is_fashion_mnist)
    return logits


def of_run(run: Trained) -> Network:
    """A run's network, compiled for the default device.

    Raises:
      ValueError: the weights are another network's.
    """
    return _network(predictor(run), run.fig_size, class_names(run.is_fashion_mnist, NUM_CLASS))


def of_file(path: Path) -> Network:
    """The network in an exported file. JAX only: PyTorch has no such files.

    Raises:
      ValueError: it can't be read, or is not what `jax_bn.export` writes; flatbuffers is not installed.
    """
    from jax_bn.export import check_installed

    check_installed()
    allowed = "a file that python -m jax_bn.export has written, or a run folder"
    try:
        held = jax.export.deserialize(bytearray(path.read_bytes()))
        (images,), (logits,) = held.in_avals, held.out_avals
        fits = (images.dtype, len(images.shape), images.shape[1:]) == (np.uint8, 3, images.shape[1:2] * 2)
        fits = fits and (logits.dtype, len(logits.shape)) == (np.float32, 2)
    except OSError as error:
        raise ValueError(f"the run is {path}: {error.strerror}; allowed: {allowed}") from None
    except Exception as error:  # whatever a reader raises of bytes that it was not made for
        raise ValueError(f"the run is {path}, which can't be read ({error}); allowed: {allowed}") from None
    if not fits:
        raise ValueError(f"the run is {path}, another function ({images} -> {logits}); allowed: {allowed}")
    return _network(held.call, images.shape[1], class_names(held.fun_name == FASHION_MNIST, logits.shape[1]))


def _network(function: Callable[[Array], Array], fig_size: int, classes: Sequence[str]) -> Network:
    jitted = jax.jit(function)

    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.asarray(jitted(jnp.asarray(images)))

    return Network(logits, fig_size, classes)


def load(path: Path) -> Network:
    """The network of a run folder, or of an exported file; ONNX Runtime runs what is called .onnx.

    Raises:
      ValueError: it is neither.
    """
    if path.suffix == SUFFIX and path.is_file():
        return of_onnx(path)
    from jax_bn.settings import find_devices, keep_compiled

    keep_compiled()
    find_devices()
    return of_file(path) if path.is_file() else of_run(read_trained(path, "jax"))


def main(args: Sequence[str] | None = None) -> None:
    """The program: exit status 2 and one line for what it refuses."""
    program(args, prog=PROG, description=__doc__ or "", load=load)


if __name__ == "__main__":
    main()
