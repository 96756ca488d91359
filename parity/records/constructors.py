"""What a layer's constructor was given, in terms that both frameworks share, and the line that gives it these.

A table: of each constructor its arguments, what each is called there, and how it goes into the shared term and back.
Of a class that is not here, as a user's own, nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from parity.records import kinds
from parity.records.recording import Layer

CONSTRUCTOR = "constructor"
"""In a layer's config: which of the libraries' own classes it is, "torch.Conv2d", "linen.Conv", "nnx.Conv"."""

Terms = dict[str, Any]
Pairs = tuple[tuple[int, int], ...]
"""Of a padding: before and after, axis by axis."""


class NotSayableError(ValueError):
    """There is no such argument in this framework, or it is not known what was given."""


def as_it_is(value: Any, terms: Terms) -> Any:
    """What is written the same way in both."""
    return value


class Argument(NamedTuple):
    """One argument of a constructor.

    Attributes:
      name: in the constructor, and of the module's attribute where no other is named.
      term: what it is called here. One that begins with "." is this framework's alone, and stays as it is.
      default: of the constructor; `REQUIRED` where it has none, then it is written without its name.
      read: from the attribute, and the terms so far, to the term; raises `NotSayableError`.
      write: from the term, and all terms, to the argument; raises `NotSayableError`.
      attribute: of the module, which the argument is made of.
    """

    name: str
    term: str
    default: Any
    read: Callable[[Any, Terms], Any] = as_it_is
    write: Callable[[Any, Terms], Any] = as_it_is
    attribute: str = ""


REQUIRED = object()


def _sizes(value: Any, terms: Terms) -> tuple[int, ...]:
    rank = terms["rank"]
    sizes = (1 if value is None else value,) * rank if value is None or isinstance(value, int) else tuple(value)
    if len(sizes) == 1:
        sizes *= rank
    if len(sizes) != rank or not all(isinstance(n, int) for n in sizes):
        raise NotSayableError(f"{value!r} for {rank} axes")
    return sizes


def _kernel(value: Any, terms: Terms) -> tuple[int, ...]:
    terms["rank"] = 1 if isinstance(value, int) else len(value)
    return _sizes(value, terms)


def _short(sizes: tuple[int, ...], terms: Terms) -> Any:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _spans(terms: Terms) -> list[int]:
    """How far a kernel reaches beyond one position."""
    return [(k - 1) * d for k, d in zip(terms["kernel"], terms["dilation"], strict=True)]


def _same(terms: Terms, *, low_first: bool = False) -> Pairs:
    found = []
    sizes = terms.get("sizes", ())
    for i, (span, stride) in enumerate(zip(_spans(terms), terms["stride"], strict=True)):
        if stride == 1:
            total = span
        elif len(sizes) == terms["rank"]:
            total = max((-(-sizes[i] // stride) - 1) * stride + span + 1 - sizes[i], 0)
        else:
            raise NotSayableError("SAME of a size that is not known")
        some, more = total // 2, total - total // 2
        found.append((more, some) if low_first else (some, more))
    return tuple(found)


def _pads(value: Any, terms: Terms) -> Pairs:
    if isinstance(value, str):
        return _named_pads(value.upper(), terms)
    if isinstance(value, Sequence) and value and isinstance(value[0], Sequence):
        pairs = tuple((int(low), int(high)) for low, high in value)
        if len(pairs) != terms["rank"]:
            raise NotSayableError(f"{value!r} for {terms['rank']} axes")
        return pairs
    return tuple((n, n) for n in _sizes(value, terms))


def _named_pads(name: str, terms: Terms) -> Pairs:
    spans = _spans(terms)
    if name == "VALID":
        return tuple((0, 0) for _ in spans)
    if name in ("SAME", "SAME_LOWER"):
        return _same(terms, low_first=name == "SAME_LOWER")
    if name in ("CIRCULAR", "REFLECT"):
        terms["mode"] = name.lower()
        return tuple((span // 2, span - span // 2) for span in spans)
    if name == "CAUSAL" and len(spans) == 1:
        return ((spans[0], 0),)
    raise NotSayableError(name)


def _torch_pads(pairs: Pairs, terms: Terms) -> Any:
    """Where the two ends differ PyTorch has no such argument: `line` says what goes in front."""
    if any(low != high for low, high in pairs):
        if terms["mode"] != "zeros":
            raise NotSayableError("uneven padding that is not of zeros")
        return 0
    return _short(tuple(low for low, _ in pairs), terms)


def _flax_pads(pairs: Pairs, terms: Terms) -> Any:
    if terms["mode"] == "zeros":
        return pairs if any(map(any, pairs)) else "VALID"
    if terms["mode"] in ("circular", "reflect") and pairs == _named_pads(terms["mode"].upper(), dict(terms)):
        return terms["mode"].upper()
    raise NotSayableError(f"padding {pairs} of {terms['mode']}")


def _new_to_old(value: Any, terms: Terms) -> float:
    """PyTorch's momentum is the weight of the new value; None is an average of all."""
    if value is None:
        raise NotSayableError("an average of all steps")
    return float(f"{1 - value:.9g}")


def _one_affine(value: bool, terms: Terms) -> bool:
    """One argument for both of them."""
    if terms["scale"] != terms["bias"]:
        raise NotSayableError("one argument for scale and bias")
    return value


def _shape(value: Any, terms: Terms) -> Any:
    return value[0] if isinstance(value, tuple | list) and len(value) == 1 else value


_RATES = (Argument("eps", "epsilon", 1e-5), Argument("momentum", "momentum", 0.1, _new_to_old, _new_to_old))
_TRACKED = Argument("track_running_stats", ".track_running_stats", True)
_AFFINE = Argument("affine", "scale", True, write=_one_affine)
_TORCH_CONV = (
    Argument("in_channels", ".inputs", REQUIRED),
    Argument("out_channels", ".features", REQUIRED),
    Argument("kernel_size", "kernel", REQUIRED, _kernel, _short),
    Argument("stride", "stride", 1, _sizes, _short),
    Argument("dilation", "dilation", 1, _sizes, _short),
    Argument("padding_mode", "mode", "zeros"),
    Argument("padding", "padding", 0, _pads, _torch_pads),
    Argument("groups", "groups", 1),
    Argument("bias", "bias", True),
)
_TORCH_CONV_TRANSPOSE = (
    *_TORCH_CONV[:5],
    *(Argument(name, f".{name}", 0, _sizes, _short) for name in ("padding", "output_padding")),
    *_TORCH_CONV[-2:],
)
_FLAX_CONV = (
    Argument("strides", "stride", 1, _sizes, as_it_is),
    Argument("kernel_dilation", "dilation", 1, _sizes, as_it_is),
    Argument("padding", "padding", "SAME", _pads, _flax_pads),
    Argument("input_dilation", ".input_dilation", 1),
    Argument("feature_group_count", "groups", 1),
    Argument("use_bias", "bias", True),
)
_FLAX_CONV_TRANSPOSE = (
    *_FLAX_CONV[:2],
    Argument("padding", ".padding", "SAME"),
    Argument("transpose_kernel", ".transpose_kernel", False),
    _FLAX_CONV[-1],
)
_FLAX_AFFINE = (Argument("use_scale", "scale", True), Argument("use_bias", "bias", True))
_USE_BIAS = (Argument("use_bias", "bias", True),)
_FLAX_GROUPS = (Argument("num_groups", ".num_groups", 32), Argument("group_size", ".group_size", None))
_EPSILON = (Argument("epsilon", "epsilon", 1e-6),)
_AXES = tuple(Argument(f"{name}_axes", f".{name}_axes", -1) for name in ("reduction", "feature"))
_FLAX_BATCH = (
    *(Argument("momentum", "momentum", 0.99), Argument("epsilon", "epsilon", 1e-5), *_FLAX_AFFINE),
    *(Argument(name, f".{name}", usual) for name, usual in (("axis", -1), ("axis_name", None))),
)
_RUNNING = ".use_running_average"


def _nnx(name: str) -> tuple[Argument, ...]:
    return (Argument(name, f".{name}", REQUIRED),)


_IN_OUT = _nnx("in_features") + _nnx("out_features")
_FEATURES = _nnx("features")
_FLAX_KERNEL = (Argument("kernel_size", "kernel", REQUIRED, _kernel, as_it_is),)

CONSTRUCTORS: dict[str, tuple[Argument, ...]] = {
    **{f"torch.Conv{n}d": _TORCH_CONV for n in (1, 2, 3)},
    **{f"torch.ConvTranspose{n}d": _TORCH_CONV_TRANSPOSE for n in (1, 2, 3)},
    "torch.Linear": (*_IN_OUT, Argument("bias", "bias", True)),
    **{f"torch.BatchNorm{n}d": (*_nnx("num_features"), *_RATES, _AFFINE, _TRACKED) for n in (1, 2, 3)},
    "torch.LayerNorm": (
        Argument("normalized_shape", ".normalized_shape", REQUIRED, write=_shape),
        Argument("eps", "epsilon", 1e-5),
        Argument("elementwise_affine", "scale", True),
        Argument("bias", "bias", True, write=lambda value, terms: value or not terms["scale"]),
    ),
    "torch.GroupNorm": (
        *_nnx("num_groups"),
        *_nnx("num_channels"),
        Argument("eps", "epsilon", 1e-5),
        _AFFINE,
    ),
    "torch.RMSNorm": (
        Argument("normalized_shape", ".normalized_shape", REQUIRED, write=_shape),
        Argument("eps", "epsilon", None),
        Argument("elementwise_affine", "scale", True),
    ),
    "linen.Conv": (*_FEATURES, *_FLAX_KERNEL, *_FLAX_CONV),
    "nnx.Conv": (*_IN_OUT, *_FLAX_KERNEL, *_FLAX_CONV),
    "linen.ConvTranspose": (*_FEATURES, *_FLAX_KERNEL, *_FLAX_CONV_TRANSPOSE),
    "nnx.ConvTranspose": (*_IN_OUT, *_FLAX_KERNEL, *_FLAX_CONV_TRANSPOSE),
    "linen.Dense": (*_FEATURES, *_USE_BIAS),
    "nnx.Linear": (*_IN_OUT, *_USE_BIAS),
    "linen.BatchNorm": (Argument(_RUNNING[1:], _RUNNING, None), *_FLAX_BATCH),
    "nnx.BatchNorm": (*_nnx("num_features"), Argument(_RUNNING[1:], _RUNNING, False), *_FLAX_BATCH),
    "linen.LayerNorm": (*_EPSILON, *_FLAX_AFFINE, *_AXES),
    "nnx.LayerNorm": (*_nnx("num_features"), *_EPSILON, *_FLAX_AFFINE, *_AXES),
    "linen.GroupNorm": (*_FLAX_GROUPS, *_EPSILON, *_FLAX_AFFINE),
    "nnx.GroupNorm": (
        _FLAX_GROUPS[0],
        Argument(
            "num_features", ".num_features", REQUIRED, lambda n, terms: n * terms[".num_groups"], attribute="group_size"
        ),
        *_EPSILON,
        *_FLAX_AFFINE,
    ),
    "linen.RMSNorm": (*_EPSILON, _FLAX_AFFINE[0], *_AXES),
    "nnx.RMSNorm": (*_nnx("num_features"), *_EPSILON, _FLAX_AFFINE[0], *_AXES),
}
ATTRIBUTES = {
    library: tuple(
        dict.fromkeys(
            a.attribute or a.name for name, row in CONSTRUCTORS.items() if name.startswith(library) for a in row
        )
    )
    for library in ("torch", "linen", "nnx")
}
"""Of each library what is to be read of a module. The scale and the bias are seen by its tensors."""
PREFIX = {"torch": "nn", "linen": "nn", "nnx": "nnx"}


def is_plain(value: Any) -> bool:
    """Whether a file of text can keep it, and a line show it."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def given_to(module: Any, **libraries: Any) -> dict[str, Any]:
    """Which of the libraries' own classes a module is, and what it was given, for a layer's config.

    Args:
      module: any.
      **libraries: torch=torch.nn, linen=flax.linen, nnx=flax.nnx: where the classes are.

    Returns:
      Nothing of another class, be it of the same name or made of theirs.
    """
    cls = type(module)
    library = next((name for name, of in libraries.items() if getattr(of, cls.__name__, None) is cls), None)
    if library is None:
        return {}
    given = {name: getattr(module, name) for name in ATTRIBUTES[library] if hasattr(module, name)}
    return {CONSTRUCTOR: f"{library}.{cls.__name__}", **{name: v for name, v in given.items() if is_plain(v)}}


class Said(NamedTuple):
    """What one side's layer is made with.

    Attributes:
      constructor: see `CONSTRUCTORS`.
      terms: what its arguments mean.
      given: its arguments as they are, by their names.
    """

    constructor: str
    terms: Mapping[str, Any]
    given: Mapping[str, Any]

    def like(self, other: Said, terms: Sequence[str]) -> Said:
        """The same layer with these terms of the other's."""
        taken = {a.name for a in CONSTRUCTORS[self.constructor] if a.term in terms}
        kept = {name: value for name, value in self.given.items() if name not in taken}
        return Said(self.constructor, {**self.terms, **{t: other.terms[t] for t in terms}}, kept)


def said(layer: Layer, sizes: Sequence[int] = ()) -> Said | None:
    """What a layer's constructor was given.

    Args:
      layer: as recorded.
      sizes: of its input, without examples and channels; a padding may depend on it.

    Returns:
      None where its class is not one of the libraries' own, or it does not say all.
    """
    name = layer.config.get(CONSTRUCTOR, "")
    if name not in CONSTRUCTORS:
        return None
    shifts = [bool(kinds.SHIFT.fullmatch(local)) for local in layer.tensors if local not in layer.statistics]
    terms: Terms = {"sizes": tuple(sizes), "mode": "zeros", "scale": False in shifts, "bias": True in shifts}
    given: dict[str, Any] = {}
    try:
        for a in CONSTRUCTORS[name]:
            if a.term in ("scale", "bias"):
                continue
            if (attribute := a.attribute or a.name) not in layer.config:
                return None
            value = layer.config[attribute]
            terms[a.term] = a.read(value, terms)
            given |= {} if a.attribute else {a.name: value}
    except NotSayableError:
        return None
    return Said(name, terms, given)


def line(said: Said, shown: Sequence[str] = ()) -> str:
    """The code that makes such a layer.

    Args:
      said: what it is made with.
      shown: terms that are written even where they are the default.

    Raises:
      NotSayableError: this framework has no argument for one of the terms.
    """
    library, _, name = said.constructor.partition(".")
    terms = dict(said.terms)
    first, parts = [], []
    for a in CONSTRUCTORS[said.constructor]:
        value = said.given[a.name] if a.name in said.given else a.write(terms[a.term], terms)
        if library == "torch" and isinstance(value, tuple):
            value = _shape(value, terms) if a.write is _shape else _short(value, terms)
        text = f'"{value}"' if isinstance(value, str) else repr(value)
        if a.default is REQUIRED:
            first.append(text)
        elif a.term in shown or not _is_default(a, value, terms):
            parts.append(f"{a.name}={text}")
    parts += ["rngs=rngs"] * (library == "nnx")
    pairs = () if "padding" in said.given else terms.get("padding", ())
    uneven = library == "torch" and any(low != high for low, high in pairs)
    pads = tuple(n for pair in reversed(pairs) for n in pair)
    return f"{PREFIX[library]}.{name}({', '.join(first + parts)}){f'  # of F.pad(x, {pads})' if uneven else ''}"


def _is_default(a: Argument, value: Any, terms: Terms) -> bool:
    """Whether it need not be written."""
    try:
        return value == a.default or (a.default is not None and a.read(a.default, dict(terms)) == terms[a.term])
    except NotSayableError:
        return False
