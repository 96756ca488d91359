"""Figures of an optimised HLO program, from its text.

**Traffic** is what goes through memory at the borders of fusions: of each instruction that runs by itself the bytes of
its operands, of which a fusion may read a slice only, and of its results. Caches are not counted. A branch that
`lax.cond` need not take is looked at apart: the figures are those of the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "c64": 8, "c128": 16}
"""Of the dtypes whose name does not end in their bits."""
FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"))
FREE |= {"replica-id", "opt-barrier", "domain"}
"""Instructions that move nothing."""
CALLS = frozenset(("while", "call", "async-start"))
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)")


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str


class Figures(NamedTuple):
    """Of a program.

    Attributes:
      traffic: bytes.
      fusions: how many fusions run.
      collectives: how many operations over devices.
      sent: bytes of what these give.
      float64: how many instructions make float64, fused ones too.
      cycles: the TPU compiler's own estimate, None of another's; to compare two programs with, no more.
    """

    traffic: int
    fusions: int
    collectives: int
    sent: int
    float64: int
    cycles: int | None


def figures(text: str) -> Figures:
    """The figures of an optimised program, `compiled.as_text()`."""
    computations, entry = parse(text)
    shapes = {line.name: line.shape for lines in computations.values() for line in lines}
    run = list(_that_run(computations, entry))
    moved = [line for line in run if line.op not in FREE | CALLS | {"conditional"} and not line.op.endswith("-done")]
    together = [line for line in run if line.op.removesuffix("-start") in COLLECTIVES]
    lines = {line.name for line in run}
    cycles = [
        int(found[2])
        for found in re.finditer(r'%([\w.\-]+) = [^\n]*?"estimated_cycles":"?(\d+)', text)
        if found[1] in lines
    ]
    return Figures(
        traffic=sum(size(line.shape) + _read(line, computations, shapes) for line in moved),
        fusions=sum(line.op == "fusion" for line in run),
        collectives=len(together),
        sent=sum(size(line.shape) for line in together),
        float64=sum("f64[" in line.shape for lines in computations.values() for line in lines if line.op not in FREE),
        cycles=sum(cycles) if cycles else None,
    )


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(the lines of each computation by its name, the name of the one that is run).

    Raises:
      ValueError: there is no ENTRY.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", list[Instruction]()
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("  ") and " = " in line:
            lines.append(_instruction(line))
    if not entry:
        raise ValueError("the text has no ENTRY; allowed: an HLO module, as compiled.as_text() gives it")
    return computations, entry


def size(shape: str) -> int:
    """The bytes of all arrays in a type: `f32[8,3]{1,0}`, or a tuple of such."""
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        bits = re.match(r"[a-z]+(\d+)", dtype)
        each = BYTES.get(dtype) or (int(bits[1]) / 8 if bits else 0)
        total += math.ceil(each * math.prod(int(dim) for dim in dims.split(",") if dim))
    return total


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    shape, rest = _up_to(rest, " ")
    op, _, rest = rest.strip().partition("(")
    operands, rest = _up_to(rest, ")")
    names = tuple(part.strip().split(" ")[-1].lstrip("%") for part in _split(re.sub(r"/\*.*?\*/", "", operands)))
    return Instruction(name.lstrip("%"), shape, op, names, rest)


def _up_to(text: str, end: str) -> tuple[str, str]:
    """What is before the first `end` that no bracket holds, and what is behind it."""
    depth = 0
    for place, letter in enumerate(text):
        if letter == end and depth == 0:
            return text[:place], text[place + 1 :]
        depth += (letter in "({[") - (letter in ")}]")
    return text, ""


def _split(text: str) -> Iterator[str]:
    while text:
        part, text = _up_to(text, ",")
        yield part


def _that_run(computations: dict[str, list[Instruction]], entry: str) -> Iterator[Instruction]:
    """The entry's lines and those of the loops and calls in it; no fused ones, and no branches."""
    left, seen = [entry], {entry}
    while left:
        for line in computations[left.pop()]:
            yield line
            if line.op in CALLS:
                called = [name for name in _CALLED.findall(line.rest) if name in computations and name not in seen]
                left += called
                seen.update(called)


def _read(line: Instruction, computations: dict[str, list[Instruction]], shapes: dict[str, str]) -> int:
    """Bytes of its operands that an instruction looks at."""
    sizes = [size(shapes.get(name, "")) for name in line.operands]
    if line.op in ("dynamic-slice", "gather", "slice") and sizes:
        sizes[0] = size(line.shape)
    called = _CALLED.search(line.rest)
    if line.op == "fusion" and called and called[1] in computations:
        body = computations[called[1]]
        for part in body:
            if part.op == "parameter" and (number := int(part.operands[0])) < len(sizes):
                sizes[number] = min(sizes[number], _looked_at(part.name, body, sizes[number]))
    return sum(sizes)


def _looked_at(name: str, body: list[Instruction], whole: int) -> int:
    """Bytes that a fusion's body reads of a value: all of it, unless only slices of it are used."""
    total = 0
    for line in body:
        if name in line.operands:
            if line.op in ("slice", "dynamic-slice", "gather") and line.operands[0] == name:
                total += size(line.shape)
            elif line.op in ("convert", "bitcast", "reshape", "copy", "transpose"):
                total += _looked_at(line.name, body, whole)
            else:
                return whole
    return min(total, whole) if total else whole
