"""From the differences in single-layer mode to the mistakes behind them: each place is given to its identification."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from parity.comparison.differences import Difference
from parity.diagnosis import attention_layer, padding_index, tied
from parity.diagnosis.between import family as between
from parity.diagnosis.between import input as inputs
from parity.diagnosis.between import integers
from parity.diagnosis.between.chains import Source
from parity.diagnosis.chomps import with_chomps
from parity.diagnosis.finding import PHASE_ORDER, Finding, Located, in_order
from parity.diagnosis.lone_layers import with_lone_layers
from parity.diagnosis.mistakes import UNEXPLAINED, is_one_sided, phase_of
from parity.diagnosis.norm import family as norms
from parity.diagnosis.norm.sources import NormSide
from parity.diagnosis.norm_after_activation import NormOrder
from parity.diagnosis.norm_position import NormPosition
from parity.diagnosis.parameters.conversion import of_layout
from parity.diagnosis.product import family as products
from parity.diagnosis.product.fits import ProductSide
from parity.pairing.arrangements import Slot
from parity.pairing.outputs import told
from parity.pairing.pairs import LayerPair
from parity.pairing.translation import Translation
from parity.records import kinds
from parity.records.distance import error_of
from parity.records.recording import NETWORK, Call, Recording

MOST_SOURCES = 8
MOST_COMPLEX = 1e-10
"""What complex outputs may differ by, as in `parity.comparison.bounds`."""
# What a finding charges between two layers: which of PyTorch's modules without tensors, by the names of their classes.
CHARGED = {
    "activation": lambda names: not re.search("Pool|Drop|Flatten|Pad|Upsample", names),
    "pool": lambda names: "Pool" in names,
    "dropout": lambda names: "Drop" in names,
}


class Diagnosis:
    """Explains the local differences of one comparison."""

    def __init__(
        self,
        translation: Translation,
        forced: Recording,
        free: Recording,
        local: Sequence[Difference],
        bounds: Mapping[Difference, float],
        *,
        train: bool,
        flax_inputs: Sequence[NDArray],
    ) -> None:
        self.translation, self.forced, self.free, self.train = translation, forced, free, train
        self.torch: Recording = translation.torch
        self.flax_calls = {call.key: call for call in forced.calls}
        self.flax_inputs = flax_inputs
        groups = tied.shared(translation)
        # A tensor of several layers has no gradient of one of them alone, and no layer is to blame for it.
        self.shared = {name for group in groups for name in group}
        self.tied = tied.findings(translation, forced, groups)
        told = {name for group in self.tied for name in group}
        self.tolerance = {d: max(1e-9, min(bounds[d], 1e-5)) for d in local}
        self.untrained, rows = padding_index.findings(translation, forced, free, self._tolerance)
        wrong = [d for d in local if d.error > bounds[d]]
        self.failing = [d for d in wrong if self._tensor(d) not in told and (d.key, d.quantity) not in rows]

    def run(self) -> list[Located]:
        """All findings; forward in order of execution, then backward, then statistics."""
        found = [*self.tied.values(), *self.untrained]
        for position, call in enumerate(self.torch.calls):
            pair = self.translation.pair_of.get(call.path)
            mine = self.flax_calls.get((pair.flax.path, call.index)) if pair else None
            if pair is None or mine is None:
                continue
            here = {d.quantity for d in self.failing if d.key == call.key}
            if "input" in here:
                found += self._glue(call, pair, mine, position, self._tolerance(call.key, "input"))
            left = call.index == 0 and (pair.torch_left or pair.flax_left)
            # Whole numbers are not forced: a table that is given others looks up other rows, and that is all.
            own = set() if "input" in here and pair.kind == "embedding" else here - {"input", "output gradient"}
            if own or left:
                found += self._layer(call, pair, mine, position)
        if any(d.key == NETWORK and d.quantity == "output" for d in self.failing):
            found += self._last_glue()
        found = NormOrder(self.translation, self.forced, self.free, self._tolerance).findings(found)
        found = NormPosition(self.translation, self.forced, self._tolerance).findings(found)
        found = with_chomps(found, self.translation)
        return in_order(with_lone_layers(found, self.translation, self.forced, self.free))

    def _tensor(self, difference: Difference) -> str | None:
        """Of which tensor, by its full name in PyTorch, a difference is the gradient."""
        pair = self.translation.pair_of.get(difference.key[0])
        local = difference.quantity.removesuffix(" gradient") if difference.phase == "backward" else ""
        return None if pair is None else pair.torch.tensors.get(local)

    def _tolerance(self, key: tuple[str, int], quantity: str) -> float:
        return max((t for d, t in self.tolerance.items() if d.key == key and d.quantity == quantity), default=1e-9)

    def _sources(self, position: int) -> list[Source]:
        """What the glue before this call can have been made of, the most recent first."""
        before = self.torch.calls[:position]
        known = [c for c in before if c.path in self.translation.pair_of][-MOST_SOURCES:]
        outputs = [Source(f"the output of {c.path}", self.translation.output(c)) for c in reversed(known)]
        # What arrives there in Flax is something else: nothing is made of PyTorch's.
        others = {d.key for d in self.failing if d.quantity == "input"}
        arrived = [
            Source(f"the input of {c.path}", self.translation.input(c, 0))
            for c in reversed(known)
            if c.inputs and c.inputs[0].dtype.kind == "f" and c.key not in others
        ]
        network = [Source("the network's input", a) for a in self.flax_inputs if a.dtype.kind == "f"]
        return outputs + arrived + network

    def _masks(self) -> list[Source]:
        """The network's inputs that may be masks, or ids of which one is padding."""
        return [Source(f"input {i + 1}", a) for i, a in enumerate(self.torch.inputs) if a.ndim > 0 and len(a)]

    def _glue(self, call: Call, pair: LayerPair, mine: Call, position: int, tolerance: float) -> list[Located]:
        found: list[Finding] = []
        for i, arrived in enumerate(mine.arrived[: len(call.inputs)]):
            truth = self.translation.input(call, i)
            # An image may be integers 0..255 on one side and 0..1 on the other: what one has as floats are no labels.
            if truth.dtype.kind != "f" and arrived.dtype.kind != "f":
                if not np.array_equal(truth, arrived):
                    found += integers.findings(call.path, truth, arrived, self._masks())
                continue
            if arrived.shape == truth.shape and np.abs(arrived - truth).max(initial=0) <= tolerance * np.abs(truth).max(
                initial=0
            ):
                continue
            if position == 0 and self.flax_inputs:
                # The inputs themselves are often float32, and so is whatever relates them.
                rounded = max(tolerance, 1e-6)
                given = inputs.findings(
                    self.flax_inputs[0],
                    truth,
                    arrived,
                    torch_input=self.torch.inputs[0],
                    flax_input=self.flax_inputs[0],
                    tolerance=rounded,
                )
                if given and given[0].code != "unexplained":
                    found += given
                    continue
            got = between.findings(
                self._sources(position), truth, arrived, train=self.train, tolerance=tolerance, masks=self._masks()
            )
            if arrived.shape != truth.shape:  # then the order of a flatten was not settled, and is no mistake
                got = [f for f in got if f.code != "flatten-order"] or got
            found += got
        return [self._located(f, call, pair.flax.path, position) for f in dict.fromkeys(found)]

    def _located(self, finding: Finding, call: Call, flax_layer: str, position: int) -> Located:
        """Glue is charged to PyTorch's own module where there is one, otherwise to the next layer."""
        fits = CHARGED.get(finding.charges)
        modules = [
            g for g in self.torch.glue if g.position == position and fits is not None and fits(" ".join(g.class_names))
        ]
        layer = modules[0].path if modules else call.path
        return Located("forward", position - 0.5, layer, flax_layer, finding, call.key, is_between=True)

    def _last_glue(self) -> list[Located]:
        found: list[Finding] = []
        for i, j in self.translation.results(self.forced.named_outputs):
            output = self.forced.outputs[j]
            truth = self.translation.result(i, output)
            if {output.dtype.kind, truth.dtype.kind} != {"f"} or not output.size or not truth.size:
                found += _other_numbers(truth, output, told(self.torch.named_outputs, i))
                continue
            tolerance = self._tolerance(NETWORK, "output")
            found += between.findings(
                self._sources(len(self.torch.calls)),
                truth,
                output,
                train=self.train,
                tolerance=tolerance,
                output=told(self.torch.named_outputs, i),
            )
        last = self.torch.calls[-1] if self.torch.calls else Call("", 0, [], np.zeros(0))
        pair = self.translation.pair_of.get(last.path)
        flax_layer = pair.flax.path if pair else ""
        position = len(self.torch.calls)
        return [self._located(f, last, flax_layer, position)._replace(key=NETWORK) for f in dict.fromkeys(found)]

    def _layer(self, call: Call, pair: LayerPair, mine: Call, position: int) -> list[Located]:
        quantities = [d for d in self.failing if d.key == call.key and d.quantity not in ("input", "output gradient")]
        # Of the gradient more is noise where a kink is near; what it says is judged with what the forward pass says.
        here = [d for d in self.tolerance if d.key == call.key and d.phase != "backward"]
        tolerance = max((self.tolerance[d] for d in here), default=1e-9)
        found: list[Finding]
        if pair.kind in kinds.NORMS:
            found = self._norm(call, pair, mine, tolerance)
        elif pair.kind in kinds.PRODUCTS and self._has_kernel(pair):
            found = products.findings(pair.kind, *self._product(call, pair, mine), tolerance=tolerance)
            found = [of_layout(f, pair.kind) for f in found]
        elif pair.kind == "attention":
            found = self._attention(call, pair, mine, tolerance)
        else:
            found = self._norm_of_no_name(call, pair, mine, tolerance)
        found += self._left(pair, found)
        if not found and quantities:
            names = ", ".join(
                f"{d.quantity} by {d.error:.1e}" if d.shapes is None else f"{d.quantity} has {d.shapes.text}"
                for d in quantities[:4]
            )
            found = [Finding("unexplained", f"{call.path} and {pair.flax.path} differ with the same input: {names}")]
        return [
            Located(_phase(f, quantities), position, call.path, pair.flax.path, f, call.key)
            for f in dict.fromkeys(found)
        ]

    def _has_kernel(self, pair: LayerPair) -> bool:
        """Whether the kernel of both sides is a tensor; that of a weight norm is made of two."""
        both = self._tensors(pair, self.torch, True)["before"], self._tensors(pair, self.forced, False)["before"]
        return all({"kernel", "scale"} & tensors.keys() for tensors in both)

    def _left(self, pair: LayerPair, found: Sequence[Finding]) -> list[Finding]:
        """Parameters that one side only has."""
        if any(is_one_sided(f.code) for f in found):
            return []
        left = [(n, "PyTorch", "Flax") for n in pair.torch_left if n not in pair.torch.statistics]
        left += [(n, "Flax", "PyTorch") for n in pair.flax_left if n not in pair.flax.statistics]
        if not left:
            return []
        name, has, lacks = left[0]
        is_bias = kinds.SHIFT.fullmatch(name.rpartition("/")[2].rpartition(".")[2]) is not None
        code = (
            "affine-missing"
            if pair.kind in kinds.NORMS and not all_bias(left)
            else "bias-missing"
            if is_bias
            else "unexplained"
        )
        return [Finding(code, f"{has}'s {pair.torch.path} has {', '.join(n for n, *_ in left)}, {lacks}'s has not")]

    def _norm(self, call: Call, pair: LayerPair, mine: Call, tolerance: float) -> list[Finding]:
        torch, flax = self._norm_side(call, pair, None), self._norm_side(call, pair, mine)
        if pair.kind == "batch_norm":
            return norms.batch_norm_findings(torch, flax, train=self.train, tolerance=tolerance)
        if pair.kind == "group_norm":
            return norms.group_norm_findings(torch, flax, tolerance=tolerance)
        return norms.layer_norm_findings(torch, flax, tolerance=tolerance)

    def _attention(self, call: Call, pair: LayerPair, mine: Call, tolerance: float) -> list[Finding]:
        """What lies between the projections of a library's attention, where both sides have the same weights."""
        expected = self.translation.pairing.to_flax(self.torch.tensors)
        tensors = {local: expected.get(full) for local, full in pair.flax.tensors.items()}
        alike = all(
            a is not None and error_of(self.forced.tensors[full], a) <= tolerance
            for a, full in zip(tensors.values(), pair.flax.tensors.values(), strict=True)
        )
        given = [self.translation.input(call, i) for i in range(len(call.inputs))]
        outputs = self.translation.output(call), mine.output
        if not alike or outputs[0].shape != outputs[1].shape:
            return []
        arrays = {name: a for name, a in tensors.items() if a is not None}
        return attention_layer.findings(given, outputs, arrays, self._masks(), tolerance)

    def _norm_of_no_name(self, call: Call, pair: LayerPair, mine: Call, tolerance: float) -> list[Finding]:
        """What is found of a layer of no known kind that has a norm's parameters, and whose numbers are a norm's."""
        torch, flax = self._norm_side(call, pair, None), self._norm_side(call, pair, mine)
        width = torch.x.shape[-1:]
        vectors = all(a is None or a.shape == width for side in (torch, flax) for a in (side.gamma, side.beta))
        alike = {a.shape for side in (torch, flax) for a in (side.x, side.y)} == {torch.x.shape}
        if not (vectors and alike and torch.gamma is not None and torch.x.ndim > 1 and torch.x.dtype.kind == "f"):
            return []
        found = norms.layer_norm_findings(torch, flax, tolerance=tolerance)
        return [] if any(f.code == UNEXPLAINED for f in found) else found

    def _norm_side(self, call: Call, pair: LayerPair, mine: Call | None) -> NormSide:
        """PyTorch's side in Flax's layout, or (with Flax's call) Flax's; new statistics only of a layer called once.

        And only where both runs came to their end: what one that stopped would have kept is not known.
        """
        tensors = self._tensors(pair, self.torch if mine is None else self.forced, mine is None)
        once = sum(c.path == call.path for c in self.torch.calls) == 1
        once = once and self.torch.has_ended and self.forced.has_ended
        before, after = tensors["before"], tensors["after"] if once else {}
        x = self.translation.input(call, 0)
        y = self.translation.output(call) if mine is None else mine.output
        dy = self.translation.gradient(Slot(call.key, "output"), call.output_gradient)
        dx = call.input_gradients[0] if call.input_gradients else None
        dx = (
            self.translation.gradient(Slot(call.key, "input", 0), dx)
            if mine is None
            else (mine.input_gradients or [None])[0]
        )
        return NormSide(
            x, y, before.get("scale"), before.get("bias"), before.get("mean"), before.get("var"),
            after.get("mean"), after.get("var"), dy, dx,
        )  # fmt: skip

    def _tensors(self, pair: LayerPair, recording: Recording, is_torch: bool) -> dict[str, dict[str, NDArray]]:
        """This side's tensors of a layer by role, in Flax's layout, before and after the run."""
        found: dict[str, dict[str, NDArray]] = {"before": {}, "after": {}, "gradient": {}}
        sources = {"before": recording.tensors, "after": recording.new_statistics, "gradient": recording.gradients}
        layer = pair.torch if is_torch else pair.flax
        moves = {t.torch_name: t.to_flax for t in pair.tensors} if is_torch else {}
        for local, full in layer.tensors.items():
            role = role_of(local, local in layer.statistics)
            for when, arrays in sources.items():
                if full in arrays and role:
                    a = arrays[full]
                    a = moves[local](a) if local in moves else a
                    found[when][role] = a.reshape(-1) if pair.kind == "batch_norm" else a
        return found

    def _has_own_gradients(self, call: Call, pair: LayerPair) -> bool:
        """Whether the gradients of this layer's tensors are those of this call alone."""
        once = sum(c.path == call.path for c in self.torch.calls) == 1
        return once and self.shared.isdisjoint(pair.torch.tensors.values())

    def _product(self, call: Call, pair: LayerPair, mine: Call) -> tuple[ProductSide, ProductSide]:
        sides = []
        for is_torch in True, False:
            tensors = self._tensors(pair, self.torch if is_torch else self.forced, is_torch)
            before = tensors["before"]
            kernel = before["kernel"] if "kernel" in before else before["scale"]
            dkernel = tensors["gradient"].get("kernel", tensors["gradient"].get("scale"))
            if pair.is_out_in:
                kernel, dkernel = kernel.T, None if dkernel is None else dkernel.T
            dx = call.input_gradients[0] if is_torch else mine.input_gradients[0] if mine.input_gradients else None
            sides.append(
                ProductSide(
                    self.translation.input(call, 0),
                    self.translation.output(call) if is_torch else mine.output,
                    kernel,
                    before.get("bias"),
                    self.translation.gradient(Slot(call.key, "output"), call.output_gradient),
                    self.translation.gradient(Slot(call.key, "input", 0), dx) if is_torch else dx,
                    dkernel if self._has_own_gradients(call, pair) else None,
                    dict((pair.torch if is_torch else pair.flax).config),
                )
            )
        return sides[0], sides[1]


def _other_numbers(torch: NDArray, flax: NDArray, output: str) -> list[Finding]:
    """What differs in an output of whole or complex numbers or of truth values, which no known mistake explains."""
    if not error_of(flax, torch) > MOST_COMPLEX:
        return []
    if torch.shape != flax.shape:
        return [Finding("unexplained", f"{output} has shape {torch.shape} in PyTorch, {flax.shape} in Flax")]
    is_complex = "c" in (torch.dtype.kind, flax.dtype.kind)
    wrong = np.abs(flax - torch) > MOST_COMPLEX * np.abs(torch).max() if is_complex else flax != torch
    what = "complex numbers" if is_complex else "whole numbers or truth values"
    return [Finding("unexplained", f"{output}, of {what}, differs in {int(wrong.sum())} of {wrong.size} places")]


def all_bias(left: Sequence[tuple[str, str, str]]) -> bool:
    """Whether all of these parameters are shifts."""
    return all(kinds.SHIFT.fullmatch(name.rpartition("/")[2].rpartition(".")[2]) for name, *_ in left)


def role_of(local: str, is_statistic: bool) -> str | None:
    """What a tensor is to its layer: kernel, scale, bias, mean or var; by its name."""
    name = local.rpartition("/")[2].rpartition(".")[2]
    if is_statistic:
        return "mean" if kinds.MEAN.fullmatch(name) else "var" if kinds.VAR.fullmatch(name) else None
    if kinds.SHIFT.fullmatch(name):
        return "bias"
    return (
        "kernel"
        if name in ("kernel", "filter")
        else "scale"
        if kinds.SCALE.fullmatch(name) or kinds.WEIGHT.fullmatch(name)
        else None
    )


def _phase(finding: Finding, quantities: Sequence[Difference]) -> str:
    if phase_of(finding.code) != "forward":
        return phase_of(finding.code)
    phases = {d.phase for d in quantities}
    return min(phases, key=PHASE_ORDER.__getitem__) if phases else "backward"
