"""Parity where the two frameworks do not live together: each is dumped on its own, the dumps are compared anywhere.

`dump` imports the framework of the module that it is given and no other, `compare` none. The files are described in
`parity/records/dump_file.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parity.evidence.about import about
from parity.judge import Judge
from parity.pairing.agreement import AGREES, distance
from parity.pairing.by_weights import paired_by_weights
from parity.pairing.exchange import told_by_order
from parity.pairing.layers import pairing_of
from parity.pairing.pairs import Pairing
from parity.pairing.translation import flat_layout_inputs, translated
from parity.records import dump_file
from parity.records.evidence import Evidence
from parity.records.inputs import Inputs, calls
from parity.records.kinds import HALF
from parity.report import Report
from parity.sides.module import framework_of


def dump(
    module: Any,
    inputs: Sequence[Any] | Mapping[str, Any],
    path: str | Path,
    *,
    keywords: Mapping[str, Any] | None = None,
    train: bool = True,
    weights: str | Path | None = None,
    flax_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    flax_layout: bool = False,
    loss: Callable[[Any], Any] | None = None,
    flax_call: Callable[..., Any] | None = None,
    layer_map: Mapping[str, str] | None = None,
    optimizer: Any = None,
    steps: int = 0,
) -> Evidence:
    """Run one side in float64 and write down every layer's tensors and gradients.

    Args:
      module: a torch.nn.Module, a linen module or an `nnx.Module`; it stays as it is.
      inputs: in PyTorch's layout, see `parity.check`; floating ones of rank 3 and more go to Flax channels last. A
        sequence of arguments, or a dict of keywords.
      path: NAME of NAME.safetensors and NAME.json.
      keywords: further arguments by name.
      train: train or eval mode.
      weights: None: the module's own (a linen module is initialised with key 0). The name of a dump: its weights, which
        are carried over if it is the other side's; for Flax, the layers are then also run one by one on PyTorch's
        inputs. Else a file of this side's own weights (see `parity/sides/weight_files.py`).
      flax_inputs: what a Flax module is called with instead, in its layout.
      flax_layout: the inputs are in Flax's layout already.
      loss: of the output, in this framework; None: a fixed function of the output that no layout changes. Both sides
        must be given the same.
      flax_call: see `parity.check`.
      layer_map: {PyTorch's dotted name: Flax's path} of layers that are not paired rightly by order and kind, where the
        weights are the other side's.
      optimizer: parameters -> torch optimizer, or an optax.GradientTransformation: what it makes of designed gradients
        is written down, too.
      steps: how many steps of training with it, on these inputs, are written down.

    Returns:
      What was written.

    Raises:
      TypeError: a module of neither framework, an optimizer of another.
      ValueError: weights of other names or shapes, a dump in the other mode, empty inputs, steps without optimizer.
      OSError: the files can't be written.
    """
    other = dump_file.load_whole(weights) if weights is not None and dump_file.is_dump(weights) else None
    mode = "train" if train else "eval"
    if other is not None and other.details["mode"] != mode:
        raise ValueError(f"mode is {mode}; allowed: {other.details['mode']}, in which {weights} was dumped")
    called = calls(inputs, keywords, flax_inputs, flax_call)
    given = called.torch or Inputs()
    if not isinstance(steps, int) or steps < 0 or (steps and optimizer is None):
        raise ValueError(f"steps is {steps!r}, optimizer {optimizer!r}; allowed: 0, or more with an optimizer")
    framework = framework_of(module)
    fine = callable(optimizer) if framework == "torch" else hasattr(optimizer, "update")
    if optimizer is not None and not fine:
        allowed = "parameters -> torch optimizer, or an optax.GradientTransformation, or None"
        raise TypeError(f"optimizer is {optimizer!r}; allowed: {allowed}")
    if framework == "torch":
        made = _dump_torch(module, given, train, weights, other, loss, layer_map, optimizer, steps)
    elif framework == "flax":
        usual = given if flax_layout else flat_layout_inputs(given)
        made = _dump_flax(
            module, called.flax or usual, train, weights, other, loss, flax_call, layer_map, optimizer, steps
        )
    else:
        allowed = "a torch.nn.Module, flax.linen.Module or flax.nnx.Module"
        raise TypeError(f"module is {type(module).__name__}; allowed: {allowed}")
    made.name = str(path)
    made.details["inputs"] = None if flax_layout else [about(a) for a in given.arrays()]
    dump_file.save(made, path)
    return made


def _dump_torch(module, inputs, train, weights, other, loss, layer_map, optimizer, steps) -> Evidence:
    from parity.evidence.torch import TorchRuns

    runs = TorchRuns(module, inputs, train=train, loss=loss)
    if steps:
        runs.check_optimizer(optimizer)
    runs.take(weights, other, layer_map)
    made = runs.evidence()
    _must_have_run(made)
    made.noise = runs.noise(made.free)
    runs.add_own_dtype(made)
    if optimizer is not None:
        runs.add_optimizer(made, optimizer)
    if steps:
        runs.add_steps(made, optimizer, steps)
    return made


def _dump_flax(module, inputs, train, weights, other, loss, flax_call, layer_map, optimizer, steps) -> Evidence:
    from parity.evidence.jax import FlaxRuns

    lifts = other is not None and other.details.get("parameters") in HALF
    runs = FlaxRuns(module, inputs, train=train, loss=loss, flax_call=flax_call, lifts=lifts)
    if steps:
        runs.check_optimizer(optimizer)
    translation = None
    if other is None or other.free.framework == "flax":
        runs.take(weights, other)
        made = runs.evidence()
        _must_have_run(made)
    else:
        translation = runs.carry(other.free, layer_map)
        made = runs.evidence()
        if distance(other.free, made.free) > AGREES and made.free.failure is None:
            # Of layers that only their order pairs, the partners with which it agrees, if there are any.
            again = runs.exchanged(other.free, made.free, translation, lambda: other.free)
            if again is not None and again is not translation:
                translation, made = again, runs.evidence()
        made.forced = runs.forced(translation)
        made.details["fed_by"] = other.sha256
    made.noise = runs.noise(made.free)
    runs.add_own_dtype(made)
    if optimizer is not None:
        runs.add_optimizer(made, optimizer, translation)
    if steps and made.free.failure is None:
        runs.add_steps(made, optimizer, steps)
    return made


def _must_have_run(made: Evidence) -> None:
    """Alone, a module that does not run is the user's mistake: what it raised is raised."""
    failure = made.free.failure
    if failure is not None and failure.cause is not None:
        raise failure.cause


def compare(first: str | Path, second: str | Path, *, layer_map: Mapping[str, str] | None = None) -> Report:
    """Compare a dump of PyTorch's with one of Flax's, in any order.

    Where Flax's was made with PyTorch's weights (`dump --weights`), it holds the run in single-layer mode as well, and
    every layer's own error is known, as in `parity.check`; otherwise only of layers that were given equal inputs.

    Args:
      first: name of a dump.
      second: name of the other.
      layer_map: {PyTorch's dotted name: Flax's path} of layers that are not paired rightly by order and kind.

    Returns:
      The report: the same mistakes as those that `parity.check` names.

    Raises:
      ValueError: no dumps, two of one framework, in different modes, or with different losses.
    """
    dumps = {made.free.framework: made for made in map(dump_file.load_whole, (first, second))}
    if len(dumps) == 1:
        raise ValueError(f"both dumps are of {next(iter(dumps))}; allowed: one of torch and one of flax")
    torch, flax = dumps["torch"], dumps["flax"]
    for key, a, b in [
        ("mode", torch.details["mode"], flax.details["mode"]),
        *[("loss", a, b) for a, b in [(torch.details["loss"], flax.details["loss"])] if "default" in (a, b)],
    ]:
        if a != b:
            raise ValueError(f"{key} is {a} in {torch.name} and {b} in {flax.name}; allowed: the same in both")
    return _judge(torch, flax, layer_map).report()


def _judge_of(torch: Evidence, flax: Evidence, pairing: Pairing) -> Judge:
    return Judge(torch, flax, translated(torch.free, flax.forced or flax.free, pairing))


def _judge(torch: Evidence, flax: Evidence, layer_map: Mapping[str, str] | None) -> Judge:
    """Two dumps side by side; the run in single-layer mode counts only where it was fed this very dump."""
    if flax.details.get("fed_by") != torch.sha256:
        flax.forced = None
    pairing = pairing_of(torch.free, flax.free, layer_map, same_weights=True, train=torch.details["mode"] == "train")
    judge = _judge_of(torch, flax, pairing)
    if not judge.agrees and (again := paired_by_weights(pairing, torch.free, flax.free)) is not pairing:
        other = _judge_of(torch, flax, again)
        judge, pairing = (other, again) if other.agrees else (judge, pairing)
    if not judge.agrees:
        judge.notes += told_by_order(pairing)
    given = [made.details["inputs"] for made in (torch, flax)]
    if None not in given and given[0] != given[1]:
        judge.notes.append("the two dumps were given different inputs")
    if judge.other_weights:
        judge.notes.append(
            f"{len(judge.other_weights)} of {len(pairing.tensors())} tensors differ before the run, "
            f"{judge.other_weights[0]} first: dump --weights takes the weights of the other dump"
        )
    if bool(torch.answers) != bool(flax.answers):
        side = "PyTorch" if torch.answers else "Flax"
        judge.notes.append(f"only {side}'s dump has an optimiser: the two rules were not compared")
    return judge
