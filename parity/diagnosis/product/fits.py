"""One side of a linear layer, convolution or transposed convolution, and every description that its numbers allow."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.finding import Finding
from parity.diagnosis.product import formats
from parity.diagnosis.product.contraction import Probe, Product, inner, looked_at, stacked
from parity.diagnosis.product.geometry import Call, Geometry, anisotropic, hinted, isotropic
from parity.diagnosis.product.gradient import FLOAT32, gradient_finding
from parity.diagnosis.product.kernels import Transform, transforms

KINDS = {"linear": "linear layer", "conv": "convolution", "conv_transpose": "transposed convolution"}
_MANY = 24  # fits that are enough to see that the numbers leave it open


class ProductSide(NamedTuple):
    """What one side of a linear layer, convolution or transposed convolution did in one call, in Flax's layout.

    Attributes:
      x: input, `[N, *spatial, C]`; of a linear layer `[..., C]`.
      y: output, channels last.
      kernel: this side's own, `[in, out]` or `[*k, in / groups, out]`.
      bias: this side's own, `[out]`.
      dy: gradient at the output.
      dx: gradient at the input.
      dkernel: gradient at the kernel, of its shape.
      config: what the layer claims, as far as known: `stride`, `padding`, `dilation`, `padding_mode`.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    kernel: NDArray[Any]
    bias: NDArray[Any] | None
    dy: NDArray[Any] | None = None
    dx: NDArray[Any] | None = None
    dkernel: NDArray[Any] | None = None
    config: Mapping[str, Any] = {}


class Fit(NamedTuple):
    """One description of a side that its numbers allow.

    Attributes:
      bias: whether the bias is added; None if that makes no difference.
      rounding: "" for exact products, "float32" for those off by less than `FLOAT32`, otherwise the likeliest format.
      words: how that is known.
    """

    transform: Transform
    geometry: Geometry
    bias: bool | None
    rounding: str = ""
    words: str = "exact"


class Side:
    """One side, with what is needed to try hypotheses on it."""

    def __init__(self, name: str, kind: str, data: ProductSide) -> None:
        self.name = name
        self.kind = kind
        self.data = data
        self.rank = 0 if kind == "linear" else data.x.ndim - 2
        if kind == "linear":  # every row is an example
            self.data = data = data._replace(
                x=data.x.reshape(-1, data.x.shape[-1]),
                y=data.y.reshape(-1, data.y.shape[-1]),
                dy=None if data.dy is None else data.dy.reshape(-1, data.dy.shape[-1]),
                dx=None if data.dx is None else data.dx.reshape(-1, data.dx.shape[-1]),
            )
        self.kernel = self._as_applied(data.kernel)
        self.options = [t for t in transforms(self.kernel.shape) if self._possible(t)]
        matters = data.bias is not None and bool(np.any(data.bias)) and data.bias.shape == data.y.shape[-1:]
        self.bias_options: tuple[bool | None, ...] = (True, False) if matters else (None,)
        self._biases = list(map(self._bias, self.bias_options))
        # The examples with the largest outputs first: an empty one shows nothing.
        energy = np.abs(self.data.y).sum(axis=tuple(range(1, self.data.y.ndim)))
        self._strongest = np.argsort(-energy, kind="stable")

    def call(self, kernel: tuple[int, ...]) -> Call:
        """The sizes of the call, with a kernel of this shape."""
        return Call(self.data.x.shape[1:-1], self.data.y.shape[1:-1], kernel[:-2], self.kind == "conv_transpose")

    def call_of(self, fit: Fit) -> Call:
        """The sizes of the call, with the kernel that it applies."""
        return self.call(fit.transform.shape_of(self.kernel.shape))

    def product(self, fit: Fit) -> Product:
        """What the description says that this side computes."""
        kernel = fit.transform.apply(self.kernel)
        return Product(self.data.x, kernel, self.call_of(fit), fit.geometry, self._bias(fit.bias))

    def holds(self, fit: Fit, tolerance: float) -> bool:
        """Whether the description holds for every example, not only those that it was found with."""
        allowed = max(tolerance, {"": 0.0, "float32": FLOAT32}.get(fit.rounding, formats.LARGEST))
        return self.product(fit).error(self.data.y, allowed) <= allowed

    def gradient_findings(self, fit: Fit, tolerance: float, *, kernel_too: bool) -> list[Finding]:
        """What is wrong with this side's gradients, if its forward pass is known well enough to say.

        The gradient at the kernel is a sum over all examples, so it costs most.
        """
        data = self.data
        if data.dy is None or data.dy.shape != data.y.shape or fit.rounding not in ("", "float32"):
            return []
        rows = np.arange(len(data.x)) if kernel_too else self._strongest[: 2 if self.rank else 64]
        product = self.product(fit)._replace(x=data.x[rows])
        dy = data.dy[rows]
        squares = functools.cache(lambda: product.squared().backward(dy**2))
        of_x, of_kernel = product.backward(dy)
        layer = f"{self.name}'s {KINDS[self.kind]}"
        found = []
        if data.dx is not None and data.dx.shape == data.x.shape:
            given = data.dx[rows]
            found.append(gradient_finding(layer, "input", given, of_x, lambda: squares()[0], tolerance))
        dkernel = None if data.dkernel is None or not kernel_too else self._as_applied(data.dkernel)
        if dkernel is not None and dkernel.shape == self.kernel.shape:
            true = fit.transform.pull_back(of_kernel, self.kernel.shape)
            found.append(gradient_finding(layer, "kernel", dkernel, true, lambda: squares()[1], tolerance))
        return [finding for finding in found if finding is not None]

    def hint(self, fit: Fit) -> Geometry | None:
        """The geometry that the layer claims to have."""
        return hinted(self.call_of(fit), self.data.config)

    def largest_bias(self) -> float:
        """The largest entry of the bias held, 0 without one."""
        return 0.0 if self.data.bias is None else float(np.abs(self.data.bias).max(initial=0.0))

    def _as_applied(self, kernel: NDArray[Any]) -> NDArray[Any]:
        if self.kind != "conv_transpose":
            return kernel
        return _grouped(kernel, self.data.x.shape[-1], self.data.y.shape[-1])

    def fits(self, tolerance: float) -> list[Fit]:
        """All descriptions that fit, of the first stage of the search in which any does."""
        named = [t for t in self.options if "kernel-layout" not in t.codes]
        layouts = [t for t in self.options if "kernel-layout" in t.codes]
        rounded: list[tuple[float, Fit]] = []
        for options, geometries in ((named, self._likely), (named, anisotropic), (layouts, self._likely)):
            exact, near = self._search(options, geometries, tolerance)
            if exact:
                return exact
            rounded += near
            # Products of a known format are known beyond doubt; other noise could be a mistake of small effect.
            known = self._rounded(near, guess=False)
            if known:
                return known
        return self._rounded(sorted(rounded, key=lambda pair: pair[0]), guess=True)

    def also(self, geometries: Iterable[Geometry], known: list[Fit], tolerance: float) -> list[Fit]:
        """Descriptions with the geometry that the other side was found to have."""
        if not known or known[0].rounding not in ("", "float32"):
            return []
        applied = {fit.transform for fit in known}
        options = [t for t in self.options if t in applied or "kernel-layout" not in t.codes]
        exact, _ = self._search(options, lambda call: iter(geometries), tolerance)
        return [fit for fit in exact if fit not in known]

    def _possible(self, transform: Transform) -> bool:
        *_, inputs, outputs = transform.shape_of(self.kernel.shape)
        channels = self.data.x.shape[-1]
        return outputs == self.data.y.shape[-1] and not channels % inputs and not outputs % (channels // inputs)

    def _likely(self, call: Call) -> Iterator[Geometry]:
        hint = hinted(call, self.data.config)
        if hint is not None and call.possible(hint):
            yield hint
        yield from isotropic(call)

    def _search(
        self, options: list[Transform], geometries: Callable[[Call], Iterable[Geometry]], tolerance: float
    ) -> tuple[list[Fit], list[tuple[float, Fit]]]:
        """(what fits exactly or to float32, what fits as well as rounded products do, the best first)."""
        exact: list[Fit] = []
        single: list[Fit] = []
        near: list[tuple[float, Fit]] = []
        by_shape: dict[tuple[int, ...], list[Transform]] = {}
        for transform in options:
            by_shape.setdefault(transform.shape_of(self.kernel.shape), []).append(transform)
        for shape, alike in by_shape.items():
            call = self.call(shape)
            kernels = stacked([transform.apply(self.kernel) for transform in alike])
            hopeless: dict[tuple[tuple[int, ...], ...], bool] = {}
            for geometry in geometries(call):
                place = geometry[:3]
                if place not in hopeless:
                    hopeless[place] = not call.possible(geometry) or not self._conceivable(
                        call, geometry, kernels, shape
                    )
                if hopeless[place] or len(exact) >= _MANY:
                    continue
                probe = self._probe(call, geometry)
                errors = probe.errors(kernels, shape[-2], self._biases)
                hypotheses = itertools.product(alike, self.bias_options)
                for (transform, bias), (error, size) in zip(hypotheses, errors, strict=True):
                    fit = Fit(transform, geometry, bias)
                    if error <= max(tolerance, FLOAT32) * size:
                        confirmed = self._error(fit, tolerance)
                        if confirmed <= tolerance:
                            exact.append(fit)
                        elif confirmed <= FLOAT32:
                            single.append(fit._replace(rounding="float32", words="exact to float32"))
                    if error <= formats.LARGEST * probe.largest:
                        near.append((error, fit))
        return exact or single[:_MANY], sorted(near, key=lambda pair: pair[0])

    def _conceivable(self, call: Call, geometry: Geometry, kernels: NDArray[Any], shape: tuple[int, ...]) -> bool:
        """Whether one output away from the padding (otherwise a few) comes near what is given, with any kernel."""
        row = self._strongest[0]
        x, y = self.data.x[row], self.data.y[row]
        largest = np.abs(y).max()
        seen = inner(x, y, call, geometry)
        if seen is None:
            errors = Probe(x[None], y[None], call, geometry, few=True).errors(kernels, shape[-2], self._biases)
            return any(error <= max(formats.LARGEST * largest, 10 * FLOAT32 * size) for error, size in errors)
        inputs, channels = shape[-2], looked_at(shape[-1])
        groups = channels // (shape[-1] // (self.data.x.shape[-1] // inputs))
        windows = [seen[0][..., group * inputs : (group + 1) * inputs].ravel() for group in groups]
        sums = np.stack([window @ kernel for window, kernel in zip(windows, kernels, strict=True)])
        biases = np.stack([bias[channels] for bias in self._biases])
        errors = np.abs(sums + biases[..., None] - seen[1][channels, None]).max(1)
        # Above the size of rounded products, and of what float32 sums of such terms may be off.
        terms = max(np.sqrt(window @ window) for window in windows) * np.abs(kernels).max()
        return bool(errors.min() <= max(formats.LARGEST * largest, 10 * FLOAT32 * terms))

    def _bias(self, added: bool | None) -> NDArray[Any]:
        return self.data.bias if added and self.data.bias is not None else np.zeros(self.data.y.shape[-1])

    def _probe(self, call: Call, geometry: Geometry) -> Probe:
        rows = self._strongest[: 2 if self.rank else 16]
        return Probe(self.data.x[rows], self.data.y[rows], call, geometry)

    def _error(self, fit: Fit, tolerance: float) -> float:
        rows = self._strongest[: 2 if self.rank else 64]
        return self.product(fit)._replace(x=self.data.x[rows]).error(self.data.y[rows], tolerance)

    def _rounded(self, near: list[tuple[float, Fit]], *, guess: bool) -> list[Fit]:
        rows = self._strongest[: 2 if self.rank else 256]
        explain = formats.guessed if guess else formats.recognised
        for least, fit in near[:3]:
            product, y = self.product(fit)._replace(x=self.data.x[rows]), self.data.y[rows]
            if product.kernel.shape[-2] == product.x.shape[-1]:  # no groups: some channels are enough
                channels = looked_at(y.shape[-1])
                product = product._replace(kernel=product.kernel[..., channels], bias=product.bias[channels])
                y = y[..., channels]
            known = explain(product, y)
            if known is not None:
                alike = [fit for error, fit in near if least <= error <= least * (1 + 1e-9)]
                return [fit._replace(rounding=known.format, words=known.words) for fit in alike[:_MANY]]
        return []


def _grouped(kernel: NDArray[Any], channels: int, outputs: int) -> NDArray[Any]:
    """[*k, in, out / groups], as PyTorch's transposed convolution keeps it, to [*k, in / groups, out]."""
    *k, inputs, each = kernel.shape
    if inputs != channels or each == outputs or outputs % each or channels % (outputs // each):
        return kernel
    groups = outputs // each
    apart = kernel.reshape(*k, groups, inputs // groups, each)
    return np.moveaxis(apart, -3, -2).reshape(*k, inputs // groups, outputs)
