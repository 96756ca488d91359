"""Linear layers, convolutions and transposed convolutions: what each side computes, and in what the two differ.

Each side is fitted alone: is y what its own kernel and bias give with x, as they are held or rearranged
(`kernels.transforms`), with some stride, dilation and padding (`geometry`), with the bias or without, with exact or
rounded operands (`precision`)? Hypotheses are tried on a few outputs first, and what survives on whole examples. Where
several fit, the pair of descriptions that differ least is taken: a mistake is named only if no reading of the numbers
is without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.family import Family, Property
from parity.diagnosis.finding import Finding, Pads
from parity.diagnosis.product.fits import KINDS, Fit, ProductSide, Side
from parity.diagnosis.product.geometry import padding_words, same_padding


def findings(kind: str, torch: ProductSide, flax: ProductSide, *, tolerance: float = 1e-9) -> list[Finding]:
    """Explains from the numbers alone in what two layers that should be the same product differ.

    Args:
      kind: "linear", "conv" or "conv_transpose".
      torch: PyTorch's call, in Flax's layout.
      flax: Flax's call.
      tolerance: how far a side may be from a description, relative to its largest value.

    Returns:
      Nothing if both sides do the same with what they hold (what they hold is `parameters.findings`' matter), otherwise
      the mistakes: kernel-transposed, kernel-layout, kernel-flipped, kernel-hw-swapped, stride, dilation, padding,
      bias-missing, matmul-precision, or unexplained.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(map(repr, KINDS))}")
    torch, flax = _as_float64(torch), _as_float64(flax)
    named = (("PyTorch", torch), ("Flax", flax))
    strange = [_unexplained(name, kind, side) for name, side in named if _strange(kind, side)]
    if strange:
        return strange
    sides = (Side("PyTorch", kind, torch), Side("Flax", kind, flax))
    absent = _absent_bias(*sides)
    agree = torch.y.shape == flax.y.shape and _close(torch.y, flax.y, tolerance)
    gradients_agree = all(
        a is None or b is None or (a.shape == b.shape and _close(a, b, tolerance))
        for a, b in ((torch.dx, flax.dx), (torch.dkernel, flax.dkernel))
    )
    if not torch.y.size or not flax.y.size or (agree and gradients_agree):
        return absent
    fits = [side.fits(tolerance) for side in sides]
    for side, own, other in zip(sides, fits, reversed(fits), strict=True):
        own.extend(side.also({fit.geometry for fit in other}, own, tolerance))
    if not all(fits):
        unknown = [_unexplained(side.name, kind, side.data) for side, own in zip(sides, fits, strict=True) if not own]
        return absent + ([_gradients_differ(KINDS[kind])] if agree else unknown)
    family = _family(*sides, tolerance)
    best = family.nearest(*fits)
    assert best is not None  # each side has fits
    found = [] if agree else family.findings(*best)
    found = absent + [finding for finding in found if not absent or finding.code != "bias-missing"]
    if not agree and not found:
        wrong = [side for side, fit in zip(sides, best, strict=True) if not side.holds(fit, tolerance)]
        found = [_unexplained(side.name, kind, side.data) for side in wrong]
    if not gradients_agree:
        for side, fit in zip(sides, best, strict=True):
            found += side.gradient_findings(fit, tolerance, kernel_too=agree)
    return found


def _family(torch: Side, flax: Side, tolerance: float) -> Family[Fit]:
    """What two descriptions may differ in; of the nearest those are taken that the layers claim, then the simplest."""
    sides = torch, flax

    def claims(a: Fit, b: Fit) -> tuple[int, int]:
        unlike = sum(fit.geometry != side.hint(fit) for side, fit in zip(sides, (a, b), strict=True) if side.hint(fit))
        return unlike, _complexity(a) + _complexity(b)

    def kernel(a: Fit, b: Fit) -> list[Finding]:
        evidence = f"PyTorch applies its kernel {a.transform.words}, Flax its own {b.transform.words}"
        return [Finding(code, evidence) for code in _kernel_codes(sides, (a, b), tolerance)]

    def padding(a: Fit, b: Fit) -> list[Finding]:
        of_a = padding_words(torch.call_of(a), a.geometry, torch.data.config)
        of_b = padding_words(flax.call_of(b), b.geometry, flax.data.config)
        same_stride = a.geometry.stride == b.geometry.stride
        stride = f" at stride {_one(a.geometry.stride)}" if same_stride else ""
        calls = (torch.call_of(a), a.geometry), (flax.call_of(b), b.geometry)
        pads = None
        if {*a.geometry.stride, *b.geometry.stride} == {1} and not any(call.transposed for call, _ in calls):
            pads = Pads(*(tuple(zip(g.low, call.high(g), call.span(g.dilation), strict=True)) for call, g in calls))
        return [Finding("padding", f"PyTorch pads {of_a}, Flax {of_b}{stride}", pads=pads)]

    def bias(a: Fit, b: Fit) -> list[Finding]:
        without = flax if a.bias else torch
        evidence = f"{without.name} holds a bias (largest {without.largest_bias():.3g}) but does not add it"
        return [Finding("bias-missing", evidence)]

    return Family(
        Property("kernel", lambda a, b: len(_kernel_codes(sides, (a, b), tolerance)), kernel),
        _of_geometry("stride"),
        _of_geometry("dilation"),
        Property(
            "padding",
            lambda a, b: not same_padding(a.geometry, b.geometry, torch.call_of(a), flax.call_of(b)),
            padding,
        ),
        Property("bias", lambda a, b: None not in (a.bias, b.bias) and a.bias != b.bias, bias),
        Property(
            "rounding",
            lambda a, b: a.rounding != b.rounding and {a.rounding, b.rounding} != {"", "float32"},
            lambda a, b: [Finding("matmul-precision", f"PyTorch's products: {a.words}; Flax's products: {b.words}")],
        ),
        preference=claims,
    )


def _complexity(fit: Fit) -> int:
    stride, dilation, low, mode = fit.geometry
    kernel = 10 * len(fit.transform.codes) + len(fit.transform.flips)
    return kernel + sum(stride) + sum(dilation) + len({*low}) + 5 * (mode != "zeros") + 5 * (fit.bias is False)


def _of_geometry(code: str) -> Property[Fit]:
    """The stride or the dilation, which the code is called after."""

    def tell(a: Fit, b: Fit) -> list[Finding]:
        of_a, of_b = _one(getattr(a.geometry, code)), _one(getattr(b.geometry, code))
        return [Finding(code, f"PyTorch's {code} is {of_a}, Flax's is {of_b}")]

    return Property(code, lambda a, b: getattr(a.geometry, code) != getattr(b.geometry, code), tell)


def _kernel_codes(sides: tuple[Side, Side], pair: tuple[Fit, Fit], tolerance: float) -> list[str]:
    """In what the two kernels are held otherwise; nothing if what is applied is the same."""
    if pair[0].transform == pair[1].transform:
        return []
    applied = [fit.transform.apply(side.kernel) for side, fit in zip(sides, pair, strict=True)]
    if applied[0].shape == applied[1].shape and _close(applied[0], applied[1], tolerance):
        return []
    codes = [list(fit.transform.codes) for fit in pair]
    for side, own in zip(sides, codes, strict=True):
        # A kernel that cannot be applied as it is held is transposed by necessity, not by mistake.
        if "kernel-transposed" in own and not any(not t.codes for t in side.options):
            own.remove("kernel-transposed")
    every = list(dict.fromkeys(codes[0] + codes[1]))
    return [code for code in every if (code in codes[0]) != (code in codes[1])] or every


def _absent_bias(torch: Side, flax: Side) -> list[Finding]:
    if (torch.data.bias is None) == (flax.data.bias is None):
        return []
    with_bias, without = (torch, flax) if flax.data.bias is None else (flax, torch)
    size = f"largest {with_bias.largest_bias():.3g}"
    evidence = f"{with_bias.name}'s {KINDS[torch.kind]} has a bias ({size}), {without.name}'s has none"
    return [Finding("bias-missing", evidence)]


def _unexplained(name: str, kind: str, data: ProductSide) -> Finding:
    shapes = f"x {data.x.shape}, kernel {data.kernel.shape}, y {data.y.shape}"
    evidence = f"{name}'s output is no {KINDS[kind]} of its input with the kernel that it holds ({shapes})"
    return Finding("unexplained", evidence)


def _strange(kind: str, side: ProductSide) -> bool:
    """Whether the ranks do not go together, so that nothing can be tried."""
    rank = 0 if kind == "linear" else side.x.ndim - 2
    return side.kernel.ndim != rank + 2 or side.y.ndim != side.x.ndim or side.x.ndim < 1 or not 0 <= rank <= 3


def _gradients_differ(layer: str) -> Finding:
    return Finding("unexplained", f"the gradients through the {layer} differ, and its forward pass is not a known one")


def _as_float64(side: ProductSide) -> ProductSide:
    def lifted(array: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if array is None else np.asarray(array, np.float64)

    x, y, kernel = (np.asarray(array, np.float64) for array in side[:3])
    return ProductSide(
        x, y, kernel, lifted(side.bias), lifted(side.dy), lifted(side.dx), lifted(side.dkernel), side.config
    )


def _close(a: NDArray[Any], b: NDArray[Any], tolerance: float) -> bool:
    return bool(np.abs(a - b).max(initial=0.0) <= tolerance * max(np.abs(a).max(initial=0.0), 1e-300))


def _one(sizes: tuple[int, ...]) -> Any:
    return sizes[0] if len(set(sizes)) == 1 else sizes
