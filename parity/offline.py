"""Parity where the two frameworks do not live together: each is dumped on its own, the dumps are compared anywhere.

`dump` imports the framework of the module that it is given and no other, `compare` none. The files are described in
`parity/recording_file.py`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity import recording_file, verdict
from parity.compare import BACKWARD_BOUND, FORWARD_BOUND, MOST_CARRIED, MOST_NOISE
from parity.dumping import pairing_of, translated
from parity.located import Located, in_order
from parity.pairing import Pairing
from parity.recording_file import Dump
from parity.report import PHASES, Report
from parity.trace import NETWORK, Difference, Translation, differences, flat_layout_inputs
from parity.verdict import layer_rows


def framework_of(module: Any) -> str | None:
    """Which framework's module it is, "torch" or "flax", by what is imported already; None if neither's."""
    torch, flax = sys.modules.get("torch"), sys.modules.get("flax")
    if torch is not None and isinstance(module, torch.nn.Module):
        return "torch"
    if flax is not None:
        from flax import linen, nnx

        if isinstance(module, linen.Module | nnx.Module):
            return "flax"
    return None


def dump(
    module: Any,
    inputs: Sequence[NDArray[Any]],
    path: str | Path,
    *,
    train: bool = True,
    weights: str | Path | None = None,
    flax_layout: bool = False,
    loss: Callable[[Any], Any] | None = None,
    flax_call: Callable[..., Any] | None = None,
    layer_map: Mapping[str, str] | None = None,
) -> Dump:
    """Run one side in float64 and write down every layer's tensors and gradients.

    Args:
      module: a torch.nn.Module, a linen module or an `nnx.Module`; it stays as it is.
      inputs: in PyTorch's layout; floating ones of rank 3 and more go to Flax channels last.
      path: NAME of NAME.safetensors and NAME.json.
      train: train or eval mode.
      weights: None: the module's own (a linen module is initialised with key 0). The name of a dump: its weights, which
        are carried over if it is the other side's; for Flax, the layers are then also run one by one on PyTorch's
        inputs. Else a file of this side's own weights (see `parity/files.py`).
      flax_layout: the inputs are in Flax's layout already.
      loss: of the output, in this framework; None: a fixed function of the output that no layout changes. Both sides
        must be given the same.
      flax_call: see `parity.check`.
      layer_map: {PyTorch's dotted name: Flax's path} of layers that are not paired rightly by order and kind, where the
        weights are the other side's.

    Returns:
      What was written.

    Raises:
      TypeError: a module of neither framework.
      ValueError: weights of other names or shapes, a dump in the other mode.
      OSError: the files can't be written.
    """
    other = recording_file.load(weights) if weights is not None and recording_file.is_dump(weights) else None
    mode = "train" if train else "eval"
    if other is not None and other.details["mode"] != mode:
        raise ValueError(f"mode is {mode}; allowed: {other.details['mode']}, in which {weights} was dumped")
    given = [np.asarray(a) for a in inputs]
    options: dict[str, Any] = {"train": train, "weights": weights, "other": other, "loss": loss, "layer_map": layer_map}
    framework = framework_of(module)
    if framework == "torch":
        from parity.dump_torch import dump_torch

        made = dump_torch(module, given, **options)
    elif framework == "flax":
        from parity.dump_flax import dump_flax

        made = dump_flax(module, given if flax_layout else flat_layout_inputs(given), flax_call=flax_call, **options)
    else:
        allowed = "a torch.nn.Module, flax.linen.Module or flax.nnx.Module"
        raise TypeError(f"module is {type(module).__name__}; allowed: {allowed}")
    made.name = str(path)
    made.details |= _details(module, train, loss)
    made.details["inputs"] = None if flax_layout else [_about(a) for a in given]
    recording_file.save(made, path)
    return made


def _details(module: Any, train: bool, loss: Callable | None) -> dict[str, Any]:
    return {
        "mode": "train" if train else "eval",
        "class": type(module).__name__,
        "dtype": "float64",
        "loss": "default" if loss is None else getattr(loss, "__qualname__", str(loss)),
        "numpy": np.__version__,
        "inputs": None,
    }


def _about(a: NDArray) -> dict[str, Any]:
    return {
        "shape": a.shape,
        "dtype": str(a.dtype),
        "sha256": hashlib.sha256(np.array(a, order="C").tobytes()).hexdigest(),
    }


def compare(first: str | Path, second: str | Path, *, layer_map: Mapping[str, str] | None = None) -> Report:
    """Compare a dump of PyTorch's with one of Flax's, in any order.

    Where Flax's was made with PyTorch's weights (`dump --weights`), it holds the run in single-layer mode as well, and
    every layer's own error is known, as in `parity.check`; otherwise only of layers that were given equal inputs.

    Args:
      first: name of a dump.
      second: name of the other.
      layer_map: {PyTorch's dotted name: Flax's path} of layers that are not paired rightly by order and kind.

    Returns:
      The report. Which mistake it is, is only said where what recognises it can be imported; else a note says so.

    Raises:
      ValueError: no dumps, two of one framework, in different modes, or with different losses.
    """
    dumps = {made.free.framework: made for made in map(recording_file.load, (first, second))}
    if len(dumps) == 1:
        raise ValueError(f"both dumps are of {next(iter(dumps))}; allowed: one of torch and one of flax")
    torch, flax = dumps["torch"], dumps["flax"]
    for key, a, b in [
        ("mode", torch.details["mode"], flax.details["mode"]),
        *[("loss", a, b) for a, b in [(torch.details["loss"], flax.details["loss"])] if "default" in (a, b)],
    ]:
        if a != b:
            raise ValueError(f"{key} is {a} in {torch.name} and {b} in {flax.name}; allowed: the same in both")
    return _Comparison(torch, flax, layer_map).report()


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
    from parity.dump_flax import dump_flax
    from parity.dump_torch import dump_torch

    given = [np.asarray(a) for a in inputs]
    losses = loss or (None, None)
    torch = dump_torch(torch_module, given, train=train, loss=losses[0])
    torch.details |= _details(torch_module, train, losses[0])
    torch.sha256 = "not written"
    arrays = flat_layout_inputs(given) if flax_inputs is None else [np.asarray(a) for a in flax_inputs]
    flax = dump_flax(
        flax_module, arrays, train=train, other=torch, loss=losses[1], flax_call=flax_call, layer_map=layer_map
    )
    flax.details |= _details(flax_module, train, losses[1])
    return _Comparison(torch, flax, layer_map).report()


class _Comparison:
    """Two dumps side by side."""

    def __init__(self, torch: Dump, flax: Dump, layer_map: Mapping[str, str] | None) -> None:
        self.torch, self.flax = torch, flax
        self.train = torch.details["mode"] == "train"
        self.notes: list[str] = []
        fed = flax.forced if flax.details.get("fed_by") == torch.sha256 else None
        self.reference = flax.free if fed is None else fed
        self.pairing: Pairing = pairing_of(torch.free, flax.free, layer_map)
        self.translation: Translation = translated(torch.free, self.reference, self.pairing)
        self.free = differences(self.translation, flax.free, train=self.train) + self._loss_difference()
        if fed is None:
            self.local = [d for d in self.free if self._is_local(d)]
        else:
            self.local = differences(self.translation, fed, train=self.train)
        self.located = self._located()

    def _loss_difference(self) -> list[Difference]:
        a, b = self.torch.free.loss, self.flax.free.loss
        if a is None or b is None or self.flax.free.failure is not None:
            return []
        return [Difference("loss", NETWORK, "", "value", abs(a - b) / max(abs(a), 1e-30))]

    def _is_local(self, d: Difference) -> bool:
        """Whether both sides were given the same there, so that the difference is the layer's own."""
        failing = [other for other in self.free if not other.error <= self.bound(other)]
        at = self.translation.position.get(d.key, len(self.translation.position))
        if d.phase == "forward" and d.quantity == "output" and d.key != NETWORK:
            return not any(f.key == d.key and f.quantity == "input" for f in failing)
        if d.phase == "forward":
            before = [f for f in failing if f.phase == "forward" and f.quantity == "output" and f.key != NETWORK]
            return not any(self.translation.position.get(f.key, -1) < at for f in before)
        if d.phase == "statistics":
            return not any(f.key == d.key and f.quantity == "input" for f in failing)
        if d.phase == "backward" and d.quantity != "output gradient":
            return not any(f.key == d.key and f.quantity in ("input", "output gradient") for f in failing)
        return not any(f.phase == "forward" for f in failing)

    def bound(self, d: Difference, *, local: bool = False) -> float:
        """What rounding explains of a difference."""
        bound = BACKWARD_BOUND if d.phase == "backward" else FORWARD_BOUND
        phase = "backward" if d.phase == "loss" else d.phase
        keys = (self.torch, d.key), (self.flax, (d.flax_layer, d.key[1]))
        noise = [made.noise.get((phase, key), max(made.noise.values(), default=0.0)) for made, key in keys]
        measured = 30 * max(noise)
        return max(bound, min(measured, MOST_NOISE if local else MOST_CARRIED))

    def _located(self) -> list[Located]:
        expected = self.pairing.to_flax(self.torch.free.tensors)
        given = self.flax.free.tensors
        other = [n for n, a in expected.items() if n in given and not _same(given[n], a)]
        if other:
            self.notes.append(
                f"{len(other)} of {len(expected)} tensors differ before the run, {other[0]} first: "
                "dump --weights takes the weights of the other dump"
            )
        inputs = [made.details["inputs"] for made in (self.torch, self.flax)]
        if None not in inputs and inputs[0] != inputs[1]:
            self.notes.append("the two dumps were given different inputs")
        bounds = {d: self.bound(d, local=True) for d in self.local}
        left = any(p.torch_left or p.flax_left for p in self.pairing.layers)
        wrong = left or any(not d.error <= bounds[d] for d in self.local)
        if not wrong and not other and not self._failing():
            return []
        try:
            from parity import diagnose
            from parity.conversion import conversion_findings
        except ImportError as error:
            self.notes.append(f"which mistake it is can't be said here: {error}")
            return []
        found: list[Located] = []
        if other:
            found += conversion_findings(self.translation, expected, given, self.torch.free, train=self.train)
        if wrong:
            given_inputs = self.reference.inputs
            run = diagnose.Diagnosis(
                self.translation,
                self.reference,
                self.flax.free,
                self.local,
                bounds,
                train=self.train,
                flax_inputs=given_inputs,
            ).run()
            charged = {f.layer for f in found}
            # Where its weights are at fault, the layer need not be accused as well.
            found += [f for f in run if f.layer not in charged or f.finding.code != "unexplained"]
        fed = self.reference is not self.flax.free
        if self.torch.details["loss"] != "default" and (fed or not self._failing(("forward",))):
            found += diagnose.loss_findings(self.translation, self.reference, FORWARD_BOUND)
        return in_order(found)

    def _failing(self, phases: Sequence[str] = PHASES) -> list[Difference]:
        found = [d for d in self.free if d.phase in phases and not d.error <= self.bound(d)]
        return sorted(found, key=lambda d: PHASES.index(d.phase))

    def report(self) -> Report:
        """What was found."""
        failing, located = self._failing(), self.located
        fed = self.reference is not self.flax.free
        if fed and not located and not any(d.error > self.bound(d, local=True) for d in self.local):
            # Every layer agrees to rounding: what is left is rounding carried along.
            failing = [d for d in failing if not d.error < 1e-3]
        rows = layer_rows(self.pairing, self.free, self.local, self.bound)
        first, torch = next(iter(failing), None), self.torch.free
        return verdict.report(first, located, rows, self.notes, torch=torch, bound=self.bound, details=self._details())

    def _details(self) -> dict[str, Any]:
        a, b = self.torch.details, self.flax.details
        return {
            "mode": a["mode"],
            "dtype": "float64",
            "torch_module": a["class"],
            "flax_module": b["class"],
            "loss values": {"PyTorch": self.torch.free.loss, "Flax": self.flax.free.loss},
            **{name: v for name, v in (*a.items(), *b.items()) if name in ("torch", "jax", "flax")},
        }


def _same(a: NDArray, b: NDArray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) <= 1e-6 * np.abs(b).max(initial=0))
