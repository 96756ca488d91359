"""What kind of layer a class is: from its name where a library named it, else from its name's end and its variables."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Kind(NamedTuple):
    """What is to be known of a kind of layer, whatever the framework.

    Attributes:
      name: what it is called.
      role: "norm", "product" (a matrix or a kernel, with sums over the inputs), "table" or "" for none of these.
      channels_second: PyTorch has the channels of images on axis 1, Flax on the last axis; else both have them last.
      like: kinds that the same layer may be taken for on the other side.
    """

    name: str
    role: str = ""
    channels_second: bool = False
    like: tuple[str, ...] = ()


OTHER = "other"
"""Of no known kind: bare parameters, or a class that nothing is known of. It may be anything on the other side."""

TABLE = (
    Kind("linear", "product", like=("conv", "embedding")),
    Kind("conv", "product", channels_second=True, like=("linear", "conv_transpose")),
    Kind("conv_transpose", "product", channels_second=True, like=("conv",)),
    Kind("batch_norm", "norm", channels_second=True, like=("layer_norm", "group_norm", "rms_norm")),
    Kind("layer_norm", "norm", like=("batch_norm", "group_norm", "rms_norm")),
    Kind("group_norm", "norm", channels_second=True, like=("batch_norm", "layer_norm", "rms_norm")),
    Kind("rms_norm", "norm", like=("batch_norm", "layer_norm", "group_norm")),
    Kind("embedding", "table", like=("linear",)),
    Kind("attention"),
    Kind(OTHER),
)
KINDS = tuple(kind.name for kind in TABLE)
NORMS = tuple(kind.name for kind in TABLE if kind.role == "norm")
PRODUCTS = tuple(kind.name for kind in TABLE if kind.role == "product")
CHANNELS_SECOND = frozenset(kind.name for kind in TABLE if kind.channels_second)
CHANNELS_LAST = frozenset(kind.name for kind in TABLE if not kind.channels_second) - {OTHER, "embedding"}
"""Kinds that read features from the last axis on both sides."""
FLAT = ("linear", *NORMS)
"""Kinds whose input may be a flattened image."""
_LIKE = {kind.name: {kind.name, OTHER, *kind.like} for kind in TABLE}


def common(torch: str, flax: str) -> str:
    """The kind of a layer on both sides; PyTorch's where they differ and it is known."""
    return torch if torch != OTHER else flax


def path_rate(module: object) -> float | None:
    """The rate at which a module leaves out branches in training, known by its class's name; None of all others."""
    if DROPS_PATHS.fullmatch(type(module).__name__) is None:
        return None
    values = (getattr(module, name, None) for name in ("drop_prob", "drop_path_rate", "drop_rate", "rate", "p", "prob"))
    return next((float(v) for v in values if isinstance(v, int | float)), None)


def like(first: str, second: str) -> bool:
    """Whether layers of these kinds may be the same layer."""
    return second in _LIKE[first] or first == OTHER


Shape = tuple[int, ...]

IN_OUT = "in_out"
"""In a linear layer's config: PyTorch's matrix is [in, out], as Flax's."""
OUT_IN = "out_in"
"""In a linear layer's config: Flax's matrix is [out, in], as PyTorch's."""

FROZEN = "frozen"
"""In a layer's config: the local names of parameters that PyTorch does not train (requires_grad=False)."""

MADE_OF = "parametrizations."
"""In PyTorch, the beginning of the names of tensors that a layer makes its own of: they are no weights of the kind."""

COUNTERS = re.compile(r"(.*_)?(num_batches_tracked|num_batches|counter|step|steps)", re.IGNORECASE)
"""Names of counters, which hold no weights. They are scalars."""

DROPS_PATHS = re.compile(r".*(drop_?path|stochastic_?depth)(_?[123]d)?", re.IGNORECASE)
"""Names of classes that leave out a whole branch of some examples, at random in training: neither framework has one."""

WEIGHT = re.compile(r"_*(weights?|w|kernel|filters?|matrix)", re.IGNORECASE)
SCALE = re.compile(r"_*(gamma|weight|scale|gain|g|w|alpha|a)", re.IGNORECASE)
SHIFT = re.compile(r"_*(beta|bias|biases|shift|offset|b)", re.IGNORECASE)
MEAN = re.compile(r"_*((moving|running|ema|pop|population|global|batch|r|m)_*)?(mean|mu|avg|average|m)", re.IGNORECASE)
VAR = re.compile(
    r"_*((moving|running|ema|pop|population|global|batch|r|m)_*)?(var|variance|sigma_?2|sigma_?sq\w*|sq_?sigma|v)",
    re.IGNORECASE,
)

# How a class's name ends, once a rank ("2d"), digits and "Layer" are taken off. The order decides: a transposed
# convolution ends in "conv" too.
ENDINGS: tuple[tuple[str, str], ...] = (
    (r"(batch_?norm(alization)?|(?<![a-z])bn)", "batch_norm"),
    (r"(layer_?norm(alization)?|(?<![a-z])ln)", "layer_norm"),
    (r"((group|instance)_?norm(alization)?|(?<![a-z])gn)", "group_norm"),
    (r"rms_?norm(alization)?", "rms_norm"),
    (r"(conv(olution)?_?transposed?|transposed?_?conv(olution)?|deconv(olution)?|up_?conv)(_?nd)?", "conv_transpose"),
    (r"conv(olution)?(_?(nd|local|same|layer))?", "conv"),
    (r"((?<!bi)linear|dense)(_?general)?|einsum|fully_?connected|projection|(?<![a-z])fc", "linear"),
    (r"embed(ding|der)?(_?bag)?", "embedding"),
    (r"(?<!weight_)(?<!spectral_)norm(alization)?", "layer_norm"),
)
# Attention is read as one layer only where it is the library's: a hand-written one is made of layers of its own.
ATTENTION = {"MultiheadAttention", "MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"}


def class_names(cls: type) -> list[str]:
    """The names of a class and its ancestors with their modules, the most derived first: what `kind_of` reads."""
    return [f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__ if c is not object]


HALF = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
"""The eps of floating point of 16 bits."""


def is_floating(array: NDArray) -> bool:
    """Whether it holds floating-point numbers; bfloat16 and its kind, which numpy does not count among them, too."""
    return array.dtype.name.startswith(("float", "bfloat")) and not is_too_wide(array.dtype)


def is_too_wide(dtype: np.dtype[Any]) -> bool:
    """Whether its numbers are of a type that neither framework has: numpy's long double, and complex ones of it."""
    return dtype.kind in "fc" and dtype.itemsize > (8 if dtype.kind == "f" else 16)


def as_native(array: NDArray[Any]) -> NDArray[Any]:
    """The array in this machine's byte order, the only one that either framework takes."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def is_counter(name: str, shape: Shape) -> bool:
    """A scalar called num_batches_tracked or the like: it counts, and is no weight."""
    return math.prod(shape) == 1 and len(shape) <= 1 and COUNTERS.fullmatch(_last(name)) is not None


def kind_of(class_names: Sequence[str], tensor_shapes: Mapping[str, Shape], statistics: Collection[str]) -> str:
    """The kind of a layer, one of `KINDS`.

    A class is judged by the first of its ancestors whose name says a kind that its tensors do not contradict, else by
    the tensors alone: a moving mean and variance make a batch norm, a weight of rank 4 a convolution.

    Args:
      class_names: of the class and its ancestors, the most derived first, with their modules (`class_names` of this
        module) or without; with modules, a hand-written MultiHeadAttention is told from a library's.
      tensor_shapes: the layer's own tensors by local name, statistics included; of attention, sub-layers' too
        ("query/kernel") or none.
      statistics: which of them are statistics: PyTorch's buffers, Flax's collections beside params.

    Returns:
      "other" where nothing says more: bare parameters.
    """
    shapes = {name: tuple(shape) for name, shape in tensor_shapes.items() if not is_counter(name, tuple(shape))}
    if any(_is_attention(name, shapes) for name in class_names):
        return "attention"
    for name in class_names:
        kind = _kind_by_name(name.rpartition(".")[2])
        if kind is not None and _plausible(kind, shapes):
            # A name that ends in "Norm" alone says too little: statistics make it a batch norm.
            return "batch_norm" if kind == "layer_norm" and _has_statistics(shapes, statistics) else kind
    return _kind_by_tensors(shapes, statistics, " ".join(name.rpartition(".")[2] for name in class_names).lower())


def _is_attention(name: str, shapes: Mapping[str, Shape]) -> bool:
    module, _, plain = name.rpartition(".")
    if plain not in ATTENTION:
        return False
    if module:
        return module.split(".")[0] in ("torch", "flax")
    own = any(part in tensor for tensor in shapes for part in ("in_proj", "q_proj_weight", "query/"))
    return own or not shapes


def _kind_by_name(name: str) -> str | None:
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # MyBatchNorm2d -> My_Batch_Norm2d
    name = re.sub(r"_*\d+_?d?(?=_|$)|_(layer|module|block)$", "", name.lower()).strip("_")
    return next((kind for ending, kind in ENDINGS if re.search(f"({ending})$", name)), None)


def _plausible(kind: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a layer of this kind can have such tensors. No tensors say nothing."""
    if not shapes:
        return True
    ranks = [_rank(shape) for shape in shapes.values()]
    if kind in NORMS:
        return len({math.prod(shape) for shape in shapes.values() if shape}) == 1
    if kind == "embedding":
        return max(ranks) == 2 and len(shapes) == 1
    return max(len(shape) for shape in shapes.values()) >= (2 if kind == "linear" else 3)


def _kind_by_tensors(shapes: Mapping[str, Shape], statistics: Collection[str], names: str) -> str:
    if _has_statistics(shapes, statistics):
        return "batch_norm"
    learned = {name: shape for name, shape in shapes.items() if name not in statistics}
    weights = [shape for name, shape in learned.items() if WEIGHT.fullmatch(_last(name)) and len(shape) >= 2]
    others = [s for n, s in learned.items() if not (WEIGHT.fullmatch(_last(n)) and len(s) >= 2)]
    if len(weights) == 1 and all(_rank(shape) <= 1 for shape in others) and len(others) <= 1:
        rank = len(weights[0])
        if rank >= 4 or (rank == 3 and "conv" in names):
            return "conv_transpose" if re.search("transpose|deconv", names) else "conv"
        # "w" may be meant either way round, [out, in] or [in, out]; the libraries' own names may not.
        if rank == 2 and any(_last(name).lower() in ("weight", "kernel") for name in learned):
            return "linear"
    return "other"


def _has_statistics(shapes: Mapping[str, Shape], statistics: Collection[str]) -> bool:
    names = [_last(name) for name in statistics if name in shapes]
    return any(MEAN.fullmatch(name) for name in names) and any(VAR.fullmatch(name) for name in names)


def _rank(shape: Shape) -> int:
    """Axes longer than 1: (1, C, 1, 1) is a value per channel."""
    return sum(n != 1 for n in shape)


def _last(name: str) -> str:
    return re.split(r"[./]", name)[-1]
