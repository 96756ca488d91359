"""Explains two losses of the same output that differ: by their values and by their gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between.activations import error_of, limit_of
from parity.diagnosis.family import Family, Property
from parity.diagnosis.finding import Finding, Located, told_apart
from parity.pairing.arrangements import result
from parity.pairing.translation import Translation
from parity.records.recording import Recording

Array = NDArray[Any]

# A label that no column stands for: one-hot all zeros.
NO_LABEL = -1


class _CrossEntropy(NamedTuple):
    """gradient = scale * (softmax(output) - (1 - smoothing) * one_hot(labels) - smoothing / K), row by row."""

    scale: float
    smoothing: float
    labels: NDArray[np.intp]


def findings(
    torch_loss: float,
    flax_loss: float,
    torch_gradient: Array,
    flax_gradient: Array,
    output: Array,
    *,
    tolerance: float = 1e-9,
) -> list[Finding]:
    """Names what differs between two losses.

    Args:
      torch_loss: PyTorch's value.
      flax_loss: Flax's.
      torch_gradient: by the output, [N, ..., K], in Flax's layout.
      flax_gradient: the same in Flax.
      output: [N, ..., K], which both were given.
      tolerance: relative to the largest value.

    Returns:
      "loss-reduction", "huber-delta", "ignore-index" and "label-offset", alone or two of them; else "unexplained"; []
      if values and gradients agree.

    Raises:
      ValueError: if the gradients have other shapes than the output.
    """
    output = np.asarray(output, np.float64)
    torch_gradient, flax_gradient = (np.asarray(g, np.float64) for g in (torch_gradient, flax_gradient))
    for name, gradient in (("torch_gradient", torch_gradient), ("flax_gradient", flax_gradient)):
        if gradient.shape != output.shape:
            raise ValueError(f"{name}.shape is {gradient.shape}; allowed: the output's, {output.shape}")
    values_agree = _close(torch_loss, flax_loss, tolerance)
    limit = max(limit_of(torch_gradient, tolerance), limit_of(flax_gradient, tolerance))
    gradients_agree = error_of(torch_gradient, flax_gradient) <= limit
    if values_agree and gradients_agree:
        return []
    factor = _factor(torch_gradient, flax_gradient, tolerance)
    if factor and not gradients_agree and _close(factor * torch_loss, flax_loss, 10 * tolerance):
        return [_multiple(factor, torch_gradient, flax_gradient)]
    with np.errstate(all="ignore"):
        entropies = [_cross_entropy(g, output, tolerance) for g in (torch_gradient, flax_gradient)]
    if entropies[0] and entropies[1] and not gradients_agree:
        found = _family(output.shape, tolerance).findings(entropies[0], entropies[1])
        if found:
            return found
    return [Finding("unexplained", _description(torch_loss, flax_loss, gradients_agree, factor))]


def _close(a: float, b: float, tolerance: float) -> bool:
    return a == b or abs(a - b) <= tolerance * max(abs(a), abs(b))


def _factor(torch: Array, flax: Array, tolerance: float) -> float | None:
    """k with flax = k * torch."""
    square = float((torch * torch).sum())
    if not 0 < square < math.inf:
        return None
    k = float((torch * flax).sum()) / square
    return k if k != 0 and error_of(flax, k * torch) <= 2 * limit_of(flax, tolerance) else None


def _multiple(factor: float, torch: Array, flax: Array) -> Finding:
    """One loss is a multiple of the other: what the gradients show of the reason."""
    used: Array = np.asarray(torch.reshape(-1, torch.shape[-1]).any(axis=1))
    if factor > 0 and not used.all() and _close(max(factor, 1 / factor), len(used) / used.sum(), 1e-6):
        sides = ("PyTorch", "Flax") if factor < 1 else ("Flax", "PyTorch")
        left = f"{len(used) - used.sum()} rows out of {len(used)} are left out on both sides"
        return Finding("ignore-index", f"{left}: {sides[0]} takes the mean over the others, {sides[1]} over all rows")
    found = _reduction(factor, torch.shape)
    if factor > 0 and _has_slope_limit(torch) and _has_slope_limit(flax):
        steep, flat = ("PyTorch", torch), ("Flax", flax)
        if factor > 1:
            steep, flat = flat, steep
        delta = min(factor, 1 / factor)
        huber = f"{flat[0]}'s is a Huber loss of delta {delta:.6g}, {steep[0]}'s a smooth L1 of beta {delta:.6g}"
        how = f"Flax's loss and gradient are {factor:.6g} times PyTorch's, both with a largest slope"
        # Of the mean over all elements with slopes up to 1; a sum would be steeper.
        if _close(float(np.abs(steep[1]).max()), 1 / torch.size, 1e-6):
            return Finding("huber-delta", f"{how}: {huber}, which divides by beta")
        return Finding("loss-reduction", f"{found.evidence}; or {huber}")
    return found


def _has_slope_limit(gradient: Array) -> bool:
    """Whether several of its numbers are exactly the largest, and others less: quadratic within, linear outside."""
    size = np.abs(gradient)
    limit = size.max(initial=0.0)
    at = size >= limit * (1 - 1e-9)
    return bool(limit > 0 and at.sum() > 1 and ((size > 0) & (size < limit * (1 - 1e-6))).sum() > 1)


def _reduction(factor: float, shape: tuple[int, ...]) -> Finding:
    """A factor, and which number of things it is."""
    n, k, places = shape[0], shape[-1], math.prod(shape[:-1])
    # Where several are the same number the first is meant.
    names: dict[int, str] = {}
    for count, things in (
        (n, f"{n} examples"),
        (places, f"{places} places"),
        (places * k, f"{places * k} elements"),
        (k, f"{k} columns"),
        (places // n, f"{places // n} places of an example"),
        (places * k // n, f"{places * k // n} elements of an example"),
    ):
        names.setdefault(count, f"over {things}")
    larger = max(abs(factor), 1 / abs(factor))
    how = f"Flax's loss and gradient are {factor:.6g} times PyTorch's"
    for count, name in names.items():
        if count > 1 and factor > 0 and _close(larger, count, 1e-5):
            sides = ("Flax", "PyTorch") if factor > 1 else ("PyTorch", "Flax")
            return Finding("loss-reduction", f"{how}: {sides[0]} takes the sum, {sides[1]} the mean {name}")
    if _close(larger, 2, 1e-5):
        how += ": half of the squared error on one side"
    return Finding("loss-reduction", how)


def _cross_entropy(gradient: Array, output: Array, tolerance: float) -> _CrossEntropy | None:
    """The softmax cross-entropy that has this gradient, or None."""
    k = output.shape[-1]
    logits, g = output.reshape(-1, k), gradient.reshape(-1, k)
    if k < 2 or not np.isfinite(logits).all() or not np.isfinite(g).all() or not np.any(g):
        return None
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    # Without smoothing only the label's gradient is negative. With it that may be another's: then the usual scales
    # (mean over places or examples, sum) tell the label.
    guesses = [np.where(g.min(axis=1) < 0, g.argmin(axis=1), NO_LABEL)]
    for scale in (1 / len(g), 1.0, 1 / len(output)):
        target = p - g / scale
        guesses.append(np.where(target.max(axis=1) > 1e-3, target.argmax(axis=1), NO_LABEL))
    fits = (_fit(g, p, labels, limit_of(g, 10 * tolerance)) for labels in guesses)
    return next((fit for fit in fits if fit), None)


def _fit(g: Array, p: Array, labels: NDArray[np.intp], limit: float) -> _CrossEntropy | None:
    """Scale and smoothing, given the labels: away from them g = scale * p - scale * smoothing / K, a line in p."""
    k = p.shape[-1]
    # A row without any gradient was left out (padding, or a one-hot row of zeros in optax).
    used: Array = np.asarray(g.any(axis=1))
    others: Array = np.asarray(labels[:, None] != np.arange(k))
    x, y = p[others & used[:, None]], g[others & used[:, None]]
    scale, smoothing = float((x * y).sum() / (x * x).sum()), 0.0
    if error_of(y, scale * x) > limit and len(x) > 2:
        (scale, offset), *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], axis=1), y, rcond=None)
        smoothing = float(-offset * k / scale) if scale else 0.0
    if not scale > 0 or not -1e-6 <= smoothing < 1:
        return None
    target = (1 - smoothing) * ~others + np.where(labels == NO_LABEL, 0.0, smoothing / k)[:, None]
    if error_of(g, np.where(used[:, None], scale * (p - target), 0.0)) > limit:
        return None
    return _CrossEntropy(float(scale), smoothing, np.where(used, labels, NO_LABEL))


def _family(shape: tuple[int, ...], tolerance: float) -> Family[_CrossEntropy]:
    """What two cross-entropies of an output of this shape may differ in."""
    allowed = max(1e-7, 10 * tolerance)
    return Family(
        Property(
            "labels",
            lambda torch, flax: not np.array_equal(torch.labels, flax.labels) and not _other_rows(torch, flax),
            lambda torch, flax: [_other_labels(torch.labels, flax.labels, shape[-1])],
        ),
        Property("left out", _other_rows, _other_rows_sentence),
        Property("smoothing", lambda torch, flax: abs(torch.smoothing - flax.smoothing) > 1e-6, _other_smoothing),
        Property(
            "scale",
            lambda torch, flax: not _is_left_out(torch, flax, allowed) and not _close(torch.scale, flax.scale, allowed),
            lambda torch, flax: [_reduction(flax.scale / torch.scale, shape)],
        ),
    )


def _other_rows(torch: _CrossEntropy, flax: _CrossEntropy) -> bool:
    """Whether one side leaves out rows that the other counts, and all rows that both count have the same labels."""
    used = torch.labels != NO_LABEL, flax.labels != NO_LABEL
    both = used[0] & used[1]
    if not both.any() or np.array_equal(*used):
        return False
    return np.array_equal(torch.labels[both], flax.labels[both]) and _offset(torch.labels, flax.labels, 2**31) is None


def _other_rows_sentence(torch: _CrossEntropy, flax: _CrossEntropy) -> list[Finding]:
    parts = []
    for side, own, other in (("PyTorch", torch, flax), ("Flax", flax, torch)):
        rows = np.flatnonzero((own.labels == NO_LABEL) & (other.labels != NO_LABEL))
        if rows.size:
            some = ", ".join(map(str, rows[:4])) + (", ..." if len(rows) > 4 else "")
            label = sorted(set(other.labels[rows].tolist()))
            counted = f"label {label[0]}" if len(label) == 1 else f"{len(label)} different labels"
            parts.append(f"{side} leaves out rows {some} (from 0), which the other side counts as {counted}")
    return [Finding("ignore-index", "; ".join(parts))]


def _is_left_out(torch: _CrossEntropy, flax: _CrossEntropy, allowed: float) -> bool:
    """Whether the scales are those of two means, each over the rows that its side counts."""
    counts = [int((side.labels != NO_LABEL).sum()) for side in (torch, flax)]
    return _other_rows(torch, flax) and _close(torch.scale * counts[0], flax.scale * counts[1], allowed)


def _other_labels(torch: NDArray[np.intp], flax: NDArray[np.intp], k: int) -> Finding:
    offset = _offset(torch, flax, k)
    if offset is None:
        wrong = int((torch != flax).sum())
        return Finding("unexplained", f"the labels of {wrong} rows out of {len(torch)} differ")
    return Finding("label-offset", _offset_sentence(torch, flax, offset))


def _other_smoothing(torch: _CrossEntropy, flax: _CrossEntropy) -> list[Finding]:
    texts = told_apart(torch.smoothing, flax.smoothing, 4)
    return [Finding("unexplained", f"PyTorch smooths labels by {texts[0]}, Flax by {texts[1]}")]


def _offset(torch: NDArray[np.intp], flax: NDArray[np.intp], k: int) -> int | None:
    """By how much Flax's labels are the larger: going around at the end, held there, or without a column."""
    known = torch != NO_LABEL, flax != NO_LABEL
    both = known[0] & known[1]
    for offset in (1, -1, 2, -2):
        around = (torch + offset) % k
        held = np.clip(torch + offset, 0, k - 1), np.clip(flax - offset, 0, k - 1)
        fits = (flax == around) | (flax == held[0]) | (torch == held[1])
        outside = (~known[1] & (around != torch + offset)) | (~known[0] & ((flax - offset) % k != flax - offset))
        shifted = both & (flax == torch + offset)
        if np.all(np.where(both, fits, outside | ~(known[0] | known[1]))) and (shifted.any() or k == 2):
            return offset
    return None


def _offset_sentence(torch: NDArray[np.intp], flax: NDArray[np.intp], offset: int) -> str:
    pick = np.flatnonzero((torch != NO_LABEL) & (flax != NO_LABEL))[:4]
    examples = ", ".join(f"{torch[i]} and {flax[i]}" for i in pick)
    more = f"{abs(offset)} {'more' if offset > 0 else 'less'}"
    return f"Flax's labels are {more} than PyTorch's in every row (PyTorch's and Flax's: {examples}, ...)"


def _description(torch_loss: float, flax_loss: float, gradients_agree: bool, factor: float | None) -> str:
    texts = told_apart(torch_loss, flax_loss)
    values = f"PyTorch's loss is {texts[0]}, Flax's {texts[1]}" if torch_loss != flax_loss else "the losses are equal"
    if gradients_agree:
        return f"{values}, but the gradients agree: the losses differ by a constant"
    if factor:
        return f"{values}, but Flax's gradient is {factor:.6g} times PyTorch's"
    return f"{values}, and the gradients are not multiples of each other"


def loss_findings(translation: Translation, forced: Recording, bound: float) -> list[Located]:
    """What is wrong with the losses, of the same output."""
    torch = translation.torch
    if torch.loss is None or forced.loss is None or not torch.output_gradients or not forced.output_gradients:
        return []
    results = translation.results(forced.named_outputs)
    both = (
        (i, translation.gradient(result(i), torch.output_gradients[i]), forced.output_gradients[j]) for i, j in results
    )
    place, gradient, given = next((b for b in both if b[1] is not None and b[2] is not None), (0, None, None))
    if gradient is None or given is None:
        return []
    scale = max(abs(torch.loss), 1e-30)
    if (
        abs(torch.loss - forced.loss) <= bound * scale
        and np.abs(given - gradient).max() <= bound * np.abs(gradient).max()
    ):
        return []
    got = findings(torch.loss, forced.loss, gradient, given, translation.result(place), tolerance=max(bound, 1e-9))
    return [Located("loss", len(torch.calls), "", "", f) for f in got]
