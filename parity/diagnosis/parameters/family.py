"""Parameters that were carried over by hand: what happened to them on the way, found from the numbers alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.finding import Finding
from parity.diagnosis.parameters import affine
from parity.diagnosis.parameters.looks import same, unexplained
from parity.diagnosis.product.kernels import transforms

Array = NDArray[Any]

_ROLES = {
    "kernel": ("kernel", "weight", "w", "embedding", "weights"),
    "bias": ("bias", "beta", "b", "offset", "shift"),
    "scale": ("scale", "gamma", "g"),
    "mean": ("mean", "moving_mean", "running_mean", "mu"),
    "var": ("var", "moving_var", "running_var", "moving_variance", "variance"),
}


def findings(
    kind: str,
    expected: Mapping[str, Array],
    given: Mapping[str, Array],
    *,
    spatial: tuple[int, ...] | None = None,
    raw: Mapping[str, Array] | None = None,
    tolerance: float = 1e-6,
) -> list[Finding]:
    """Explains how the parameters that Flax was given differ from those that PyTorch's become in Flax.

    Args:
      kind: of the layer: "linear", "conv", "conv_transpose", "embedding", one that ends in "norm", or another.
      expected: PyTorch's parameters, carried over into Flax's layout, by Flax's local names.
      given: what Flax's variables hold.
      spatial: (C, H, W) in front of the flatten before this linear layer, or (C,), if known.
      raw: PyTorch's own arrays, under the names of `expected`.
      tolerance: relative to the largest value.

    Returns:
      Nothing if they agree; otherwise kernel-transposed, kernel-layout, kernel-hw-swapped, kernel-flipped,
      flatten-order, affine-swapped, affine-missing, bias-missing, initial-variance, unbiased-variance, or unexplained
      with where and how much. What a mistake leaves as it was (a symmetric kernel transposed) is none.

    Raises:
      ValueError: a parameter that is no array of numbers.
    """
    truth = _by_role(kind, "expected", expected)
    held = _by_role(kind, "given", given)
    own = _by_role(kind, "raw", raw or {})
    found: list[Finding] = []
    if "norm" in kind or {"scale", "var"} & (truth.keys() | held.keys()):
        found += affine.findings(truth, held, tolerance)
        rest = (truth.keys() | held.keys()) - {"scale", "bias", "mean", "var"}
    else:
        rest = truth.keys() | held.keys()
    for role in sorted(rest, key=lambda role: (role != "kernel", role)):
        if role not in truth or role not in held:
            found.append(_absent(role, truth.get(role, held.get(role, np.zeros(0))), role in held))
        elif role == "kernel":
            found += _kernel(kind, truth[role], held[role], own.get(role), spatial, tolerance)
        elif not same(truth[role], held[role], tolerance):
            found.append(_vector(role, truth[role], held[role], tolerance))
    return found


def _by_role(kind: str, name: str, group: Mapping[str, Array]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for key, value in group.items():
        array = np.asarray(value)
        if array.dtype.kind not in "fiub" and "float" not in array.dtype.name:
            raise ValueError(f"{name}[{key!r}] is of dtype {array.dtype}; allowed: numbers")
        local = key.replace("/", ".").rsplit(".", 1)[-1].lower()
        if "norm" in kind and local in ("weight", "w", "kernel"):
            local = "scale"
        role = next((role for role, names in _ROLES.items() if local in names), key)
        found[key if role in found else role] = array.astype(np.float64)
    return found


def _absent(role: str, array: Array, in_flax: bool) -> Finding:
    has, lacks = ("Flax", "PyTorch") if in_flax else ("PyTorch", "Flax")
    code = "bias-missing" if role == "bias" else "unexplained"
    size = np.abs(array).max(initial=0.0)
    return Finding(code, f"{has} has a {role} of shape {array.shape} (largest {size:.3g}), {lacks} has none")


def _vector(role: str, truth: Array, held: Array, tolerance: float) -> Finding:
    if role == "bias" and not held.any() and truth.any():
        size = np.abs(truth).max()
        return Finding("bias-missing", f"Flax's bias is all zeros, where PyTorch's has values up to {size:.3g}")
    return unexplained(role, truth, held, tolerance)


def _kernel(
    kind: str, truth: Array, held: Array, raw: Array | None, spatial: tuple[int, ...] | None, tolerance: float
) -> list[Finding]:
    if same(truth, held, tolerance):
        return []
    if kind == "linear" and truth.ndim == 2:
        candidates = _of_linear(truth, raw, spatial)
    elif 2 <= truth.ndim <= 5:
        candidates = _of_conv(truth, held.shape, raw)
    else:
        candidates = iter(())
    largest = float(np.abs(truth).max(initial=0.0))
    for codes, words, candidate in candidates:
        if same(candidate, held, tolerance, largest):
            return [Finding(code, f"Flax's kernel holds PyTorch's {words}") for code in codes]
    finding = unexplained("kernel", truth, held, tolerance)
    return [Finding("kernel-layout", finding.evidence) if "another order" in finding.evidence else finding]


def _of_linear(
    truth: Array, raw: Array | None, spatial: tuple[int, ...] | None
) -> Iterator[tuple[tuple[str, ...], str, Array]]:
    """Everything that a linear layer's matrix is taken for; the likelier first."""
    transposed, order = ("kernel-transposed",), ("flatten-order",)
    yield transposed, "[out, in] matrix not transposed", truth.T
    yield transposed, "[out, in] matrix reshaped instead of transposed", truth.T.reshape(truth.shape)
    for words, rows in _row_orders(len(truth), spatial):
        yield order, f"rows {words}", truth[rows]
        yield transposed + order, f"[out, in] matrix not transposed, with its rows {words}", truth[rows].T
        yield (
            transposed + order,
            f"[out, in] matrix reshaped instead of transposed, with its rows {words}",
            truth[rows].T.reshape(truth.shape),
        )
    if raw is not None and raw.size == truth.size and raw.ndim == 2:
        yield transposed, "own matrix, untouched", raw
        yield transposed, "own matrix, reshaped", raw.reshape(truth.shape)


def _row_orders(size: int, spatial: tuple[int, ...] | None) -> Iterator[tuple[str, Array]]:
    """The rows as another order of the axes in front of the flatten would have them, from H, W, C order."""
    if spatial is not None and len(spatial) > 1 and math.prod(spatial) == size:
        names = "CDHW" if len(spatial) == 4 else "CHW" if len(spatial) == 3 else "CW"
        channels_last = (*range(1, len(spatial)), 0)
        shape = tuple(spatial[axis] for axis in channels_last)
        here = "".join(names[axis] for axis in channels_last)
        numbers = np.arange(size).reshape(shape)
        held = range(len(shape))
        # C, H, W first; and the other way: an H, W, C order of rows that came in C, H, W order.
        orders = sorted(itertools.permutations(held), key=lambda order: order != (len(shape) - 1, *held[:-1]))
        for order in orders[: 1 + 24]:
            if order != tuple(held):
                there = ", ".join(here[axis] for axis in order)
                yield f"in {there} order, where Flax flattens {', '.join(here)}", numbers.transpose(order).ravel()
    if spatial is not None and len(spatial) == 1 and spatial[0] > 0 and size % spatial[0] == 0:
        channels = [spatial[0]]
    else:
        channels = [c for c in range(2, size // 2 + 1) if size % c == 0]
    for c in channels:
        forth = np.arange(size).reshape(size // c, c).T.ravel()
        yield f"in C, H, W order (C = {c}), where Flax flattens H, W, C", forth
        yield f"permuted twice, or the wrong way, between C, H, W and H, W, C order (C = {c})", np.argsort(forth)


def _of_conv(truth: Array, shape: tuple[int, ...], raw: Array | None) -> Iterator[tuple[tuple[str, ...], str, Array]]:
    for transform in transforms(truth.shape):
        if transform.codes and transform.shape_of(truth.shape) == shape:
            yield transform.codes, f"kernel {transform.words}", transform.apply(truth)
    if raw is not None and raw.size == truth.size:
        yield ("kernel-layout",), "own array, untouched", raw
