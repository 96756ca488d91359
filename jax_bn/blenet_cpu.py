"""BLeNet as XLA runs it fastest on a CPU: the same network as `blenet.py`, in another layout.

JAX only: PyTorch has one form. GPU and TPU never see it.

XLA's CPU convolutions are slow where there are few channels, and worse in the gradient, and its elementwise loops leave
vector registers idle where the last axis is 6 or 16 long. So:

- The layout is [H, W, C, N], examples last: whatever is done element by element, batch norm and the pools included,
  runs over N in full vector registers. The images are transposed once, at the entrance. Features are [F, N].
- A convolution is a handful of matrix products. A block of b x b outputs depends on (b + kh - 1) (b + kw - 1) input
  positions; these are a matrix with N columns, and the kernel written out once for each output, with zeros elsewhere,
  is the small matrix [b b co, (b + kh - 1) (b + kw - 1) ci] that takes one to the other. Unfolding the images would
  copy every pixel kh kw times; so it is 2 to 4 times, and the products are 1.4 to 2.6 times as long.
- Where a pixel has few taps (25, with one channel), in training the outputs are sums of shifted images instead, one
  loop that XLA fuses into the statistics. Its derivative is that of the blocks: a sum per tap would read everything 25
  times. In prediction nothing waits for statistics, and the blocks, one by one, take half the time.
- A bias before a batch norm moves nothing but the moving mean, so it is added there. Its gradient is exactly 0, where
  `blenet.py` and PyTorch have rounding noise.

Batches of a few examples run the layers, whatever the platform; of a symbolic size (`jax.export`) both forms are
traced, and the size decides when it is known.

No derivative is written by hand but for that choice; so all of JAX's transformations apply.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array, lax

from jax_bn.batch_norm import BatchStats, Options, batch_norm_with
from jax_bn.devices import send

# Below a vector register of examples there is nothing to gain.
FEWEST_EXAMPLES = 16
# Height and width up to which this form predicts faster: the blocks of larger images, made at once, are in no cache.
LARGEST_PREDICTED = 80
# Up to so many taps a pixel the shifted images are faster in training.
MOST_TAPS = 32
# Outputs of a block, down and across: in larger ones more of the matrix is zeros, in smaller ones of few taps it
# is too small to be multiplied fast.
SIZE, SIZE_OF_FEW_TAPS = 2, 4
# Products one by one are faster, but each is an operation of its own, to be compiled, in training with two more for its
# derivative; more than these are made at once.
MOST_PRODUCTS, MOST_PRODUCTS_IN_PREDICTION = 36, 64


def takes(model: Any, x: Array, train: bool) -> bool:
    """Whether this call of a BLeNet may be computed here: not where layers are made or looked at, or dtypes are mixed.

    model is the module within its call, bound to its variables.
    """
    if model.platform not in (None, "cpu") or model.dtype not in (None, x.dtype):
        return False
    # Flax has no public name for the interceptors; a test sees that they see the layers.
    watched = model.is_mutable_collection("intermediates") or bool(nn.module._global_interceptor_stack)
    if watched or model.is_initializing() or is_small(x.shape[0]):
        return False
    if not train and model.fig_size > LARGEST_PREDICTED:
        return False
    given = {path: (v.shape, v.dtype) for path, v in _flat(model.variables).items() if hasattr(v, "shape")}
    # Of variables that do not fit, `BLeNet.layers` says in Flax's words what is wrong.
    wanted = _shapes(model.clone(parent=None, name=None))
    return x.dtype in (jnp.float32, jnp.float64) and given == {path: (shape, x.dtype) for path, shape in wanted}


def is_small(batch_size: Any) -> bool | None:
    """Whether a batch is left to the layers; None of a symbolic size (`jax.export`) that may be either."""
    try:
        return bool(batch_size < FEWEST_EXAMPLES)
    except jax.errors.InconclusiveDimensionOperation:
        return None


def apply(model: Any, x: Array, train: bool, mask: Array | None = None) -> Array:
    """The logits of a call that `takes` has taken; in training the model's batch_stats move."""
    variables = {name: model.variables[name] for name in ("params", "batch_stats")}
    logits, batch_stats = _by_platform(model.clone(parent=None, name=None), variables, x, train, mask)
    if train:
        for name, value in batch_stats.items():
            model.put_variable("batch_stats", name, value)
    return logits


def _flat(variables: Any) -> dict[tuple[str, ...], Any]:
    return flatten_dict({name: variables[name] for name in ("params", "batch_stats") if name in variables})


@functools.lru_cache(maxsize=64)
def _shapes(model: Any) -> frozenset[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The shapes of a model's variables by their paths."""
    x = jax.ShapeDtypeStruct((1, *model.image_shape), model.param_dtype)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    return frozenset((path, v.shape) for path, v in _flat(variables).items())


# Compiled as one, so that a call outside of `jax.jit` compiles neither form twice.
@functools.partial(jax.jit, static_argnums=(0, 3), inline=True)
def _by_platform(model: Any, variables: Any, x: Array, train: bool, mask: Array | None) -> tuple[Array, Any]:
    """Logits and the new batch_stats: `BLeNet.layers`, or on a CPU `forward`."""

    def layers(variables: Any, x: Array, mask: Array | None) -> tuple[Array, Any]:
        logits, updated = model.apply(variables, x, train, mask, method="layers", mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    def blocks(variables: Any, x: Array, mask: Array | None) -> tuple[Array, Any]:
        # One for each of x's columns there, which are the examples.
        options = Options(model.momentum, model.epsilon, mask=mask, axis_name=model.axis_name, platform="cpu")
        return forward(variables["params"], variables["batch_stats"], x, options, train=train)

    def by_size(variables: Any, x: Array, mask: Array | None) -> tuple[Array, Any]:
        # Settled when the program is compiled for a size: the branch not taken costs nothing.
        return lax.cond(jnp.asarray(x.shape[0]) < FEWEST_EXAMPLES, layers, blocks, variables, x, mask)

    cpu = blocks if is_small(x.shape[0]) is False else by_size
    if model.platform == "cpu":
        return cpu(variables, x, mask)
    return lax.platform_dependent(variables, x, mask, cpu=cpu, default=layers)


def forward(
    params: Any, batch_stats: Any, x: Array, options: Options, *, train: bool
) -> tuple[Array, dict[str, dict[str, Array]]]:
    """What `BLeNet` gives for images x [N, H, W, C], and its new batch_stats.

    params and batch_stats are BLeNet's variables, all of x's dtype; options of every batch norm, but for the axis.
    """
    moved = {}

    def norm(x: Array, name: str, axis: int, before: Any) -> Array:
        # As if the bias of the layer before had been added to x.
        bias, affine, old = before["bias"], params[name], batch_stats[name]
        old = BatchStats(old["mean"] - bias, old["var"])
        y, new = batch_norm_with(x, affine["scale"], affine["bias"], old, options._replace(axis=axis), train=train)
        moved[name] = {"mean": new.mean + bias, "var": new.var}
        return y

    def convolution(x: Array, i: int) -> Array:
        layer = params[f"Conv_{i}"]
        x = jax.nn.sigmoid(norm(convolve(x, send(layer["kernel"], x), train=train), f"BatchNorm_{i}", 2, layer))
        return average_pool(x, train=train)

    def dense(x: Array, i: int) -> Array:
        layer = params[f"Dense_{i}"]
        return jax.nn.sigmoid(norm(send(layer["kernel"], x).T @ x, f"BatchNorm_{i + 2}", 0, layer))

    x = x.transpose(1, 2, 3, 0)
    # Not by jnp.pad: of what a tap in the middle sees, XLA would make the image before it was padded and transposed.
    padded = jnp.zeros((x.shape[0] + 4, x.shape[1] + 4, *x.shape[2:]), x.dtype)
    x = lax.dynamic_update_slice(padded, x, (2, 2, 0, 0))
    x = convolution(convolution(x, 0), 1)
    x = dense(dense(x.reshape(-1, x.shape[-1]), 0), 1)
    last = {name: send(v, x) for name, v in params["Dense_2"].items()}
    logits = (last["kernel"].T @ x).T + last["bias"][None]
    return logits, moved if train else batch_stats


def average_pool(x: Array, *, train: bool) -> Array:
    """Mean of every 2x2 of x [H, W, C, N]; an odd last row or column has no part in it.

    In training as a reduction, whose derivative is one broadcast; in prediction as a sum, which takes less time.
    """
    rows, columns = x.shape[0] // 2, x.shape[1] // 2
    x = x[: 2 * rows, : 2 * columns]
    if train:
        return x.reshape(rows, 2, columns, 2, *x.shape[2:]).mean((1, 3))
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


def convolve(x: Array, w: Array, *, train: bool) -> Array:
    """Valid convolution, stride 1: y[h, k, o] = sum over i, j, c of w[i, j, c, o] * x[h + i, k + j, c].

    Args:
      x: [H, W, ci, N].
      w: [kh, kw, ci, co], as Flax has it.
      train: choose the form that is faster in training, not that in prediction.

    Returns:
      [H - kh + 1, W - kw + 1, co, N].
    """
    if not train:
        return _by_blocks(x, w, MOST_PRODUCTS_IN_PREDICTION)
    return _by_taps(x, w) if math.prod(w.shape[:3]) <= MOST_TAPS else _by_blocks(x, w)


@jax.custom_jvp
def _by_taps(x: Array, w: Array) -> Array:
    kh, kw, ci, _ = w.shape
    rows, columns = x.shape[0] - kh + 1, x.shape[1] - kw + 1
    terms = (
        x[i : i + rows, j : j + columns, c, None] * w[None, None, i, j, c, :, None]
        for i, j, c in itertools.product(range(kh), range(kw), range(ci))
    )
    return sum(terms, start=jnp.zeros((), x.dtype))


@_by_taps.defjvp
def _by_taps_jvp(primals, tangents):
    (x, w), (x_dot, w_dot) = primals, tangents
    return _by_taps(x, w), _by_blocks(x_dot, w) + _by_blocks(x, w_dot)


def _by_blocks(x: Array, w: Array, most_products: int = MOST_PRODUCTS) -> Array:
    rows, columns = (size - k + 1 for size, k in zip(x.shape[:2], w.shape[:2], strict=True))
    size = SIZE_OF_FEW_TAPS if math.prod(w.shape[:3]) <= MOST_TAPS else SIZE
    # What is missing in the last blocks is made up, and dropped again.
    x = jnp.pad(x, ((0, -rows % size), (0, -columns % size), (0, 0), (0, 0)))
    few = -(-rows // size) * -(-columns // size) <= most_products
    return (_one_by_one if few else _at_once)(x, w, size)[:rows, :columns]


def _one_by_one(x: Array, w: Array, size: int) -> Array:
    (kh, kw, _, co), n = w.shape, x.shape[3]
    matrix = _block_matrix(w, size)
    # Split, and not sliced: the transpose of a split is one concatenation, that of slices a sum of padded arrays.
    rows = lax.split(x, (1,) * x.shape[0])

    def block(h: int, k: int) -> Array:
        seen = jnp.concatenate([row[:, k : k + size + kw - 1] for row in rows[h : h + size + kh - 1]])
        return (matrix @ seen.reshape(-1, n)).reshape(size, size, co, n)

    down, across = (range(0, extent - k + 1, size) for extent, k in zip(x.shape[:2], (kh, kw), strict=True))
    return jnp.concatenate([jnp.concatenate([block(h, k) for k in across], 1) for h in down])


def _at_once(x: Array, w: Array, size: int) -> Array:
    (kh, kw, _, co), n = w.shape, x.shape[3]
    i, j = (x.shape[0] - kh + 1) // size, (x.shape[1] - kw + 1) // size
    x = jnp.stack([x[q : q + (i - 1) * size + 1 : size] for q in range(size + kh - 1)], 1)
    x = jnp.stack([x[:, :, q : q + (j - 1) * size + 1 : size] for q in range(size + kw - 1)], 2)
    # From [i, down, across, j, ci, N].
    seen = x.transpose(0, 3, 1, 2, 4, 5).reshape(i * j, -1, n)
    matrix = _block_matrix(w, size)
    y = (jnp.broadcast_to(matrix[None], (i * j, *matrix.shape)) @ seen).reshape(i, j, size, size, co, n)
    return y.transpose(0, 2, 1, 3, 4, 5).reshape(i * size, j * size, co, n)


def _block_matrix(w: Array, size: int) -> Array:
    """The kernel as a matrix [size^2 * co, (size + kh - 1) * (size + kw - 1) * ci], from what a block sees to it."""
    down, right = (
        jnp.asarray(np.stack([np.eye(size + k - 1, size, -i) for i in range(k)]), w.dtype) for k in w.shape[:2]
    )
    return jnp.einsum("ijco,iqa,jpb->aboqpc", w, down, right).reshape(size * size * w.shape[3], -1)
