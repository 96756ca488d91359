"""Linear layers (and convolutions) that are one on one side and several on the other, their outputs side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.pairing.recut.cut import Piece, Recut
from parity.records import kinds
from parity.records.kinds import Shape
from parity.records.recording import Call, Layer
from parity.records.structure import Structure

Framework = Literal["torch", "flax"]
ROLES = {
    "query": ("query", "q", "q_proj", "to_q", "wq", "w_q", "q_linear", "linear_q", "query_proj"),
    "key": ("key", "k", "k_proj", "to_k", "wk", "w_k", "k_linear", "linear_k", "key_proj"),
    "value": ("value", "v", "v_proj", "to_v", "wv", "w_v", "v_linear", "linear_v", "value_proj"),
}
"""How the three are called that are most often one."""


class Sizes(NamedTuple):
    """Of a linear layer: how many numbers it reads and gives, and the names of its tensors."""

    inputs: int
    outputs: int
    kernel: str
    bias: str | None


def sizes_of(layer: Layer, structure: Structure, framework: str) -> Sizes | None:
    """Of a linear layer or a convolution of size 1; None of all others."""
    shapes = {local: structure.shapes[full] for local, full in layer.tensors.items()}
    kernels = [local for local, shape in shapes.items() if len(shape) > 1 and not kinds.SHIFT.fullmatch(local)]
    biases = [local for local in shapes if kinds.SHIFT.fullmatch(local)]
    if (
        layer.kind not in ("linear", "conv", kinds.OTHER)
        or len(kernels) != 1
        or len(kernels) + len(biases) < len(shapes)
    ):
        return None
    shape, size = shapes[kernels[0]], int(np.prod(shapes[kernels[0]]))
    if layer.kind == "conv":
        if size != shape[0] * shape[1] and size != shape[-1] * shape[-2]:
            return None
        outputs, inputs = (shape[0], shape[1]) if framework == "torch" else (shape[-1], shape[-2])
        return Sizes(inputs, outputs, kernels[0], next(iter(biases), None))
    if framework == "torch" and len(shape) != 2:
        return None
    inputs, bias = shape[-1] if _is_out_in(layer, framework) else shape[0], next(iter(biases), None)
    if bias is not None and np.prod(shapes[bias]) != size // inputs:
        return None  # which of its axes are the outputs is not known
    return Sizes(inputs, size // inputs, kernels[0], bias)


def _is_out_in(layer: Layer, framework: str) -> bool:
    """Whether the outputs are the first axis of a linear layer's matrix."""
    return bool(layer.config.get(kinds.OUT_IN) if framework == "flax" else not layer.config.get(kinds.IN_OUT))


def role_of(path: str) -> str | None:
    """Whether a layer's name says that it makes queries, keys or values."""
    last = path.replace("/", ".").rpartition(".")[2].lower()
    last = last.rpartition("[")[2].rstrip("]")
    return next((role for role, names in ROLES.items() if last in names), None)


class Order(NamedTuple):
    """How the outputs of several layers lie in one.

    Attributes:
      parts: which of the layers comes first, and so on.
      heads: 0: one behind the other; h: within each of h equal groups of outputs one behind the other. As many groups
        as outputs of one layer: by turns.
      words: for the report.
    """

    parts: tuple[int, ...]
    heads: int
    words: str

    def rows(self, outputs: Sequence[int]) -> list[NDArray]:
        """Of each layer, which rows of the one are its own."""
        numbers = np.arange(sum(outputs))
        if not self.heads:
            cuts = np.split(numbers, np.cumsum([outputs[i] for i in self.parts])[:-1])
        else:
            cuts = [a.ravel() for a in numbers.reshape(self.heads, len(outputs), -1).swapaxes(0, 1)]
        return [cuts[self.parts.index(i)] for i in range(len(outputs))]


def orders(outputs: Sequence[int], heads: Sequence[int]) -> Iterator[Order]:
    """The orders that so many outputs may lie in, the usual first: head by head only where all are of one size."""
    count = len(outputs)
    groups = [h for h in dict.fromkeys((*heads, outputs[0])) if h > 1 and outputs[0] % h == 0]
    ways = [0, *(groups if len(set(outputs)) == 1 else [])]
    usual, *others = itertools.permutations(range(count))
    every = [*((usual, way) for way in ways), *((parts, 0) for parts in others)]
    for parts, way in [*every, *((parts, way) for parts in others for way in ways[1:])]:
        where = "by turns" if way == outputs[0] else f"in each of {way} heads"
        yield Order(parts, way, where if way else "one behind the other")


def split(
    whole: Layer, structure: Structure, framework: Framework, partners: Sequence[tuple[str, int]], order: Order
) -> Recut:
    """A layer cut into as many as it is on the other side.

    Args:
      whole: the layer.
      structure: of its side.
      framework: its side.
      partners: (the other side's path, number of outputs) of each part.
      order: how the parts lie in it.
    """
    sizes = sizes_of(whole, structure, framework)
    assert sizes is not None
    rows = order.rows([outputs for _, outputs in partners])
    labels = [role_of(path) or str(i) for i, (path, _) in enumerate(partners)]
    paths = [f"{whole.path}[{label}]" for label in labels]
    between = "." if framework == "torch" else "/"
    tensors: list[dict[str, str]] = [{} for _ in partners]
    pieces = []
    for local in (sizes.kernel, *([sizes.bias] if sizes.bias else [])):
        full = whole.tensors[local]
        head = "" if framework == "torch" else full.partition("/")[0] + "/"
        parts = tuple(f"{head}{path}{between}{local}" for path in paths)
        for own, part in zip(tensors, parts, strict=True):
            own[local] = part
        axis = _axis(whole, framework, is_bias=local == sizes.bias)
        pieces.append(cut_rows(full, structure.shapes[full], parts, rows, axis, is_flat=local == sizes.bias))
    made = tuple(
        Layer(path, whole.kind, whole.class_name, own, config=whole.config)
        for path, own in zip(paths, tensors, strict=True)
    )
    mine = [(layer.path, path) for layer, (path, _) in zip(made, partners, strict=True)]
    named = ", ".join(labels[:-1]) + f" and {labels[-1]}" if all(map(role_of, (p for p, _ in partners))) else ""
    text = f"{named or ', '.join(path for path, _ in partners)} {{}} {whole.path}, {order.words}"
    return Recut(
        framework,
        (whole.path,),
        made,
        tuple(pieces),
        dict(mine if framework == "torch" else [(b, a) for a, b in mine]),
        text.format("are cut from" if framework == "torch" else "are put together to"),
        calls=lambda call: _calls(call, paths, rows, whole.kind, framework),
    )


def _axis(whole: Layer, framework: str, *, is_bias: bool) -> int:
    """Of the outputs; of a `DenseGeneral`'s kernel, after all axes behind the first are joined."""
    if is_bias or _is_out_in(whole, framework):
        return 0
    return -1


def cut_rows(
    full: str, shape: Shape, parts: tuple[str, ...], rows: Sequence[NDArray], axis: int, *, is_flat: bool = False
) -> Piece:
    """A tensor cut along one axis; that of a `DenseGeneral`, whose outputs have several axes, after they are joined."""
    count = sum(map(len, rows))
    if is_flat:
        joined: Shape = (count,)
    elif shape[axis] != count:
        joined = (shape[0], count)
    else:
        joined = shape

    def apart(arrays: Sequence[NDArray]) -> list[NDArray]:
        return [np.take(arrays[0].reshape(joined), own, axis) for own in rows]

    def together(arrays: Sequence[NDArray]) -> list[NDArray]:
        order = np.argsort(np.concatenate(rows), kind="stable")
        return [np.take(np.concatenate(arrays, axis), order, axis).reshape(shape)]

    return Piece({full: shape}, parts, apart, together)


def _calls(call: Call, paths: Sequence[str], rows: Sequence[NDArray], kind: str, framework: str) -> list[Call]:
    """A call of the whole as one of each part: on the same input, each with its own outputs."""
    count = sum(map(len, rows))
    y = call.output
    axis = 1 if kind == "conv" and framework == "torch" and y.ndim > 2 else y.ndim - 1
    if y.shape[axis] != count:  # outputs of several axes
        axis = next((i for i in range(y.ndim) if int(np.prod(y.shape[i:])) == count), -1)
        if axis < 0:
            return []

    def part(a: NDArray, own: NDArray) -> NDArray:
        joined = a if a.shape[axis] == count else a.reshape(*a.shape[:axis], count)
        return np.take(joined, own, axis)

    return [
        replace(
            call,
            path=path,
            output=part(y, own),
            input_gradients=[None] * len(call.input_gradients),
            output_gradient=None if call.output_gradient is None else part(call.output_gradient, own),
        )
        for path, own in zip(paths, rows, strict=True)
    ]


def windows(layers: Sequence[Layer], structure: Structure, framework: str, whole: Sizes) -> Iterator[list[Layer]]:
    """Two to four layers one behind the other, of one parent, that read and give as many numbers as the whole."""
    for i in range(len(layers)):
        for count in (3, 2, 4):
            run = list(layers[i : i + count])
            sizes = [sizes_of(layer, structure, framework) for layer in run]
            if len(run) == count and _may_be(run, sizes, whole):
                yield run


def _may_be(run: Sequence[Layer], sizes: Sequence[Sizes | None], whole: Sizes) -> bool:
    parents = {layer.path.replace("/", ".").rpartition(".")[0].partition("[")[0] for layer in run}
    return (
        len(parents) == 1
        and all(s is not None and s.inputs == whole.inputs for s in sizes)
        and all(s is not None and (s.bias is None) == (whole.bias is None) for s in sizes)
        and sum(s.outputs for s in sizes if s is not None) == whole.outputs
    )


def heads_of(run: Sequence[Layer], structure: Structure) -> list[int]:
    """How many heads the layers may have: as `DenseGeneral`'s kernel says, else all that divide their outputs."""
    shapes = [max((structure.shapes[full] for full in layer.tensors.values()), key=len) for layer in run]
    said = {shape[1] for shape in shapes if len(shape) == 3}
    if said:
        return sorted(said)
    outputs = min(min(int(np.prod(shape[1:])), int(np.prod(shape[:-1]))) for shape in shapes)
    return [h for h in range(2, outputs) if outputs % h == 0]


def by_role(run: Sequence[Layer]) -> list[Layer]:
    """Queries, keys and values in this order, where the names say which is which; else as they are called."""
    roles = [role_of(layer.path) for layer in run]
    if None in roles or len(set(roles)) < len(run):
        return list(run)
    return [layer for role in ROLES for layer, own in zip(run, roles, strict=True) if own == role]


def said_by_names(run: Sequence[Layer]) -> bool:
    """Whether the names say which is which."""
    roles = [role_of(layer.path) for layer in run]
    return None not in roles and len(set(roles)) == len(run)
