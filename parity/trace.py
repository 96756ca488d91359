"""The two recordings side by side, in Flax's layout: every difference, each side on its own or in single-layer mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity import kinds
from parity.pairing import LayerPair, Pairing
from parity.recording import Call, Recording

# Kinds of layers whose channels PyTorch has on axis 1, Flax on the last; all others have them last in both.
CHANNELS_FIRST = {"conv", "conv_transpose", "batch_norm", "group_norm"}

NETWORK = ("", -1)
"""In the place of a call: the network as a whole."""

Layout = tuple
"""How an activation goes from PyTorch to Flax: ("same",), ("last",), ("swap",) or ("flatten", (C, *spatial))."""


def apply_layout(layout: Layout, a: NDArray) -> NDArray:
    """PyTorch's array in Flax's layout.

    "last" moves axis 1 to the end, "swap" exchanges the first two axes (sequence and batch), "flatten" reorders the
    last axis from C, *spatial to *spatial, C.
    """
    if layout[0] == "last":
        return np.moveaxis(a, 1, -1)
    if layout[0] == "swap":
        return np.swapaxes(a, 0, 1)
    if layout[0] == "flatten":
        return np.moveaxis(a.reshape(*a.shape[:-1], *layout[1]), a.ndim - 1, -1).reshape(a.shape)
    return a


def error_of(given: NDArray, truth: NDArray, floor: float = 0.0) -> float:
    """max|given - truth| / max(max|truth|, floor); infinity where shapes, NaNs or infinities differ.

    NaN where there was nothing to compare: both are empty, hold NaN in the same places, or nothing finite.
    """
    a, b = np.asarray(given, np.float64), np.asarray(truth, np.float64)
    if a.shape != b.shape:
        return float("inf")
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.all():
        same = np.array_equal(a[~finite], b[~finite], equal_nan=True)
        if not same:
            return float("inf")
        if np.isnan(b).any():
            return float("nan")
        a, b = a[finite], b[finite]
    if not a.size:
        return float("nan")
    worst = float(np.abs(a - b).max(initial=0.0))
    if worst == 0:
        return 0.0
    scale = max(float(np.abs(b).max(initial=0.0)), floor)
    return worst / scale if scale > 0 else float("inf")


def layouts_for(kind: str, a: NDArray, shape: Sequence[int], flattened: Sequence[tuple[int, ...]] = ()) -> list[Layout]:
    """The layouts that give PyTorch's array this shape, the usual one of this kind of layer first."""
    first = ("last",) if kind in CHANNELS_FIRST and a.ndim > 2 else ("same",)
    every: list[Layout] = [first]
    every += [("flatten", s) for s in flattened if a.ndim == 2 and np.prod(s) == a.shape[-1]]
    if kind in CHANNELS_FIRST:
        every.append(("same",))
    else:
        every += [("last",)] * (a.ndim > 2) + [("swap",)] * (a.ndim == 3)
    return [layout for layout in every if apply_layout(layout, a).shape == tuple(shape)] or [first]


class Translation:
    """Decides once, from shapes and where these leave a choice from numbers, in which layout each array goes across."""

    def __init__(self, torch: Recording, pairing: Pairing) -> None:
        self.torch, self.pairing = torch, pairing
        self.pair_of = {pair.torch.path: pair for pair in pairing.layers}
        self.torch_path = {pair.flax.path: pair.torch.path for pair in pairing.layers}
        self.calls = {call.key: call for call in torch.calls}
        self.position = {call.key: i for i, call in enumerate(torch.calls)}
        self.chosen: dict[tuple, Layout] = {}

    def torch_call(self, flax_key: tuple[str, int]) -> Call | None:
        """PyTorch's call that belongs to this call of Flax."""
        path = self.torch_path.get(flax_key[0])
        return None if path is None else self.calls.get((path, flax_key[1]))

    def input(self, call: Call, i: int, arrived: Any = None) -> NDArray:
        """The i-th input of PyTorch's call in Flax's layout; `arrived` is Flax's, for its shape."""
        kind = self.pair_of[call.path].kind
        flattened = self._before_flatten(call, kind)
        return self._layout((call.key, "input", i), call.inputs[i], kind, arrived, flattened)

    def output(self, call: Call, like: Any = None) -> NDArray:
        """The output of PyTorch's call in Flax's layout."""
        kind = self.pair_of[call.path].kind
        return self._layout((call.key, "output"), call.output, kind, like)

    def result(self, i: int, like: Any = None) -> NDArray:
        """The i-th output of PyTorch's network in Flax's layout."""
        return self._layout(("result", i), self.torch.outputs[i], "other", like, self._channels_before())

    def gradient(self, which: tuple, gradient: NDArray | None) -> NDArray | None:
        """A gradient, in the layout of what it belongs to."""
        return None if gradient is None else apply_layout(self.chosen.get(which, ("same",)), gradient)

    def _layout(self, which, a, kind, like, flattened=()) -> NDArray:
        if which not in self.chosen:
            shape = apply_layout(layouts_for(kind, a, ())[0], a).shape if like is None else np.shape(like)
            self.chosen[which] = layouts_for(kind, a, shape, flattened)[0]
        return apply_layout(self.chosen[which], a)

    def settle(self, forced: Recording) -> None:
        """Where shapes leave a choice of layouts, chooses by what arrived in single-layer mode."""
        for mine in forced.calls:
            call = self.torch_call(mine.key)
            if call is None:
                continue
            kind, layout = self.pair_of[call.path].kind, None
            flattened = self._before_flatten(call, kind)
            for i, (a, arrived) in enumerate(zip(call.inputs, mine.arrived, strict=False)):
                which, fitting = (call.key, "input", i), layouts_for(kind, a, arrived.shape, flattened)
                # Where the kind says it, numbers that happen to agree must not: it may be the mistake.
                by_kind = kind in CHANNELS_FIRST and a.ndim > 2
                self.chosen[which] = fitting[0] if by_kind else _closest(fitting, a, arrived)
                layout = layout or self.chosen[which]
            fitting = layouts_for(kind, call.output, mine.output.shape, () if kind == "linear" else flattened)
            self.chosen[call.key, "output"] = layout if layout in fitting else fitting[0]
        for i, (a, output) in enumerate(zip(self.torch.outputs, forced.outputs, strict=False)):
            fitting = layouts_for("other", a, output.shape, self._channels_before())
            self.chosen["result", i] = _closest(fitting, a, output)

    def _before_flatten(self, call: Call, kind: str) -> list[tuple[int, ...]]:
        """What can have been flattened to this layer's input: (C, H, W) of as many numbers."""
        if kind not in ("linear", *kinds.NORMS) or not call.inputs or call.inputs[0].ndim != 2:
            return []
        return self._shapes(self.torch.calls[: self.position[call.key]], call.inputs[0].shape[-1])

    def _channels_before(self) -> list[tuple[int, ...]]:
        size = self.torch.outputs[0].shape[-1] if self.torch.outputs and self.torch.outputs[0].ndim else 0
        return self._shapes(self.torch.calls, size)

    def _shapes(self, before: Sequence[Call], size: int) -> list[tuple[int, ...]]:
        images = [c.output for c in before if c.output.ndim > 2 and self._kind(c) in CHANNELS_FIRST]
        images = images or [a for a in self.torch.inputs if a.dtype.kind == "f" and a.ndim > 2]
        image = images[-1] if images else None
        if image is None or size % image.shape[1] or size == image.shape[1]:
            return []
        channels, pixels = image.shape[1], size // image.shape[1]
        if image.ndim == 3:
            return [(channels, pixels)]
        if image.ndim == 4:
            heights = [h for h in range(1, pixels + 1) if pixels % h == 0]
            aspect = image.shape[2] / image.shape[3]
            heights.sort(key=lambda h: abs(np.log(h * h / pixels / aspect)))
            return [(channels, h, pixels // h) for h in heights[:6]]
        edge = round(pixels ** (1 / (image.ndim - 2)))
        return [(channels, *[edge] * (image.ndim - 2))] if edge ** (image.ndim - 2) == pixels else []

    def _kind(self, call: Call) -> str:
        return self.pair_of[call.path].kind if call.path in self.pair_of else "other"

    def flattens(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(PyTorch's path, (C, *spatial)) of every linear layer whose inputs stand in another order in Flax."""
        for which, layout in self.chosen.items():
            if layout[0] == "flatten" and which[0] != "result":
                yield which[0][0], layout[1]


def _closest(layouts: list[Layout], a: NDArray, like: NDArray) -> Layout:
    """The layout in which the numbers agree best; the usual one unless another is clearly closer."""
    if len(layouts) == 1 or apply_layout(layouts[0], a).shape != like.shape:
        return layouts[0]
    # By correlation, of either sign: another activation or a factor may have changed the values, not which of them
    # are large and which small (or, where it falls, small and large).
    distances = [1 - abs(_correlation(apply_layout(layout, a), like)) for layout in layouts]
    best = int(np.argmin(distances))
    return layouts[best] if distances[best] < 0.7 * distances[0] else layouts[0]


def _correlation(a: NDArray, b: NDArray) -> float:
    a, b = (np.where(np.isfinite(v), v, 0).astype(np.float64).ravel() for v in (a, b))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else 0.0


class Forcing:
    """Single-layer mode: every layer of Flax gets PyTorch's input, and what follows PyTorch's output."""

    def __init__(self, translation: Translation) -> None:
        self.translation = translation

    def input(self, key, i, arrived):
        """See `flax_side.Force`."""
        call = self.translation.torch_call(key)
        if call is None or i >= len(call.inputs) or call.inputs[i].dtype.kind != "f":
            return None
        value = self.translation.input(call, i, arrived)
        gradients = call.input_gradients
        return value, self.translation.gradient((call.key, "input", i), gradients[i] if i < len(gradients) else None)

    def output(self, key, output):
        """See `flax_side.Force`."""
        call = self.translation.torch_call(key)
        if call is None:
            return None
        value = self.translation.output(call, output)
        return value, self.translation.gradient((call.key, "output"), call.output_gradient)

    def result(self, i, output):
        """See `flax_side.Force`."""
        torch = self.translation.torch
        if i >= len(torch.outputs):
            return None
        value = self.translation.result(i, output)
        gradient = torch.output_gradients[i] if i < len(torch.output_gradients) else None
        return value, self.translation.gradient(("result", i), gradient)


class Difference(NamedTuple):
    """One number that both sides have: how far apart.

    Attributes:
      phase: see `parity.report.PHASES`.
      key: PyTorch's call (layer, index); `NETWORK` is the network itself.
      flax_layer: Flax's path.
      quantity: "input" | "output" | "output gradient" | "input gradient" | a parameter's or statistic's local name.
      error: see `error_of`; NaN: it could not be compared.
    """

    phase: str
    key: tuple[str, int]
    flax_layer: str
    quantity: str
    error: float


def differences(translation: Translation, flax: Recording, *, train: bool) -> list[Difference]:
    """Every difference of a run of Flax's from PyTorch's: forward in order, backward from behind, then statistics."""
    torch, found = translation.torch, []
    calls = {call.key: call for call in flax.calls}
    keys = [
        (call, (pair.flax.path, call.index)) for call in torch.calls if (pair := translation.pair_of.get(call.path))
    ]

    def add(phase, key, layer, quantity, error):
        found.append(Difference(phase, key, layer, quantity, error))

    found += _not_finite(translation)
    stopped = False
    for call, flax_key in keys:
        mine = calls.get(flax_key)
        if mine is None and flax.failure is not None and not stopped:
            # The run ended here: what arrives has a shape that this layer cannot take.
            add("forward", call.key, flax_key[0], "input", float("inf"))
            stopped = True
        if mine is None:
            # A layer that was never seen is inside a transformation of the user's own.
            if flax.failure is None and any(c.path == flax_key[0] for c in flax.calls):
                add("forward", call.key, flax_key[0], "output", float("inf"))
            continue
        for i, arrived in enumerate(mine.arrived[: len(call.inputs)]):
            add("forward", call.key, flax_key[0], "input", error_of(arrived, translation.input(call, i, arrived)))
        add("forward", call.key, flax_key[0], "output", error_of(mine.output, translation.output(call, mine.output)))
    if flax.failure is not None and not stopped:  # behind the last layer
        add("forward", NETWORK, "", "output", float("inf"))
    if flax.failure is None:
        if len(torch.outputs) != len(flax.outputs):
            add("forward", NETWORK, "", "output", float("inf"))
        for i, output in enumerate(flax.outputs[: len(torch.outputs)]):
            add("forward", NETWORK, "", "output", error_of(output, translation.result(i, output)))
    if flax.gradients and flax.failure is None:
        found += _backward(translation, flax, keys, calls)
    if train and flax.failure is None:
        for _, pair in translation.pair_of.items():
            for t in pair.tensors:
                if t.torch_name in pair.torch.statistics and pair.flax.tensors[t.flax_name] in flax.new_statistics:
                    truth = t.to_flax(torch.new_statistics[pair.torch.tensors[t.torch_name]])
                    given = flax.new_statistics[pair.flax.tensors[t.flax_name]]
                    add("statistics", (pair.torch.path, 0), pair.flax.path, t.torch_name, error_of(given, truth))
    return found


def _not_finite(translation: Translation) -> Iterator[Difference]:
    """PyTorch's weights that hold NaN or infinity: what they are multiplied with cannot be compared."""
    flax_path = {pair.torch.path: pair.flax.path for pair in translation.pairing.layers}
    for name, _, _ in translation.pairing.tensors():
        a = translation.torch.tensors.get(name, np.zeros(()))
        # A buffer may hold an infinity on purpose, as a mask does.
        is_parameter = name in translation.torch.gradients
        if not (np.isfinite(a) if is_parameter else ~np.isnan(a)).all():
            path, _, local = name.rpartition(".")
            yield Difference("forward", (path, 0), flax_path.get(path, ""), local, float("nan"))


def _backward(translation: Translation, flax: Recording, keys, calls) -> list[Difference]:
    torch, found = translation.torch, []
    # A gradient that is 0 by cancellation is compared with what cancelled: no more than 1e-6 of the largest there is.
    activations = [g for c in torch.calls for g in (*c.input_gradients, c.output_gradient) if g is not None]
    floor = 1e-6 * max((float(np.abs(g).max(initial=0)) for g in activations), default=0.0)
    largest = 1e-6 * max((float(np.abs(g).max(initial=0)) for g in torch.gradients.values()), default=0.0)
    for i, gradient in enumerate(flax.output_gradients[: len(torch.outputs)]):
        truth = translation.gradient(("result", i), torch.output_gradients[i])
        if gradient is not None and truth is not None:
            found.append(Difference("loss", NETWORK, "", "gradient", error_of(gradient, truth)))
    for call, flax_key in reversed(keys):
        mine, pair = calls.get(flax_key), translation.pair_of[call.path]
        if mine is None or mine.output_gradient is None or call.output_gradient is None:
            continue
        dy = apply_layout(translation.chosen.get((call.key, "output"), ("same",)), call.output_gradient)
        found.append(
            Difference("backward", call.key, flax_key[0], "output gradient", error_of(mine.output_gradient, dy, floor))
        )
        if call.index == max(c.index for c, k in keys if c.path == call.path):
            found += _parameters(translation, flax, pair, call, dy, largest)
        for i, gradient in enumerate(mine.input_gradients[: len(call.input_gradients)]):
            truth = translation.gradient((call.key, "input", i), call.input_gradients[i])
            if gradient is not None and truth is not None:
                error = error_of(gradient, truth, floor)
                found.append(Difference("backward", call.key, flax_key[0], "input gradient", error))
    for torch_name, flax_name, t in translation.pairing.tensors():
        owner = next((p for p in translation.pair_of.values() if torch_name in p.torch.tensors.values()), None)
        if (
            (owner is None or not owner.torch.is_called)
            and torch_name in torch.gradients
            and flax_name in flax.gradients
        ):
            error = error_of(flax.gradients[flax_name], t.to_flax(torch.gradients[torch_name]), largest)
            key = (torch_name.rpartition(".")[0], 0)
            found.append(
                Difference(
                    "backward", key, flax_name.partition("/")[2].rpartition("/")[0], f"{t.torch_name} gradient", error
                )
            )
    return found


def _parameters(translation, flax, pair: LayerPair, call: Call, dy: NDArray, largest: float) -> list[Difference]:
    torch, found = translation.torch, []
    for t in pair.tensors:
        torch_name, flax_name = pair.torch.tensors[t.torch_name], pair.flax.tensors[t.flax_name]
        if torch_name not in torch.gradients or flax_name not in flax.gradients:
            continue
        truth = t.to_flax(torch.gradients[torch_name])
        # A bias before a batch norm is a gauge: what its gradient sums up cancels to 0.
        is_bias = kinds.SHIFT.fullmatch(t.flax_name.rpartition("/")[2]) is not None
        summed = float(np.abs(dy).sum(tuple(range(dy.ndim - 1))).max(initial=0)) if is_bias else 0.0
        error = error_of(flax.gradients[flax_name], truth, max(largest, summed))
        found.append(Difference("backward", call.key, pair.flax.path, f"{t.torch_name} gradient", error))
    return found


def check_inputs(inputs: Sequence[NDArray], name: str = "inputs") -> None:
    """ValueError where there is no number in any of the inputs."""
    shapes = [np.shape(a) for a in inputs]
    if shapes and not any(np.prod(shape) for shape in shapes):
        raise ValueError(
            f"{name} are empty, of shape {', '.join(map(str, shapes))}: nothing would be compared; allowed: an example "
            "or more"
        )


def flat_layout_inputs(inputs: Sequence[NDArray], torch: Recording | None = None) -> list[NDArray]:
    """The network's inputs in Flax's layout: floating arrays of rank 3 and more channels last.

    With PyTorch's recording, those that go straight into a layer that has its channels last in PyTorch too (linear,
    layer norm, attention) stay as they are.
    """
    last = {"linear", "layer_norm", "rms_norm", "attention"}
    readers = [] if torch is None else [c for c in torch.calls if torch.layers[c.path].kind in last]

    def stays(a: NDArray) -> bool:
        return any(x.shape == a.shape and error_of(x, a) <= 1e-6 for call in readers for x in call.inputs)

    return [np.moveaxis(a, 1, -1) if a.dtype.kind == "f" and a.ndim >= 3 and not stays(a) else a for a in inputs]


Projections = Callable[[Sequence[Any]], list[NDArray]]
Tensors = Mapping[str, NDArray]
