"""A Flax module as a function of a flat dict of arrays: what linen and NNX have in common."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, Protocol

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.linen import attention as linen_attention
from flax.nnx.nn import attention as nnx_attention
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from parity.records import trees
from parity.records.inputs import Inputs
from parity.records.kinds import HALF, path_rate
from parity.records.side import LARGE, loss_weights
from parity.sides.exchange import exchanged

FLAGS = {
    "train": False,
    "training": False,
    "is_training": False,
    "is_train": False,
    "deterministic": True,
    "use_running_average": True,
    "eval": True,
    "inference": True,
}


class _Form(str):
    """The form of a call, by which JAX knows one that it has compiled."""

    call: Inputs


def _parts(call: Inputs) -> tuple[list[Any], _Form]:
    form = _Form(call.form())
    form.call = call.mapped(lambda _: Ellipsis)
    return call.arrays(), form


# To JAX a call is its arrays.
jax.tree_util.register_pytree_node(Inputs, _parts, lambda form, arrays: form.call.filled(arrays))


Variables = dict[str, Any]
Intercept = Callable[[str, Callable[..., Any], tuple, dict], Any]


class Side(Protocol):
    """A Flax module as a function.

    Attributes:
      is_opened: it is run as if there were no jit and no checkpoint in it, see `opened`.
      turns: scans of so many turns are run as loops.
      lifts: in float64 its layers compute in float64 where they say 16 bits.
      tables: names of variables that are no floating point, which nothing trains; see `structure`.
      made: the variables that were made before `initial` raised.
    """

    is_opened: bool
    turns: frozenset[int]
    lifts: bool
    tables: list[str]
    made: Variables

    def apply(
        self, variables: Variables, inputs: Inputs, *, train: bool, intercept: Intercept, seed: int
    ) -> tuple[Any, Variables]:
        """(output, statistics after it); `intercept(path, call, args, kwargs)` makes every layer's call."""

    def initial(self, inputs: Inputs, *, train: bool, seed: int = 0) -> Variables:
        """Variables as the module makes them with this seed, or as an NNX module holds them."""


def flag_of(function: Callable, train: bool) -> dict[str, bool]:
    """The keyword that tells `function` to train or to predict, by its signature; none if it has none."""
    names = inspect.signature(function).parameters
    return {name: train != opposite for name, opposite in FLAGS.items() if name in names}


INSIDE = "|"
"""In a flat name, for a "/" inside of one name, as linen's WeightNorm has it: "Dense_0/kernel/scale"."""


def flat(variables: Mapping[str, Any]) -> Variables:
    """Nested collections as one flat dict."""
    found = flatten_dict(dict(nn.unbox(_plain(variables))))
    return {"/".join(str(key).replace("/", INSIDE) for key in path): v for path, v in found.items()}


def nested(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse."""
    return unflatten_dict(
        {tuple(key.replace(INSIDE, "/") for key in name.split("/")): v for name, v in variables.items()}
    )


def _plain(tree: Any) -> Any:
    return {name: _plain(v) for name, v in tree.items()} if isinstance(tree, Mapping) else tree


def call_flax_call(flax_call: Callable, module: Any, variables: Any, inputs: Inputs, train: bool) -> Any:
    """The user's own call, told train by name where it has that name."""
    parameters = inspect.signature(flax_call).parameters.values()
    named = any(p.name == "train" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if named:
        return flax_call(module, variables, *inputs.args, train=train, **inputs.keywords)
    return flax_call(module, variables, *inputs.args, train, **inputs.keywords)


class Stopped:
    """In the call of which module an exception was raised."""

    def __init__(self) -> None:
        self._last: tuple[str, Exception] | None = None

    @contextlib.contextmanager
    def watched(self, path: str) -> Iterator[None]:
        """While it is entered, this module is called; the innermost sees an exception first."""
        try:
            yield
        except Exception as error:
            if self._last is None or self._last[1] is not error:
                self._last = path, error
            raise

    def path(self, error: Exception) -> str:
        """The innermost module that this one came through; "" outside of all, and of the root."""
        return self._last[0] if self._last is not None and self._last[1] is error else ""


def named_call(call: Callable, module: Any) -> Callable:
    """The call, as a function that knows its module."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    function.module = module  # type: ignore[attr-defined]  # what `intercept` learns the class from
    return function


@contextlib.contextmanager
def opened(is_opened: bool, turns: Container[int] = ()) -> Iterator[None]:
    """For a while jit and checkpoint (remat) do nothing, so that what is called inside them can be seen and replaced.

    JAX and Flax have no public way to look into either. A scan stays what it is: there a layer is one call, with the
    variables of all its turns; but for scans of as many turns as are given.
    """
    if not is_opened and not turns:
        yield
        return
    scan = jax.lax.scan

    def closed_scan(f: Any, init: Any, xs: Any = None, length: Any = None, *args: Any, **kwargs: Any) -> Any:
        count = len(jax.tree.leaves(xs)[0]) if length is None else length
        with jax.disable_jit(count in turns):
            return scan(f, init, xs, length, *args, **kwargs)

    def nothing(function: Any = None, **_: Any) -> Any:
        return nothing if function is None else function

    exchanged = (jax, "checkpoint", nothing), (jax, "remat", nothing), (jax.lax, "scan", closed_scan)
    with contextlib.ExitStack() as stack:
        for module, name, function in exchanged if is_opened else exchanged[-1:]:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        if is_opened:
            stack.enter_context(jax.disable_jit())
        yield


def lift_layer(module: Any) -> None:
    """Has a layer that says to compute in 16 bits (dtype) compute in float64; its parameters stay what they are."""
    for name, value in {**vars(module)}.items():
        if "dtype" in name and name != "param_dtype" and _is_half(value):
            object.__setattr__(module, name, jnp.float64)


def _is_half(dtype: Any) -> bool:
    try:
        return dtype is not None and jnp.dtype(dtype).name in HALF
    except TypeError:
        return False


def dropout_rate(module: Any, args: tuple, kwargs: Mapping[str, Any], *, train: bool) -> float | None:
    """The rate of one of Flax's own dropouts that is active in this call, or of dropped paths; None of others."""
    if train and (rate := path_rate(module)) is not None:
        return rate
    if not isinstance(module, nn.Dropout | nnx.Dropout):
        return None
    told = kwargs.get("deterministic", args[1] if len(args) > 1 else None)
    is_off = module.deterministic if told is None else told
    return float(module.rate) if train or is_off is False else 0.0


@contextlib.contextmanager
def without_attention_dropout(told: Callable[[float], object] = lambda _: None) -> Iterator[None]:
    """The dropout inside of Flax's functions of attention is off; `told` is told the rate of each that was active."""

    def without(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def weights(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            if given.arguments["dropout_rate"] and not given.arguments["deterministic"]:
                told(given.arguments["dropout_rate"])
            given.arguments["dropout_rate"] = 0.0
            return function(*given.args, **given.kwargs)

        return weights

    functions = linen_attention.dot_product_attention_weights, nnx_attention.dot_product_attention_weights
    with exchanged(dict.fromkeys(functions, without)):
        yield


def lifted(value: Any, *, float64: bool) -> Any:
    """The array in float64, if that is asked for and it is floating point."""
    if float64 and jnp.issubdtype(jnp.result_type(value), jnp.floating):
        value = np.asarray(value, np.float64)
    # What numpy holds is put there as it is: `asarray` would compile a program for each shape.
    return jax.device_put(value) if isinstance(value, np.ndarray) else jnp.asarray(value)


def forget(programs: dict) -> None:
    """Every program, these and JAX's own.

    JAX 0.10 keeps what it makes of a numpy array by the array alone, as long as a program holds it: int64, by which a
    loss indexes, say, for a run without float64, too.
    """
    programs.clear()
    jax.clear_caches()
    gc.collect()


@contextlib.contextmanager
def environment(*, float64: bool) -> Iterator[None]:
    """JAX as most users have it, whatever the caller's settings; float64 known, and then on the CPU, if asked for.

    Every program runs once, so that on a CPU XLA's optimisations cost more than they gain.
    """
    hurried = jax.config.read("jax_disable_most_optimizations")
    with contextlib.ExitStack() as stack:
        if float64 or jax.default_backend() == "cpu":
            jax.config.update("jax_disable_most_optimizations", True)
            stack.callback(jax.config.update, "jax_disable_most_optimizations", hurried)
        stack.enter_context(jax.enable_x64(float64))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        if float64:
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
            stack.callback(setattr, jax.lax, "scan", jax.lax.scan)
            jax.lax.scan = _widened(jax.lax.scan)
        yield


def _widened(scan: Callable) -> Callable:
    """A scan whose carry begins in float32, as a recurrent cell's zeros do, and goes on in float64."""

    @functools.wraps(scan)
    def widened(f: Any, init: Any, xs: Any = None, *args: Any, **kwargs: Any) -> Any:
        try:
            return scan(f, init, xs, *args, **kwargs)
        except TypeError:  # the carry must keep its dtype
            carry: Any = jax.eval_shape(lambda c, xs: f(c, jax.tree.map(lambda v: v[0], xs))[0], init, xs)
            before, after = ([v.shape for v in jax.tree.leaves(tree)] for tree in (init, carry))
            if before != after:
                raise
            wide = jax.tree.map(lambda v, like: v.astype(like.dtype) if _is_wider(v, like) else v, init, carry)
            if not any(map(_is_wider, jax.tree.leaves(init), jax.tree.leaves(carry))):
                raise
            return scan(f, wide, xs, *args, **kwargs)

    return widened


def _is_wider(value: Any, like: Any) -> bool:
    return value.dtype == jnp.float32 and like.dtype == jnp.float64


def shape_of(a: NDArray) -> jax.ShapeDtypeStruct:
    """Its shape, and its dtype in this environment."""
    return jax.ShapeDtypeStruct(a.shape, jax.dtypes.canonicalize_dtype(a.dtype))


def is_array(value: Any) -> bool:
    """Whether it is an array, of JAX's or numpy's."""
    return isinstance(value, jax.Array | np.ndarray)


def is_number(value: Any) -> bool:
    """Whether it is a number or an array of them."""
    kinds = jnp.number, jnp.bool_
    is_one = is_array(value) and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    return is_one or isinstance(value, bool | int | float | complex)


def is_floating(value: Any) -> bool:
    """Whether that is floating point."""
    return bool(jnp.issubdtype(jnp.asarray(value).dtype, jnp.floating))


def numbers(output: Any) -> list[tuple[str, Any]]:
    """The arrays and numbers of an output with the names that they stand under, see `records.trees`.

    Also those in what only JAX knows as a tree.
    """
    return [
        (trees.name_of(path), jnp.asarray(v))
        for path, leaf in trees.leaves(output)
        for v in jax.tree.leaves(leaf)
        if is_number(v)
    ]


def with_numbers(output: Any, function: Callable[[Any], Any]) -> Any:
    """The output with function(array) in the place of every array and number, in the same order."""

    def each(_: Any, leaf: Any) -> Any:
        return jax.tree.map(lambda v: function(jnp.asarray(v)) if is_number(v) else v, leaf)

    return trees.mapped(each, output)


def default_loss(output: Any, swapped: Container[int] = ()) -> Any:
    """See `records.side.loss_weights`; PyTorch's first axis is the second of the outputs `swapped`."""
    total = jnp.zeros(())
    for i, (_, y) in enumerate(numbers(output)):
        y = y.swapaxes(0, 1) if i in swapped else y
        y = jnp.stack([y.real, y.imag], -1) if jnp.iscomplexobj(y) else y
        if not y.size or not is_floating(y):
            continue
        y = jnp.where(jnp.isfinite(y), y, 0)  # a mask's infinity
        scale = jax.lax.stop_gradient(jnp.maximum(jnp.abs(y).max() / LARGE, 1))
        rows = (y / scale.astype(y.dtype)).reshape(len(y) if y.ndim else 1, -1)
        total = total + (jnp.asarray(loss_weights(len(rows)), y.dtype) * jnp.sin(rows + 1).sum(1)).sum()
    return total


def versions() -> dict[str, str]:
    """Of the frameworks."""
    return {"jax": jax.__version__, "flax": flax.__version__}
