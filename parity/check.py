"""`parity.check`: are these two modules the same network, and if not, where do they part, and why?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.comparison.differences import check_inputs
from parity.judge import Judge, stopped
from parity.report import Report
from parity.sides.module import framework_of, is_tensor

if TYPE_CHECKING:
    import torch
    from flax import linen, nnx


def check(
    torch_module: torch.nn.Module,
    flax_module: linen.Module | nnx.Module,
    *inputs: NDArray[Any],
    train: bool = True,
    variables: Any = None,
    flax_inputs: Sequence[NDArray[Any]] | None = None,
    flax_call: Callable[..., Any] | None = None,
    layer_map: Mapping[str, str] | None = None,
    loss: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None,
    steps: int = 0,
    optimizers: tuple[Callable[[Any], torch.optim.Optimizer], Any] | None = None,
) -> Report:
    """Compare a PyTorch module with a Flax module: every layer forward and backward, the statistics, the optimiser.

    Both run in float64, each lifted to it, so that mistakes stand out from rounding; then in float32. If anything
    differs, once more in single-layer mode, in which every layer is given PyTorch's input, and each local difference is
    traced to the mistake that makes it. Neither module is changed. The bounds are those of rounding: 1e-10 forward and
    1e-9 backward, relative to the largest value of an array, or, where a side computes in float32 inside, 30 times the
    rounding measured there.

    Args:
      torch_module: any module.
      flax_module: a linen module or an `nnx.Module`.
      *inputs: numpy arrays in PyTorch's layout, as the PyTorch module takes them. Floating arrays of rank 3 and more go
        to Flax channels last, but for those that go straight into a layer that has its channels last in PyTorch too
        (linear, layer norm, attention).
      train: train or eval mode. In training, dropout is switched off on both sides.
      variables: Flax's own variables (an `nnx.State` for NNX), which are then examined too: "is my own conversion
        right?". None: PyTorch's weights are carried over: "are these two the same network?".
      flax_inputs: what Flax is given instead, in its layout. What is the same but for float32's rounding is given as
        float64 has it.
      flax_call: flax_call(module, variables, *inputs, train) returns what `module.apply` gives, where the way to tell
        train from eval is not found in the module's signature.
      layer_map: {PyTorch's dotted name: Flax's path "a/b"} of layers that are not paired rightly by order and kind.
      loss: (torch_loss, jax_loss), each a function of the output. None: the same fixed function of the
        output, which no layout changes.
      steps: how many steps of training to compare, on these inputs.
      optimizers: (parameters -> torch optimizer, optax.GradientTransformation), needed for steps.

    Returns:
      The report: `ok`, `first_divergence`, `diagnoses`, `layers`.

    Raises:
      TypeError: an argument of another kind.
      ValueError: no input or empty ones, an unknown layer in layer_map, steps without optimizers, another number of
        flax_inputs.
      Exception: what either module raises on these inputs whatever their dtype.
    """
    question = Question(inputs, train, flax_inputs, flax_call, layer_map, loss, variables, steps, optimizers)
    _check_arguments(torch_module, flax_module, question)
    return _answer(torch_module, flax_module, question)


class Question(NamedTuple):
    """What both modules are asked: the arguments of `check`, which documents them."""

    inputs: Sequence[NDArray[Any]]
    train: bool = True
    flax_inputs: Sequence[NDArray[Any]] | None = None
    flax_call: Callable[..., Any] | None = None
    layer_map: Mapping[str, str] | None = None
    loss: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None
    variables: Any = None
    steps: int = 0
    optimizers: tuple[Callable[[Any], torch.optim.Optimizer], Any] | None = None


def _answer(torch_module: Any, flax_module: Any, question: Question, *, layer_by_layer: bool = False) -> Report:
    """The report. layer_by_layer: single-layer mode in any case, and nothing but float64."""
    from parity.evidence.jax import FlaxRuns
    from parity.evidence.torch import TorchRuns

    train, (torch_loss, flax_loss) = question.train, question.loss or (None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the user's modules: an eager run in float64 meets more of them
        # PyTorch on its own, in float64.
        torch_runs = TorchRuns(torch_module, question.inputs, train=train, loss=torch_loss)
        torch = torch_runs.evidence()
        if not torch.free.has_ended:
            return stopped(torch)
        # Which layer, tensor and axis is which; the weights go across; Flax on its own.
        inputs = torch_runs.inputs_for_flax(torch.free, question.flax_inputs)
        flax_runs = FlaxRuns(flax_module, inputs, train=train, loss=flax_loss, flax_call=question.flax_call)
        translation = flax_runs.carry(torch.free, question.layer_map, question.variables)
        flax = flax_runs.evidence()
        # What the judge asks for besides: the modules' own dtype, Flax layer by layer, how much is rounding.
        judge = Judge(torch, flax, translation)
        if judge.asks_for_own_dtype() and not layer_by_layer:
            torch_runs.add_own_dtype(torch)
            flax_runs.add_own_dtype(flax)
        if judge.asks_for_layers() or layer_by_layer:
            flax.forced = flax_runs.forced(translation)
        if judge.asks_for_rounding():
            torch.noise, flax.noise = torch_runs.noise(torch.free), flax_runs.noise(flax.free)
        # The optimisers' rules by themselves; training, if all agrees so far: else a step only carries on what differs.
        if question.optimizers is not None and question.steps:
            torch_runs.add_optimizer(torch, question.optimizers[0])
            flax_runs.add_optimizer(flax, question.optimizers[1], translation)
            if judge.agrees:
                torch_runs.add_steps(torch, question.optimizers[0], question.steps)
                flax_runs.add_steps(flax, question.optimizers[1], question.steps)
        return judge.report()


def _check_arguments(torch_module: Any, flax_module: Any, question: Question) -> None:
    from parity.sides.jax import side_of

    inputs, train, flax_inputs, flax_call, layer_map, loss, _, steps, optimizers = question

    def require(fine: bool, name: str, given: Any, allowed: str, kind: type[Exception] = TypeError) -> None:
        if not fine:
            raise kind(f"{name} is {given}; allowed: {allowed}")

    require(framework_of(torch_module) == "torch", "torch_module", type(torch_module).__name__, "a torch.nn.Module")
    side_of(flax_module)
    require(len(inputs) > 0, "inputs", "none", "one numpy array or more", ValueError)
    check_inputs(inputs)
    for name, arrays in (("inputs", inputs), ("flax_inputs", () if flax_inputs is None else flax_inputs)):
        require(not isinstance(arrays, np.ndarray), name, "one array", "a sequence of arrays")
        for a in arrays:
            fine = hasattr(a, "__array__") and not is_tensor(a)
            require(fine, f"one of {name}", type(a).__name__, "numpy arrays")
            require(np.asarray(a).dtype.kind in "fiub", f"one of {name}", np.asarray(a).dtype, "numbers")
    fine = flax_inputs is None or len(flax_inputs) == len(inputs)
    require(fine, "flax_inputs", f"{len(flax_inputs or ())} arrays", f"{len(inputs)}, as many as inputs", ValueError)
    require(isinstance(train, bool | np.bool_), "train", repr(train), "True or False")
    require(flax_call is None or callable(flax_call), "flax_call", repr(flax_call), "a function, or None")
    fine = layer_map is None or (
        isinstance(layer_map, Mapping) and all(isinstance(x, str) for pair in layer_map.items() for x in pair)
    )
    require(fine, "layer_map", repr(layer_map), "{PyTorch's dotted name: Flax's path}")
    fine = loss is None or (isinstance(loss, Sequence) and len(loss) == 2 and all(map(callable, loss)))
    require(fine, "loss", repr(loss), "(torch_loss, jax_loss), or None")
    require(isinstance(steps, int) and not isinstance(steps, bool), "steps", repr(steps), "an integer")
    require(steps >= 0, "steps", steps, "0 or more", ValueError)
    fine = optimizers is None or (
        isinstance(optimizers, Sequence)
        and len(optimizers) == 2
        and callable(optimizers[0])
        and hasattr(optimizers[1], "update")
    )
    require(
        fine, "optimizers", repr(optimizers), "(parameters -> torch optimizer, optax.GradientTransformation), or None"
    )
    require(steps == 0 or optimizers is not None, "optimizers", None, "a pair, where steps > 0", ValueError)


def trace(
    torch_module: Any,
    flax_module: Any,
    *inputs: NDArray[Any],
    train: bool = True,
    flax_inputs: Sequence[NDArray[Any]] | None = None,
    flax_call: Callable[..., Any] | None = None,
    layer_map: Mapping[str, str] | None = None,
    loss: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None,
) -> Report:
    """Every layer of both sides with PyTorch's weights, in float64: each side on its own, and layer by layer.

    `parity.check` asks whether two modules are the same; this shows how far apart every layer is also where they are:
    `error` accumulated, `local_error` with PyTorch's input.

    Args:
      torch_module: any module.
      flax_module: a linen module or an `nnx.Module`.
      *inputs: in PyTorch's layout.
      train: train or eval mode.
      flax_inputs: what Flax is given instead, in its layout.
      flax_call: see `parity.check`.
      layer_map: {PyTorch's dotted name: Flax's path} of layers that are not paired rightly by order and kind.
      loss: (torch_loss, jax_loss), each a function of the output; None: as for `dump`.

    Returns:
      The report.
    """
    check_inputs(inputs)
    question = Question(inputs, train, flax_inputs, flax_call, layer_map, loss)
    return _answer(torch_module, flax_module, question, layer_by_layer=True)
