"""What weights that do not fit are told, one line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from parity.pairing.pairs import Pairing
from parity.pairing.recut import cut
from parity.pairing.recut.cut import Recut
from parity.pairing.rules import TensorPair
from parity.records import kinds
from parity.records.kinds import Shape
from parity.records.recording import Recording
from parity.records.structure import Structure


def wrong(found: Pairing, arrays: Mapping[str, NDArray], *, to: str) -> list[str]:
    """Tensors of a wrong dtype or shape, or not there."""
    recuts = found.of_torch() if to == "flax" else found.of_flax()
    problems, parts = _wrong_wholes(recuts, arrays)
    arrays = cut.apart(arrays, recuts)
    for torch_name, flax_name, pair in found.tensors():
        name, target = (torch_name, flax_name) if to == "flax" else (flax_name, torch_name)
        if name not in arrays and name in parts:
            continue
        if name not in arrays:
            problems[f"{name} is missing (for {target})"] = None
            continue
        shape = _allowed(torch_name, flax_name, pair, found, to)
        if not kinds.is_floating(arrays[name]):
            problems[f"{name} is {arrays[name].dtype}; allowed: floating point (for {target})"] = None
        elif not pair.fits or arrays[name].shape != shape:
            problems[f"{name} has shape {arrays[name].shape}; allowed: {shape} (for {target})"] = None
    if to == "flax":
        problems |= dict.fromkeys(_without_place(found, arrays))
    return list(problems)


def _without_place(found: Pairing, arrays: Mapping[str, NDArray]) -> Iterator[str]:
    """Parts of PyTorch's tensors that Flax's module lacks, and that are not 0."""
    lacking = {part for recut in found.of_flax() for piece in recut.pieces if not piece.wholes for part in piece.parts}
    whole = {part: name for recut in found.of_torch() for p in recut.pieces for part in p.parts for name in p.wholes}
    for torch_name, flax_name, _ in found.tensors():
        if flax_name in lacking and torch_name in arrays and np.any(arrays[torch_name]):
            name = whole.get(torch_name, torch_name)
            yield f"{name} is left over: the target has no place for {torch_name.rpartition('.')[2]}, which is not 0"


def folded(recuts: Sequence[Recut]) -> list[str]:
    """Batch norms that the weights have folded away, and their target has not: there is no one way back."""
    norms = ", ".join(f"{recut.replaced[-1]} into {recut.replaced[0]}" for recut in recuts if recut.folds)
    said = (
        "batch norms are folded into the layer before for prediction, which cannot be undone, and the target has them"
    )
    return [f"{said}: {norms}; allowed: the weights before they were folded"] if norms else []


def below_zero(*sides: Recording) -> list[str]:
    """A sentence on each side's moving variances that are below 0 somewhere, as no sum of squares is."""
    every = [
        ", ".join(
            full
            for layer in side.layers.values()
            for local, full in layer.tensors.items()
            if layer.kind == "batch_norm" and local in layer.statistics and kinds.VAR.fullmatch(local)
            if full in side.tensors and (side.tensors[full] < 0).any()
        )
        for side in sides
    ]
    return [f"{names}: variances below 0, of which prediction takes the square root" for names in every if names]


def _allowed(torch_name: str, flax_name: str, pair: TensorPair, found: Pairing, to: str) -> Shape | str:
    """The shape that fits the other side's tensor; in words where none does."""
    there = found.shapes[1][flax_name] if to == "flax" else found.shapes[0][torch_name]
    try:
        shape = (pair.to_torch if to == "flax" else pair.to_flax)(np.empty(there, np.bool_)).shape
    except ValueError:  # not of the rank that the usual layout is for
        return f"one that fits {there}"
    if to == "flax" and pair.part is not None:
        return (shape[0] * (pair.part[2] // (pair.part[1] - pair.part[0])), *shape[1:])
    return shape


def _wrong_wholes(recuts: Sequence[Recut], arrays: Mapping[str, NDArray]) -> tuple[dict[str, None], set[str]]:
    """What is wrong with the tensors that are carried in parts; and the names of the parts."""
    problems: dict[str, None] = {}
    parts: set[str] = set()
    for piece in (piece for recut in recuts for piece in recut.pieces):
        for name, shape in piece.wholes.items():
            if name in parts:
                continue
            if name not in arrays:
                problems[f"{name} is missing (for {', '.join(piece.parts)})"] = None
            elif arrays[name].shape != shape:
                problems[f"{name} has shape {arrays[name].shape}; allowed: {shape}"] = None
        parts.update(piece.parts)
    return problems, parts


def missing_in_torch(found: Pairing) -> list[tuple[str, str]]:
    """(the name that PyTorch's tensor would have, Flax's name) of what nothing fills."""
    partner = {full: pair.torch for pair in found.layers for full in pair.flax.tensors.values()}
    missing = []
    for full in found.left()[1]:
        layer = partner.get(full)
        if layer is None:
            missing.append(("PyTorch's tensor", full))
            continue
        local = full.rpartition("/")[2]
        own = any(name in layer.tensors for name in ("gamma", "beta", "moving_mean"))
        names = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_var"} if own else {}
        usual = {
            "scale": "weight",
            "kernel": "weight",
            "embedding": "weight",
            "mean": "running_mean",
            "var": "running_var",
        }
        name = names.get(local, usual.get(local, local))
        missing.append((f"{layer.path}.{name}" if layer.path else name, full))
    return missing


def missing_in_flax(found: Pairing, torch_: Structure, tied: Mapping[str, Sequence[str]]) -> list[str]:
    """PyTorch's tensors that nothing fills, with the name that Flax's would have."""
    carried = found.wholes().union(name for name, _, _ in found.tensors())
    partner = {full: pair.flax for pair in found.layers for full in pair.torch.tensors.values()}
    problems = []
    for full in found.left()[0]:
        if any(name in carried for name in tied.get(full, ())):
            continue
        layer = partner.get(full)
        local = full.rpartition(".")[2]
        if layer is None:
            problems.append(f"{full} has no variable that fills it")
            continue
        name = _flax_name(local, layer.kind)
        collection = "batch_stats" if name in ("mean", "var") else "params"
        problems.append(f"{'/'.join(part for part in (collection, layer.path, name) if part)} is missing (for {full})")
    return problems


def _flax_name(local: str, kind: str) -> str:
    if kinds.MEAN.fullmatch(local):
        return "mean"
    if kinds.VAR.fullmatch(local):
        return "var"
    if kinds.SHIFT.fullmatch(local):
        return "bias"
    return "scale" if kind in kinds.NORMS else "embedding" if kind == "embedding" else "kernel"


def left_over_of_torch(
    found: Pairing,
    torch_: Structure,
    arrays: Mapping[str, NDArray],
    tied: Mapping[str, Sequence[str]],
    *,
    is_module: bool,
) -> list[str]:
    """PyTorch's tensors that nothing takes; those of a shared weight count once, integers are no weights."""
    carried = found.wholes().union(name for name, _, _ in found.tensors())
    left = set(found.left()[0])
    if not is_module:  # a module's tensors outside of its layers are constants
        left |= {n for n in arrays if n not in torch_.shapes and n not in torch_.counters.values()}
    return [
        f"{name} is left over: the target has no place for it"
        for name, a in arrays.items()
        if name in left and kinds.is_floating(a) and not any(n in carried for n in tied[name])
    ]
