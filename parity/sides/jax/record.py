"""Runs a linen or NNX module and records every layer. Never imports torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from parity.records import trees
from parity.records.inputs import Inputs
from parity.records.recording import Call, Failure, Layer, Recording
from parity.records.side import Force, LossError, check_loss
from parity.sides.jax.layers import trace_state
from parity.sides.jax.module import (
    Side,
    Stopped,
    default_loss,
    dropout_rate,
    environment,
    is_array,
    is_floating,
    lifted,
    numbers,
    with_numbers,
    without_attention_dropout,
)
from parity.sides.jax.precision import rounds


@jax.custom_vjp
def _replace(value, probe, forced, forced_gradient):
    """`forced`; backwards `forced_gradient` goes to `value`, and what really arrives to `probe`."""
    return forced


_replace.defvjp(
    lambda value, probe, forced, gradient: (forced, gradient), lambda gradient, g: (gradient, g, None, None)
)


def record(
    side: Side,
    layers: dict[str, Layer],
    variables: Mapping[str, Any],
    inputs: Inputs | Sequence[Any],
    *,
    train: bool,
    float64: bool = True,
    loss: Callable[[Any], Any] | None = None,
    force: Force | None = None,
    gradients: bool = True,
    programs: dict | None = None,
    op_by_op: bool = False,
    seed: int = 0,
) -> Recording:
    """Run the module forward and backward, and record every layer.

    Args:
      side: the module as a function.
      layers: from `structure`.
      variables: flat.
      inputs: in Flax's layout.
      train: train or eval mode. In training, Flax's dropout is switched off.
      float64: lift variables and inputs.
      loss: of the output; None: the default one.
      force: for single-layer mode.
      gradients: take them too.
      programs: keeps what was compiled for the next run of the same module, variables' statistics and inputs' shapes.
      op_by_op: nothing is compiled. What XLA fuses it computes several times, rounded otherwise each time: a maximum
        may be equal to none of the numbers that it was taken of, and the gradient is lost.
      seed: of the random numbers in the run.

    Returns:
      The recording. Where the module raises: as far as it went; where only its gradient does, without gradients.
    """
    with environment(float64=float64):
        every = {name: lifted(v, float64=float64) for name, v in variables.items()}
        # In JAX what is differentiated must be floating point.
        parameters = {
            name: v for name, v in every.items() if name.startswith("params/") and jnp.issubdtype(v.dtype, jnp.floating)
        }
        others = {name: v for name, v in every.items() if name not in parameters}
        call = Inputs.of(inputs).mapped(partial(lifted, float64=float64))
        given = call.arrays()
        floating = [i for i, v in enumerate(given) if jnp.issubdtype(v.dtype, jnp.floating)]
        run = _Run(side, layers, others, call, floating, train, loss, force, seed)
        compiled = _as_it_is if op_by_op else _compiled
        recording = Recording("flax", layers, inputs=[_numpy(v) for v in given])
        recording.tensors = {name: _numpy(v) for name, v in every.items()}
        xs = [given[i] for i in floating]
        by_parameter, by_input, by_probe = {}, [], None
        try:
            if gradients:
                total, (by_parameter, by_input, by_probe), seen, run = _with_gradients(
                    run, parameters, xs, None if force is not None else programs, (train, float64), compiled
                )
            else:
                total, seen, run = _forward(run, parameters, xs, None if force is not None else programs, compiled)
        except LossError:
            raise
        except Exception as error:  # whatever a stranger's module raises
            run = _Run(side, layers, others, call, floating, train, loss, force, seed)
            try:
                total, seen = run(parameters, xs, None)
                # What only cannot be compiled is whole now, and there is nothing to tell.
                recording.failure = Failure.of(error, phase="backward") if gradients else None
            except Exception as stopped:  # as above
                recording.failure = Failure.of(stopped, run.stopped.path(stopped))
                total, seen = jnp.full((), jnp.nan), run.seen | {"statistics": {}, "result": []}
                del seen["inputs"][len(seen["outputs"]) :], seen["arrived"][len(seen["outputs"]) :]
        _fill(recording, run, seen, total, by_parameter, by_input, by_probe, floating)
    return recording


def _with_gradients(
    run: _Run, parameters: Any, xs: Any, programs: dict | None, key: tuple, compiled: Callable
) -> tuple:
    """(loss, gradients by parameters, inputs and probes, what was seen, the run that saw it)."""
    # A run without another side's arrays differs from the next in its arguments only.
    key = (*key, tuple((v.shape, v.dtype) for v in run.inputs.arrays()))
    kept = {} if programs is None else programs
    if key not in kept:
        kept[key] = run, _program(run, parameters, xs, compiled)
    run, whole = kept[key]
    return *whole(parameters, xs), run


def _forward(run: _Run, parameters: Any, xs: Any, programs: dict | None, compiled: Callable) -> tuple:
    """(loss, what was seen, the run that saw it); a program that is kept takes the statistics as arguments, too."""
    if programs is None:
        return *compiled(lambda p, x: run(p, x, None))(parameters, xs), run
    statistics = {name: v for name, v in run.others.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    key = ("forward", run.train, *run.layers, *run.side.turns, *((v.shape, v.dtype) for v in run.inputs.arrays()))
    if key not in programs:

        def whole(parameters, statistics, xs):
            run.others = {**run.others, **statistics}
            return run(parameters, xs, None)

        programs[key] = run, compiled(whole)
    run, whole = programs[key]
    return *whole(parameters, statistics, xs), run


def _program(run: _Run, parameters: Any, xs: Any, compiled: Callable) -> Callable:
    """(parameters, floating inputs) -> (loss, gradients by them and by the probes, what was seen)."""
    probes = jax.eval_shape(run.probes, parameters, xs)

    def whole(parameters, xs):
        zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), probes)
        total, pull, seen = jax.vjp(run, parameters, xs, zeros, has_aux=True)
        return total, pull(jnp.ones_like(total)), seen

    return compiled(whole)


def _as_it_is(function: Callable) -> Callable:
    return function


def _program_of(function: Callable, args: tuple) -> Callable:
    """Its program for arguments of these shapes and dtypes.

    Raises:
      jax.errors.JAXTypeError: it has none.
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    if not jaxpr.consts:
        return jax.jit(function)
    flat = jax.jit(lambda constants, leaves: jax.core.eval_jaxpr(jaxpr.jaxpr, constants, *leaves))
    return lambda *args: jax.tree.unflatten(jax.tree.structure(shapes), flat(jaxpr.consts, jax.tree.leaves(args)))


def _compiled(function: Callable) -> Callable:
    """The function compiled as one; as it is where it cannot be, as it looks at the values of its arrays.

    Another side's arrays, which are constants in it, become arguments: XLA would compute with them while it compiles.
    """
    made: list[Callable] = []

    def run(*args: Any) -> Any:
        try:
            if not made:
                made.append(_program_of(function, args))
        except jax.errors.JAXTypeError:
            return function(*args)
        return made[0](*args)

    return run


def _numpy(v: Any) -> NDArray:
    a = np.asarray(v)  # JAX's own memory, on a CPU: nobody writes into it
    return a.astype(np.float32) if a.dtype.name in ("bfloat16", "float16") else a


class _Run:
    """The module as a function of (parameters, floating inputs, probes) -> (loss, what was seen)."""

    def __init__(self, side, layers, others, inputs, floating, train, loss, force, seed) -> None:
        self.side, self.layers, self.others, self.inputs, self.floating = side, layers, others, inputs, floating
        self.train, self.loss, self.force, self.seed = train, loss or default_loss, force, seed
        self.keys: list[tuple[str, int]] = []
        self.names: list[str] = []  # of the outputs
        self.dropouts: list[tuple[float, int]] = []
        self.stopped = Stopped()
        self.probed: list[Array] = []
        self.rounds_loss = self.rounds_outputs = False

    def __call__(self, parameters, xs, probes):
        given = self.inputs.arrays()
        for i, x in zip(self.floating, xs, strict=True):
            given[i] = x
        self.keys, self.dropouts = [], []
        seen: dict[str, Any] = {"inputs": [], "arrived": [], "outputs": []}
        self.seen, self.probed = seen, []
        # What is called inside a transformation of the module's own that was not opened can't be seen from outside.
        outside = trace_state()
        counts: dict[str, int] = {}
        active: list[str] = []

        def probe(value, forced=None):
            """Adds a zero whose gradient is the value's; or puts another side's array in its place."""
            if forced is not None and value.shape != forced[0].shape:
                value = jnp.broadcast_to(value.ravel()[:1].sum(), forced[0].shape)
            self.probed.append(value)
            zero = jnp.zeros_like(value) if probes is None else probes[len(self.probed) - 1]
            if forced is None:
                return value + zero
            gradient = jnp.zeros_like(value) if forced[1] is None else jnp.asarray(forced[1], value.dtype)
            return _replace(value, zero, jnp.asarray(forced[0], value.dtype), gradient)

        def dropped(rate):
            if rate:
                self.dropouts.append((rate, len(self.keys)))

        def intercept(path, call, args, kwargs):
            if (rate := dropout_rate(call.module, args, kwargs, train=self.train)) is not None:
                dropped(rate)
                return args[0]
            layer = self.layers.get(path)
            hidden = trace_state() != outside
            if active:
                return call(*args, **kwargs)
            if layer is None or not layer.is_called or hidden:
                with self.stopped.watched(path):
                    return call(*args, **kwargs)
            key = (path, counts.get(path, 0))
            counts[path] = key[1] + 1
            arrived, used = [], []
            mine: dict[int, Any] = {}  # one array given several times (attention) is one input

            def own(v):
                if (
                    not isinstance(v, Array | np.ndarray)
                    or v.dtype == bool
                    or jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key)
                ):
                    return v
                if id(v) in mine:
                    return mine[id(v)]
                given, v = v, jnp.asarray(v)
                arrived.append(v)
                forced = None if self.force is None else self.force.input(key, len(arrived) - 1, v)
                if forced is not None and forced[0].dtype.kind == "f":
                    v = jnp.asarray(
                        v, jnp.result_type(v.dtype, float)
                    )  # integers of an image, floats on the other side
                if jnp.issubdtype(v.dtype, jnp.floating):
                    v = probe(v, forced)
                used.append(v)
                mine[id(given)] = v
                return v

            args, kwargs = tuple(own(v) for v in args), {name: own(v) for name, v in kwargs.items()}
            active.append(path)
            try:
                with self.stopped.watched(path):
                    output = call(*args, **kwargs)
            finally:
                active.pop()
            where, y = trees.first(output, is_array) or ((), None)
            if y is None:
                return output
            self.keys.append(key)
            # The same arrays, unless another side's are put in their place.
            seen["arrived"].append([] if self.force is None else arrived)
            seen["inputs"].append(used)
            seen["outputs"].append(y)
            y = probe(y, None if self.force is None else self.force.output(key, y))
            return trees.replaced(output, where, y)

        with without_attention_dropout(dropped):
            output, seen["statistics"] = self.side.apply(
                {**parameters, **self.others},
                self.inputs.filled(given),
                train=self.train,
                intercept=intercept,
                seed=self.seed,
            )
        results = numbers(output)
        self.names, seen["result"] = [name for name, _ in results], [v for _, v in results]
        counted = itertools.count()

        def probed(v):
            i = next(counted)
            if not is_floating(v):
                return v
            return probe(v, None if self.force is None else self.force.result(i, results))

        output = with_numbers(output, probed)
        is_float64 = jnp.result_type(float) == np.float64
        self.rounds_outputs = is_float64 and any(is_floating(v) and v.dtype != np.float64 for _, v in results)
        self.rounds_loss = self._rounds_loss(output)
        total = jnp.asarray(self.loss(output))
        check_loss(total, "JAX")
        return total.reshape(()), seen

    def probes(self, parameters, xs):
        """What is probed, in order."""
        self(parameters, xs, None)
        return self.probed

    def _rounds_loss(self, output) -> bool:
        """Whether the user's loss computes in float32 what the run computes in float64."""
        if self.loss is default_loss or jnp.result_type(float) != np.float64:
            return False

        def loss(arrays):
            others = iter(arrays)
            return self.loss(with_numbers(output, lambda _: next(others)))

        try:
            return rounds(loss, [v for _, v in numbers(output)])
        except jax.errors.JAXTypeError:
            return False  # it looks at the values of its arrays and has no program


def _fill(recording, run, seen, total, by_parameter, by_input, by_probe, floating) -> None:
    probes = iter([] if by_probe is None else by_probe)

    def gradient(value):
        if by_probe is None or not jnp.issubdtype(value.dtype, jnp.floating):
            return None
        return _numpy(next(probes))

    for key, inputs, arrived, output in zip(run.keys, seen["inputs"], seen["arrived"], seen["outputs"], strict=True):
        used = [_numpy(v) for v in inputs]
        call = Call(key[0], key[1], used, _numpy(output), used if run.force is None else [_numpy(v) for v in arrived])
        call.input_gradients = [gradient(v) for v in inputs]
        call.output_gradient = gradient(output)
        recording.calls.append(call)
    recording.outputs = [_numpy(v) for v in seen["result"]]
    recording.output_names = run.names[: len(recording.outputs)]
    recording.output_gradients = [gradient(v) for v in seen["result"]]
    recording.loss = float(total)
    recording.rounds_loss, recording.rounds_outputs = run.rounds_loss, run.rounds_outputs
    recording.dropout_off = run.train and bool(run.dropouts)
    recording.dropout_rates = frozenset(rate for rate, _ in run.dropouts) if run.train else None
    recording.dropouts = [] if run.train else run.dropouts
    recording.new_statistics = {name: _numpy(v) for name, v in seen["statistics"].items()}
    recording.gradients = {name: _numpy(v) for name, v in by_parameter.items()}
    recording.input_gradients = [None] * len(recording.inputs)
    for i, g in zip(floating, by_input, strict=False):
        recording.input_gradients[i] = _numpy(g)
