"""`parity.check`: are these two modules the same network, and if not, where do they part, and why?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bn_common.installed import BOTH, need
from bn_common.memory import give_back
from bn_common.progress import Progress, progress
from parity.judge import Judge
from parity.records.inputs import Calls, Inputs, calls
from parity.records.kinds import HALF
from parity.report import Report
from parity.report.folded import check_depth
from parity.sides.module import framework_of

if TYPE_CHECKING:
    import torch
    from flax import linen, nnx

    from parity.evidence.jax import FlaxRuns
    from parity.records.evidence import Evidence

STAGES = (
    "PyTorch in float64",
    "which layer is which",
    "Flax in float64",
    "in the modules' own dtypes",
    "Flax layer by layer",
    "how much is rounding",
    "the optimisers",
    "naming what differs",
)
"""Of a comparison, as the line of progress calls them."""


def check(
    torch_module: torch.nn.Module,
    flax_module: linen.Module | nnx.Module,
    *inputs: Any,
    keywords: Mapping[str, Any] | None = None,
    train: bool = True,
    variables: Any = None,
    flax_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    flax_call: Callable[..., Any] | None = None,
    layer_map: Mapping[str, str] | None = None,
    loss: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None,
    steps: int = 0,
    optimizers: tuple[Callable[[Any], torch.optim.Optimizer], Any] | None = None,
    depth: int | None = None,
) -> Report:
    """Compare a PyTorch module with a Flax module: every layer forward and backward, the statistics, the optimiser.

    Both run in float64, each lifted to it, so that mistakes stand out from rounding; then in float32. If anything
    differs, once more in single-layer mode, in which every layer is given PyTorch's input, and each local difference is
    traced to the mistake that makes it. Neither module is changed. The bounds are those of rounding: 1e-10 forward and
    1e-9 backward, relative to the largest value of an array, or, where a side computes in float32 inside, 30 times the
    rounding measured there.

    Args:
      torch_module: any module.
      flax_module: a linen module or an `nnx.Module`; of a FlaxPreTrainedModel of Hugging Face's, its module.
      *inputs: numpy arrays in PyTorch's layout, as the PyTorch module takes them; also None, numbers, and tuples,
        lists, dicts and dataclasses of arrays. Floating arrays of rank 3 and more go to Flax channels last, but for
        those that go straight into a layer that has its channels last in PyTorch too (linear, layer norm, attention),
        and additive masks.
      keywords: {name: array} of what `forward` takes by name, {"input_ids": ids, "attention_mask": mask}; Flax's
        `__call__` is given the same names. Where it calls them otherwise, or takes them in order, flax_inputs says so.
      train: train or eval mode. In training, dropout is switched off on both sides.
      variables: Flax's own variables (an `nnx.State` for NNX), which are then examined too: "is my own conversion
        right?". None: PyTorch's weights are carried over: "are these two the same network?".
      flax_inputs: what Flax is called with instead of inputs and keywords, in its layout: a sequence of arguments, or
        a dict of keywords. What is the same but for float32's rounding is given as float64 has it.
      flax_call: `flax_call(module, variables, *inputs, train, **keywords)` returns what `module.apply` gives, where the
        way to tell train from eval is not found in the module's signature.
      layer_map: {PyTorch's dotted name: Flax's path "a/b"} of layers that are not paired rightly by order and kind.
      loss: (torch_loss, jax_loss), each a function of the output. None: the same fixed function of the
        output, which no layout changes.
      steps: how many steps of training to compare, on these inputs.
      optimizers: (parameters -> torch optimizer, optax.GradientTransformation), needed for steps. One that clips
        gradients does it in its `step`, or in a hook: `optimizer.register_step_pre_hook`.
      depth: the report is shown with a row for every module of this depth (1: those of the network itself), with its
        worst error and how many of its layers differ; None: with the rows that differ. What is found is the same.

    Returns:
      The report: `ok`, `first_divergence`, `diagnoses`, `layers`.

    Raises:
      ModuleNotFoundError: a framework is not installed.
      TypeError: an argument of another kind.
      ValueError: no input or empty ones, an unknown layer in layer_map, steps without optimizers, optimizers that want
        more than gradients, a loss that is no number, another number of flax_inputs in a sequence, a depth that is no
        integer >= 1.

    What either module raises is in the report, with the layer and what could be compared up to there.
    """
    need("parity.check", *BOTH)
    called = calls(inputs, keywords, flax_inputs, flax_call)
    question = Question(called, train, layer_map, loss, variables, steps, optimizers)
    _check_arguments(torch_module, flax_module, question)
    check_depth("depth", depth)
    with progress("checking") as line:
        report = _answer(torch_module, flax_module, question, Manner(line))
    report.depth = depth
    return report


class Question(NamedTuple):
    """What both modules are asked: the arguments of `check`, which documents them."""

    called: Calls
    train: bool = True
    layer_map: Mapping[str, str] | None = None
    loss: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None
    variables: Any = None
    steps: int = 0
    optimizers: tuple[Callable[[Any], torch.optim.Optimizer], Any] | None = None


class Manner(NamedTuple):
    """How the question is put.

    Attributes:
      progress: where it is told how far this has come.
      layer_by_layer: single-layer mode in any case, and nothing but float64.
      is_aside: inputs and weights are aside already, where rounding decides nothing, see `evidence/aside.py`.
      tables: of PyTorch's module, as Flax's code has them, see `evidence/constants.py`; None: not looked for yet.
    """

    progress: Progress
    layer_by_layer: bool = False
    is_aside: bool = False
    tables: Mapping[str, NDArray] | None = None

    def begin(self, stage: str) -> None:
        """One of STAGES begins; the question may be put more than once."""
        give_back()  # of the stage before: the next one's arrays are of other sizes
        again = "once more, " if self.is_aside or self.tables is not None else ""
        self.progress.stage(again + stage, STAGES.index(stage) + 1, len(STAGES))


def _answer(torch_module: Any, flax_module: Any, question: Question, manner: Manner) -> Report:
    """The report."""
    from parity.evidence import aside
    from parity.evidence.constants import rounded_constants
    from parity.evidence.jax import FlaxRuns
    from parity.evidence.torch import TorchRuns

    train, (torch_loss, flax_loss) = question.train, question.loss or (None, None)
    optimizers = question.optimizers if question.steps else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the user's modules: an eager run in float64 meets more of them
        # PyTorch on its own, in float64.
        manner.begin("PyTorch in float64")
        called = question.called
        torch_runs = TorchRuns(torch_module, called.torch or Inputs(), train=train, loss=torch_loss)
        torch_runs.use(manner.tables or {})
        if optimizers is not None:
            torch_runs.check_optimizer(optimizers[0])
        torch = torch_runs.evidence()
        # Which layer, tensor and axis is which; the weights go across; Flax on its own.
        manner.begin("which layer is which")
        inputs = torch_runs.inputs_for_flax(torch.free, called.flax)
        lifts = torch.details["parameters"] in HALF
        options: dict[str, Any] = {
            "train": train,
            "loss": flax_loss,
            "flax_call": called.flax_call,
            "lifts": lifts,
            "op_by_op": manner.is_aside,
            "may_stop": True,
        }
        flax_runs = FlaxRuns(flax_module, inputs, **options)
        if flax_runs.stop is not None and called.flax is None and not torch.free.has_ended:
            # PyTorch did not come to show in which layout its layers read them: it may be its own.
            as_they_are = FlaxRuns(flax_module, torch_runs.inputs, **options)
            flax_runs = flax_runs if as_they_are.stop is not None else as_they_are
        if optimizers is not None:
            flax_runs.check_optimizer(optimizers[1])
        translation = flax_runs.carry(torch.free, question.layer_map, question.variables, torch_runs.random)
        manner.begin("Flax in float64")
        flax = flax_runs.evidence()
        # What the judge asks for besides: the modules' own dtype, Flax layer by layer, how much is rounding.
        judge = Judge(torch, flax, translation, is_aside=manner.is_aside)
        if not judge.agrees and torch.free.has_ended and flax.free.failure is None:
            other = flax_runs.exchanged(torch.free, flax.free, translation, torch_runs.random)
            if other is not None:
                flax = flax if other is translation else flax_runs.evidence()
                judge, translation = Judge(torch, flax, other, is_aside=manner.is_aside), other
        # What is float32 on one side alone: the same question, with float64 there too.
        small = judge.first_small() if manner.tables is None else None
        if small is not None and (constants := rounded_constants(torch_runs, flax_runs, translation)):
            tables = {constant.name: constant.exact for constant in constants}
            report = _answer(torch_module, flax_module, question, manner._replace(tables=tables))
            if report.agrees_at(small.phase, small.key[0], small.quantity):
                report.notes += [constant.text for constant in constants]
                return report
        if judge.asks_for_own_dtype() and not manner.layer_by_layer:
            manner.begin("in the modules' own dtypes")
            torch_runs.add_own_dtype(torch)
            flax_runs.add_own_dtype(flax)
        if judge.asks_for_layers() or manner.layer_by_layer:
            manner.begin("Flax layer by layer")
            flax.forced = flax_runs.forced(translation)
            if passing := judge.shaped_otherwise():
                judge = _let_pass(passing, judge, flax_runs, torch, flax)
        if judge.asks_for_rounding():
            manner.begin("how much is rounding")
            torch.noise, flax.noise = torch_runs.noise(torch.free), flax_runs.noise(flax.free)
        # What rounding decides: the same question, a little aside of it.
        if not manner.is_aside and (decided := judge.decided_by_rounding()):
            moved = aside.module_aside(torch_runs)
            weights = dict(moved.named_parameters(remove_duplicate=False))
            there = question._replace(
                called=aside.calls_aside(torch_runs, flax_runs, torch.free, called),
                variables=aside.variables_aside(flax_runs.given, translation, torch.free.tensors, weights),
            )
            report = _answer(moved, flax_module, there, manner._replace(is_aside=True))
            if told := aside.told(decided, report):
                report.notes.append(told)
                return report
        # The optimisers' rules by themselves; training, if all agrees so far: else a step only carries on what differs.
        if optimizers is not None and torch.free.has_ended:
            manner.begin("the optimisers")
            torch_runs.add_optimizer(torch, optimizers[0])
            flax_runs.add_optimizer(flax, optimizers[1], translation)
            if judge.agrees:
                torch_runs.add_steps(torch, optimizers[0], question.steps)
                flax_runs.add_steps(flax, optimizers[1], question.steps)
        manner.begin("naming what differs")
        return judge.report()


def _let_pass(
    passing: frozenset[tuple[str, int]], judge: Judge, flax_runs: FlaxRuns, torch: Evidence, flax: Evidence
) -> Judge:
    """The judge of single-layer mode with Flax's own arrays at those of these calls behind which all agrees then."""
    again = flax_runs.forced(judge.translation, passing=passing)
    same = judge.same_behind(again)
    if not same:
        return judge
    flax.forced = again if same >= passing else flax_runs.forced(judge.translation, passing=same)
    flax.passing = same
    return Judge(torch, flax, judge.translation, is_aside=judge.is_aside)


def _check_arguments(torch_module: Any, flax_module: Any, question: Question) -> None:
    from parity.sides.jax import side_of

    _, train, layer_map, loss, _, steps, optimizers = question

    def require(fine: bool, name: str, given: Any, allowed: str, kind: type[Exception] = TypeError) -> None:
        if not fine:
            raise kind(f"{name} is {given}; allowed: {allowed}")

    require(framework_of(torch_module) == "torch", "torch_module", type(torch_module).__name__, "a torch.nn.Module")
    side_of(flax_module)
    require(isinstance(train, bool | np.bool_), "train", repr(train), "True or False")
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
    *inputs: Any,
    keywords: Mapping[str, Any] | None = None,
    train: bool = True,
    flax_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    flax_call: Callable[..., Any] | None = None,
    layer_map: Mapping[str, str] | None = None,
    loss: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None,
    depth: int | None = None,
) -> Report:
    """Every layer of both sides with PyTorch's weights, in float64: each side on its own, and layer by layer.

    `parity.check` asks whether two modules are the same; this shows how far apart every layer is also where they are:
    `error` accumulated, `local_error` with PyTorch's input.

    Args:
      torch_module: any module.
      flax_module: a linen module or an `nnx.Module`.
      *inputs: in PyTorch's layout; see `parity.check`, as for the other arguments.
      keywords: further ones by name.
      train: train or eval mode.
      flax_inputs: what Flax is called with instead, in its layout.
      flax_call: `flax_call(module, variables, *inputs, train, **keywords)`.
      layer_map: {PyTorch's dotted name: Flax's path} of layers that are not paired rightly by order and kind.
      loss: (torch_loss, jax_loss), each a function of the output; None: as for `dump`.
      depth: of the modules that the report is shown with; None: with its layers.

    Returns:
      The report.
    """
    need("parity.trace", *BOTH)
    question = Question(calls(inputs, keywords, flax_inputs, flax_call), train, layer_map, loss)
    _check_arguments(torch_module, flax_module, question)
    check_depth("depth", depth)
    with progress("tracing") as line:
        report = _answer(torch_module, flax_module, question, Manner(line, layer_by_layer=True))
    report.depth = depth
    return report
