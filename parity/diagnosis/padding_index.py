"""A row of an embedding's table that one side does not train, as PyTorch's `padding_idx`: the outputs agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.family import SIDES
from parity.diagnosis.finding import Finding, Located
from parity.pairing.arrangements import Slot
from parity.pairing.pairs import LayerPair
from parity.pairing.translation import Translation
from parity.records.recording import Call, Recording

Array = NDArray[Any]


class LookUp(NamedTuple):
    """One call of a table: the rows that were looked up, `[*]`, and the gradient that arrives there, `[*, D]`."""

    key: tuple[str, int]
    rows: Array
    torch: Array
    flax: Array | None


class Table(NamedTuple):
    """A table that both sides have, and everything looked up in it. Gradients are in Flax's layout, `[V, D]`.

    Attributes:
      pair: the layer that it is of.
      names: its full name in PyTorch, and in Flax.
      torch: PyTorch's gradient.
      flax: Flax's, in single-layer mode.
      free: Flax's, when it runs on its own.
      calls: the look-ups.
    """

    pair: LayerPair
    names: tuple[str, str]
    torch: Array
    flax: Array
    free: Array
    calls: list[LookUp]

    @property
    def summed(self) -> Array:
        """The derivative of the look-ups: row i is the sum of what arrives where i was looked up."""
        found = np.zeros(self.torch.shape)
        for call in self.calls:
            np.add.at(found, call.rows, call.torch)
        return found


def findings(
    translation: Translation, forced: Recording, free: Recording, tolerance: Callable[[tuple[str, int], str], float]
) -> tuple[list[Located], set[tuple[tuple[str, int], str]]]:
    """What is found of every table.

    Args:
      translation: which layer, tensor and axis is which.
      forced: Flax's run in single-layer mode.
      free: Flax's own.
      tolerance: what the gradients of a call may differ by, of its key and the quantity.

    Returns:
      The findings, and (call, quantity) of the differences that are explained: by a finding, or because both sides
      leave out the same row, one in the layer and one behind it.
    """
    found, explained = list[Located](), set[tuple[tuple[str, int], str]]()
    for table in _tables(translation, forced, free):
        last = table.calls[-1].key
        quantity = f"{table.names[0].rpartition('.')[2]} gradient"
        in_layer = _left_out_in_the_layer(table, tolerance(last, quantity))
        behind = _left_out_behind(table, tolerance(last, "output gradient"))
        explained |= {(last, quantity)} if in_layer else set()
        explained |= {(call.key, "output gradient") for call in table.calls} if behind else set()
        left_out = [*dict.fromkeys(filter(None, (in_layer, behind)))]
        for side, row in left_out:
            both = (1 - side, row) in left_out or not (table.torch[row].any() or table.free[row].any())
            if not both:
                place = translation.position[last], table.pair.torch.path, table.pair.flax.path
                found.append(Located("backward", *place, _finding(table, side, row), last))
    return found, explained


def _finding(table: Table, side: int, row: int) -> Finding:
    count = sum(int((call.rows == row).sum()) for call in table.calls)
    name = (table.names[0], table.names[1].partition("/")[2])[side]
    largest = [float(np.abs(gradient[row]).max()) for gradient in (table.torch, table.free)]
    text = (
        f"{SIDES[side]} does not train row {row} of {name}, which is looked up in {count} places: its largest gradient "
        f"is {largest[0]:.3g} in PyTorch, {largest[1]:.3g} in Flax; in all other rows they agree"
    )
    return Finding("padding-index", text)


def _tables(translation: Translation, forced: Recording, free: Recording) -> Iterator[Table]:
    theirs = {call.key: call for call in forced.calls}
    for pair in translation.pairing.layers:
        own = [t for t in pair.tensors if pair.torch.tensors[t.torch_name] in translation.torch.gradients]
        calls = [call for call in translation.torch.calls if call.path == pair.torch.path]
        if len(own) != 1 or not calls or not all(map(_is_look_up, calls)):
            continue
        names = pair.torch.tensors[own[0].torch_name], pair.flax.tensors[own[0].flax_name]
        truth, given = own[0].to_flax(translation.torch.gradients[names[0]]), forced.gradients.get(names[1])
        if given is None or truth.ndim != 2 or truth.shape != given.shape:
            continue
        looked_up = [_look_up(translation, call, theirs.get((pair.flax.path, call.index))) for call in calls]
        # Positions that one side looks up for all examples at once, the other for each, are not looked at.
        if all(up.torch.shape == (*up.rows.shape, truth.shape[1]) and 0 <= up.rows.min() <= up.rows.max() < len(truth)
               for up in looked_up):  # fmt: skip
            yield Table(pair, names, truth, given, free.gradients.get(names[1], given), looked_up)


def _is_look_up(call: Call) -> bool:
    rows = call.inputs[0] if call.inputs else np.zeros(0)
    return (
        rows.dtype.kind in "iu"
        and rows.size > 0
        and call.output.shape[:-1] == rows.shape
        and call.output_gradient is not None
    )


def _look_up(translation: Translation, call: Call, mine: Call | None) -> LookUp:
    torch = translation.gradient(Slot(call.key, "output"), call.output_gradient)
    flax = None if mine is None else mine.output_gradient
    assert torch is not None  # see _is_look_up
    return LookUp(call.key, call.inputs[0], torch, flax if flax is not None and flax.shape == torch.shape else None)


def _left_out_in_the_layer(table: Table, tolerance: float) -> tuple[int, int] | None:
    """(side, row), where the gradients differ in one row alone, by what was looked up there.

    Of a tensor that is also the head's, the head's part stays.
    """
    apart, own = table.torch - table.flax, table.summed
    allowed = tolerance * max(np.abs(table.torch).max(), np.abs(table.flax).max(), 1e-300)
    differ = np.flatnonzero(np.abs(apart).max(1) > allowed)
    if len(differ) != 1:
        return None
    row = int(differ[0])
    for side, (mine, sign) in enumerate(((table.torch, -1), (table.flax, 1))):
        is_left_out = not mine[row].any() or np.abs(apart[row] - sign * own[row]).max() <= allowed
        # A table that is not trained at all is another matter.
        if is_left_out and np.delete(mine, row, 0).any():
            return side, row
    return None


def _left_out_behind(table: Table, tolerance: float) -> tuple[int, int] | None:
    """(side, row), where what arrives at the table is 0 on one side for that row alone, and else the same."""
    calls = [(call.rows, call.torch, call.flax) for call in table.calls if call.flax is not None]
    if len(calls) != len(table.calls):
        return None
    rows = np.concatenate([rows.ravel() for rows, _, _ in calls])
    sides = [np.concatenate([call[1 + i].reshape(len(call[0].ravel()), -1) for call in calls]) for i in (0, 1)]
    allowed = tolerance * max(*(np.abs(dy).max() for dy in sides), 1e-300)
    differ = np.abs(sides[0] - sides[1]).max(1) > allowed
    if len(left_out := {*rows[differ].tolist()}) != 1:
        return None
    (row,) = left_out
    for side, dy in enumerate(sides):
        if not dy[rows == row].any() and dy[rows != row].any():
            return side, row
    return None
