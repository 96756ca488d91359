"""How layers of one side are cut so that they are those of the other: their tensors, calls and gradients, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.records.evidence import Evidence, Noise
from parity.records.kinds import Shape
from parity.records.recording import Call, GlueCall, Layer, Recording
from parity.records.structure import Structure

Move = Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]]


class Piece(NamedTuple):
    """Some tensors of a module, and what they are cut into.

    Attributes:
      wholes: full names as the module has them, with their shapes; none of a part that it lacks, which is 0 there.
      parts: full names of what they become.
      apart: the wholes' arrays -> the parts'.
      together: the parts' arrays -> the wholes', bit for bit where `apart` only moves numbers.
      gradient: of the gradients by the wholes, those by the parts; None: as `apart` does, which only moves numbers.
      halves: {a whole's local name: the parts as they are where it was forgotten}.
      folds: what is put together are some wholes of many that give the same; gradients by them are not compared.
    """

    wholes: Mapping[str, Shape]
    parts: tuple[str, ...]
    apart: Move
    together: Move
    gradient: Move | None = None
    halves: Callable[[Sequence[NDArray[Any]]], Mapping[str, Sequence[NDArray[Any]]]] | None = None
    folds: bool = False


@dataclass(frozen=True)
class Recut:
    """Some layers of one side, cut as the other side has them.

    Attributes:
      framework: whose.
      replaced: the paths of the layers that are cut.
      layers: what takes their place, in the order of calls.
      pieces: how the tensors are cut; those not named in any go on as they are.
      partners: {PyTorch's path: Flax's} of the new layers, as far as the cut says it.
      text: for the report.
      is_certain: nothing but this is possible. Else the numbers must say that it is right.
      is_seen: the new layers are modules, whose calls a run sees once the old ones are not taken for one layer.
      calls: what becomes of a call of a replaced layer; by default it is left out, as there is nothing to compare.
      key: where each call of a replaced layer is one of a new layer: which; then `calls` is not asked.
      loses: what the way back does not bring back, in a sentence; "" where it brings back all, bit for bit.
      turns: how many layers are stacked in one, whose calls are seen once their loop is made turn by turn; else 0.
      is_joined: a call of the first and the last of the replaced layers are one call of the new one.
    """

    framework: Literal["torch", "flax"]
    replaced: tuple[str, ...]
    layers: tuple[Layer, ...]
    pieces: tuple[Piece, ...] = ()
    partners: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    is_certain: bool = False
    is_seen: bool = False
    calls: Callable[[Call], list[Call]] = field(default=lambda call: [], compare=False)
    key: Callable[[tuple[str, int]], tuple[str, int]] | None = None
    turns: int = 0
    loses: str = ""
    is_joined: bool = False

    @property
    def folds(self) -> bool:
        """Whether nothing but these weights' sum in prediction is known, so that there is no way back."""
        return any(piece.folds for piece in self.pieces)

    def calls_of(self, call: Call) -> list[Call]:
        """What becomes of a call."""
        if call.path not in self.replaced:
            return [call]
        if self.key is None:
            return self.calls(call)
        path, index = self.key(call.key)
        return [replace(call, path=path, index=index)]


def apart(arrays: Mapping[str, NDArray], recuts: Iterable[Recut], *, gradients: bool = False) -> dict[str, NDArray]:
    """A module's tensors (or gradients by them) with those that are cut as their parts.

    What is not there, or of another shape than the module's, stays as it is.
    """
    found = dict(arrays)
    for piece in (piece for recut in recuts for piece in recut.pieces):
        if gradients and piece.folds:
            found = {name: a for name, a in found.items() if name not in piece.wholes}
        elif all(name in found and np.shape(found[name]) == shape for name, shape in piece.wholes.items()):
            wholes = [found.pop(name) for name in piece.wholes]
            move = piece.gradient if gradients and piece.gradient is not None else piece.apart
            found.update(zip(piece.parts, move(wholes), strict=True))
    return found


def together(arrays: Mapping[str, NDArray], recuts: Sequence[Recut]) -> dict[str, NDArray]:
    """The inverse: parts put together to the module's tensors; one that lacks a part is left out."""
    found = dict(arrays)
    for piece in reversed([piece for recut in recuts for piece in recut.pieces]):
        parts = [found.pop(name, None) for name in piece.parts]
        if all(part is not None for part in parts):
            found.update(zip(piece.wholes, piece.together([p for p in parts if p is not None]), strict=True))
    return found


def of_side(recuts: Iterable[Recut], framework: str) -> list[Recut]:
    """Those of one side, in their order."""
    return [recut for recut in recuts if recut.framework == framework]


def structure(given: Structure, recuts: Sequence[Recut]) -> Structure:
    """A module's structure, its layers cut."""
    if not recuts:
        return given
    # Zeros that take no memory, for their shapes.
    zeros = {name: np.broadcast_to(np.zeros(()), shape) for name, shape in given.shapes.items()}
    shapes = {name: a.shape for name, a in apart(zeros, recuts).items()}
    layers = {layer.path: layer for layer in given.layers}
    feeders = None if given.feeders is None else dict(given.feeders)
    for recut in recuts:
        layers = replaced(layers, recut)
        if feeders is not None:
            before = next((feeders[path] for path in recut.replaced if path in feeders), None)
            feeders = {a: b for a, b in feeders.items() if not {a, b} & set(recut.replaced)}
            if len(recut.replaced) == 1 and before is not None and not recut.is_seen:
                feeders |= {layer.path: before for layer in recut.layers}
    return replace(given, layers=list(layers.values()), shapes=shapes, feeders=feeders)


def replaced(layers: Mapping[str, Layer], recut: Recut) -> dict[str, Layer]:
    """Layers by path, the new ones where the first of the old ones was."""
    found: dict[str, Layer] = {}
    for path, layer in layers.items():
        if path not in recut.replaced:
            found[path] = layer
        elif not any(new.path in found for new in recut.layers):
            found |= {new.path: new for new in recut.layers}
    return found


def recording(run: Recording, recuts: Sequence[Recut]) -> Recording:
    """What was recorded of a run, as if the module's layers had been cut so."""
    for recut in recuts:
        run = _recording(run, recut)
    return run


def _recording(run: Recording, recut: Recut) -> Recording:
    calls: list[Call] = []
    places = [0]  # how many calls there are now before each of the old ones
    starts = {call.index: call for call in run.calls if recut.is_joined and call.path == recut.replaced[0]}
    for call in run.calls:
        if recut.is_joined and call.path == recut.replaced[-1] and call.index in starts:
            joined = replace(starts[call.index], path=recut.layers[0].path, output=call.output)
            calls.append(replace(joined, output_gradient=call.output_gradient))
        else:
            calls += recut.calls_of(call)
        places.append(len(calls))
    return replace(
        run,
        layers=replaced(run.layers, recut),
        calls=calls,
        glue=[GlueCall(g.path, g.class_names, places[g.position]) for g in run.glue],
        tensors=apart(run.tensors, [recut]),
        new_statistics=apart(run.new_statistics, [recut]),
        gradients=apart(run.gradients, [recut], gradients=True),
    )


def evidence(given: Evidence, recuts: Sequence[Recut]) -> Evidence:
    """All that one side was run for, its layers cut."""
    if not recuts:
        return given

    def cut(run: Recording | None) -> Recording | None:
        return None if run is None else recording(run, recuts)

    return replace(
        given,
        free=recording(given.free, recuts),
        forced=cut(given.forced),
        own=cut(given.own),
        noise=_noise(given.noise, recuts),
        exact=_exact(given.exact, recuts),
        states=[apart(state, recuts) for state in given.states],
        given=None if given.given is None else apart(given.given, recuts),
    )


def _noise(given: Noise, recuts: Sequence[Recut]) -> Noise:
    """The rounding of a layer is that of each of its parts."""
    found = dict(given)
    for recut in recuts:
        for path in recut.replaced:
            here = {phase: value for (phase, (p, _)), value in found.items() if p == path}
            found |= {(phase, (new.path, 0)): value for new in recut.layers for phase, value in here.items()}
    return found


def _exact(given: Mapping[tuple[str, int], NDArray], recuts: Sequence[Recut]) -> dict[tuple[str, int], NDArray]:
    calls = [Call(path, index, [], output) for (path, index), output in given.items()]
    for recut in recuts:
        calls = [new for call in calls for new in recut.calls_of(call)]
    return {call.key: call.output for call in calls}


class Cut:
    """One side's evidence, its layers cut; what is added to it later, too."""

    def __init__(self, given: Evidence, recuts: Sequence[Recut]) -> None:
        self.given, self.recuts = given, recuts
        self._known: tuple[list[Any], Evidence] | None = None

    def evidence(self) -> Evidence:
        """As it is now; made anew only where something was added."""
        if not self.recuts:
            return self.given
        now = [getattr(self.given, f.name) for f in fields(self.given)]
        if self._known is None or any(a is not b for a, b in zip(now, self._known[0], strict=True)):
            self._known = now, evidence(self.given, self.recuts)
        return self._known[1]


class Sides:
    """The evidence of both sides, their layers cut."""

    def __init__(self, torch: Evidence, flax: Evidence, recuts: Sequence[Recut]) -> None:
        self.sides = Cut(torch, of_side(recuts, "torch")), Cut(flax, of_side(recuts, "flax"))

    @property
    def torch(self) -> Evidence:
        """PyTorch's, as it is now."""
        return self.sides[0].evidence()

    @property
    def flax(self) -> Evidence:
        """Flax's, as it is now."""
        return self.sides[1].evidence()
