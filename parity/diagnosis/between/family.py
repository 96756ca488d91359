"""Explains what lies between two layers: activation, pool, dropout, flatten, residual sums, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between import attention, blocks, cuts, images, relations, softmaxes
from parity.diagnosis.between.activations import OF_A_MULTIPLE, error_of, is_function, limit_of
from parity.diagnosis.between.chains import Chain, Source, Target, match
from parity.diagnosis.between.lines import activation_fix, pool_fix
from parity.diagnosis.between.pools import Pool, pads, times
from parity.diagnosis.between.search import part_of, search
from parity.diagnosis.family import SIDES, Family, Property, unlike
from parity.diagnosis.finding import Finding, told_apart

Array = NDArray[Any]

# Examples looked at, and elements: what holds for those where the sides differ most holds for all.
EXAMPLES, ELEMENTS = 4, 200_000
# What it costs to suppose that two pools differ in this.
POOL_COSTS = {"presence": 6, "kind": 4, "window": 3, "stride": 3, "padding": 2, "counted": 2}
MOST_CHAINS = 120  # of a side that are compared with the other's


def findings(
    sources: Sequence[Source],
    torch: Array,
    flax: Array,
    *,
    train: bool,
    tolerance: float = 1e-9,
    rerun: tuple[Array, Array] | None = None,
    output: str = "",
    masks: Sequence[Source] = (),
) -> list[Finding]:
    """Names the mistakes between the sources, which both sides have alike, and the next layer's input.

    Each side alone is fitted to the chains of `between.chains`; of all pairs of chains that fit, the two most
    alike are compared. Where no chain fits, what leads from one side's tensor to the other's is looked for.

    Args:
      sources: outputs of the layers run before, inputs of earlier ones, the network's input; the most recent first.
      torch: what arrives at the next layer in PyTorch, in Flax's layout (or flattened, in any order).
      flax: the same in Flax.
      train: whether both were run in training mode, with dropout switched off.
      tolerance: relative to the largest value.
      rerun: both once more, with another random key: a side that differs from itself drops out.
      output: it is no layer's input, but this output of the network ("output 2 of 3").
      masks: the network's inputs that may say which positions are padding; of any dtype.

    Returns:
      The findings; [] if the numbers agree.
    """
    torch, flax = np.asarray(torch, np.float64), np.asarray(flax, np.float64)
    again = [None, None] if rerun is None else [np.asarray(side, np.float64) for side in rerun]
    random = [_differ(a, b, tolerance) if b is not None else None for a, b in zip((torch, flax), again, strict=True)]
    if not any(random) and not _differ(torch, flax, tolerance):
        return []
    if found := softmaxes.findings(sources, torch, flax, tolerance):
        return found
    sources, torch, flax, masks = _thin(sources, torch, flax, masks)
    targets = [
        Target(side, tolerance, limit_of(side, tolerance), active is not False)
        for side, active in zip((torch, flax), random, strict=True)
    ]
    chains = [search(sources, target) for target in targets]
    if all(chains):
        family, (a, b) = _nearest(chains[0][:MOST_CHAINS], chains[1][:MOST_CHAINS], min(torch.ndim, flax.ndim))
        if output and "source" in family.differences(a, b) and " + " not in a.source + b.source:
            return [Finding("output-taken-early", f"PyTorch makes {output} of {a.source}, Flax of {b.source}")]
        known = [*_dropout((a, b), random, train), *family.findings(a, b)]
        known = known or [_unexplained(chains, f"both sides look like {a}, and yet they differ")]
    else:
        known = _dropout((None, None), random, train)
    if known and any(f.code != "unexplained" for f in known):
        return known
    further = (
        cuts.findings(sources, targets[0], targets[1], describe)
        or attention.findings(sources, masks, *targets)
        or blocks.findings(sources, targets[0], targets[1], describe)
        or images.findings(sources, targets[0], targets[1])
        or _joined(sources, targets, train)
    )
    return further or known or _related(sources, torch, flax, tolerance, train) or [_unexplained(chains)]


def _joined(sources: Sequence[Source], targets: Sequence[Target], train: bool) -> list[Finding]:
    """What is found of a part of the channels that alone differs."""
    for torch, flax in blocks.differing(sources, targets[0], targets[1]):
        found = findings(sources, torch.value, flax.value, train=train, tolerance=torch.tolerance)
        if all(f.code != "unexplained" for f in found):
            return found
    return []


def describe(sources: Sequence[Source], value: Array, tolerance: float = 1e-9) -> Chain | None:
    """What makes `value` of the sources: the most usual chain that fits, or None."""
    value = np.asarray(value, np.float64)
    sources, value, *_ = _thin(sources, value, value)
    chains = search(sources, Target(value, tolerance, limit_of(value, tolerance), True))
    return chains[0] if chains else None


def _differ(a: Array, b: Array, tolerance: float) -> bool:
    """Whether the values differ; axes of size 1 are no difference."""
    if a.shape != b.shape:
        if [n for n in a.shape if n != 1] != [n for n in b.shape if n != 1]:
            return True
        b = b.reshape(a.shape)
    if np.array_equal(a, b, equal_nan=True):
        return False
    return error_of(a, b) > max(limit_of(a, tolerance), limit_of(b, tolerance))


def _thin(
    sources: Sequence[Source], torch: Array, flax: Array, masks: Sequence[Source] = ()
) -> tuple[list[Source], Array, Array, list[Source]]:
    """A few examples, those that differ most; each source once; all but the masks in float64."""
    values = [np.asarray(source.value, np.float64) for source in sources]
    count = len(torch) if torch.ndim else 0
    alike = [value.ndim > 0 and len(value) == count for value in (*values, flax)]
    if count > 1 and all(alike):
        each = max(value.size for value in (torch, flax, *values)) // count
        # Of small arrays more: a kink shows only where values lie on both its sides.
        examples = max(1, min(max(EXAMPLES, 4096 // max(1, each)), ELEMENTS // max(1, each)))
        if torch.shape == flax.shape:
            off = np.nan_to_num(np.abs(torch - flax)).reshape(count, -1).max(axis=1, initial=0.0)
            keep = np.sort(np.argsort(-off, kind="stable")[:examples])
        else:
            keep = np.arange(min(examples, count))
        torch, flax, values = torch[keep], flax[keep], [value[keep] for value in values]
        masks = [Source(m.name, m.value[keep] if len(m.value) == count else m.value) for m in masks]
    thin: list[Source] = []
    for source, value in zip(sources, values, strict=True):
        if np.isfinite(value).all() and not any(np.array_equal(value, other.value) for other in thin):
            thin.append(Source(source.name, value))
    return thin, torch, flax, list(masks)


def _nearest(first: list[Chain], second: list[Chain], rank: int) -> tuple[Family[Chain], tuple[Chain, Chain]]:
    """What chains that lead to tensors of this rank may differ in, and the nearest two; of such the likeliest."""
    places = [{chain: place for place, chain in reversed(list(enumerate(side)))} for side in (first, second)]
    family = Family(
        Property("source", _source_distance, _source_findings),
        Property("gate", lambda a, b: 4 * _exchanged(a, b), lambda a, b: [Finding("gate", f"PyTorch: {a}; Flax: {b}")]),
        Property("activation", unlike("activation", 4), _activation_findings),
        Property("order", lambda a, b: 5 * bool(a.order and b.order and a.order != b.order), _order_findings),
        Property("pool", _pool_distance, _pool_findings),
        Property("gain", unlike("gain", 4), lambda a, b: [_gain(a, b)]),
        Property("layout", unlike("layout", 3), lambda a, b: [_layouts(a, b, rank)]),
        Property("dropout", unlike("dropout", 4), lambda a, b: []),  # told by `_dropout`, whether they differ or not
        preference=lambda a, b: places[0][a] + places[1][b],
    )
    pair = family.nearest(first, second)
    assert pair is not None  # both sides have chains
    return family, pair


def _pool_distance(a: Chain, b: Chain) -> int:
    return sum(POOL_COSTS[name] for name in _pool_differences(a.pool, b.pool))


def _pool_differences(a: Pool | None, b: Pool | None) -> list[str]:
    """In what two pools differ, by the keys of `POOL_COSTS`."""
    if a == b:
        return []
    if a is None or b is None:
        return ["presence"]
    special = [pool.kind in ("first", "last") or any(axis.adaptive for axis in pool.axes) for pool in (a, b)]
    if any(special):
        return ["kind"]
    found = ["kind"] if a.kind != b.kind else []
    found += ["window"] if a.window != b.window else []
    single = any(all(axis.outputs == 1 for axis in pool.axes) for pool in (a, b))
    found += ["stride"] if a.stride != b.stride and not single else []
    # Padding behind follows from window and stride too; alone it says something only where these agree.
    before = [[axis.before for axis in pool.axes] for pool in (a, b)]
    if before[0] != before[1] or (a.window == b.window and a.stride == b.stride and a.padding != b.padding):
        found.append("padding")
    # What rounding the shape up adds is never counted: with other padding that is no mistake of its own.
    ways = {a.counted, b.counted}
    if a.kind == b.kind and "" not in ways and len(ways) == 2 and not ("padding" in found and "explicit" in ways):
        found.append("counted")
    return found


def _exchanged(a: Chain, b: Chain) -> bool:
    """Whether both multiply the same two, or parts of one source, and another of them has the activation."""
    if not a.gate or not b.gate or (a.source, a.gate) == (b.source, b.gate):
        return False
    wholes = {part_of(name) for name in (a.source, a.gate, b.source, b.gate)}
    return {a.source, a.gate} == {b.source, b.gate} or (len(wholes) == 1 and "" not in wholes)


def _source_distance(a: Chain, b: Chain) -> float:
    return 8 * ((a.source, a.gate) != (b.source, b.gate) and not _exchanged(a, b))


def _source_findings(a: Chain, b: Chain) -> list[Finding]:
    missing = " (a residual branch is missing or another one)" if " + " in a.source + b.source else ""
    texts = [str(c) if c.gate else c.source for c in (a, b)]
    return [Finding("unexplained", f"PyTorch makes it of {texts[0]}, Flax of {texts[1]}{missing}")]


def _activation_findings(a: Chain, b: Chain) -> list[Finding]:
    if a.gain != b.gain and _gain(a, b).code == "unexplained":
        return []  # said there
    if a.gate and b.gate:
        told = _exchanged(a, b)
        return [] if told else [Finding("gate", f"PyTorch: {a}; Flax: {b}")]
    evidence = f"PyTorch applies {_applied(a)}, Flax {_applied(b)}"
    # An activation of a number times x is none that is taken for another, as little as a number times one.
    scaled = a.activation.startswith(OF_A_MULTIPLE) or b.activation.startswith(OF_A_MULTIPLE)
    if scaled:
        return [Finding("unexplained", evidence)]
    fix = activation_fix(a.activation, b.activation) if a.gain == b.gain == 1 else None
    return [Finding("activation", evidence, fix=fix)]


def _order_findings(a: Chain, b: Chain) -> list[Finding]:
    evidence = f"PyTorch takes the {a.order}, Flax the {b.order}, and the two do not commute"
    return [Finding("unexplained", evidence, charges="pool")]


def _applied(chain: Chain) -> str:
    return "no activation" if chain.activation == "identity" else chain.activation


def _gain(a: Chain, b: Chain) -> Finding:
    """A constant factor: of a sum taken for an average if it is the size of the window; else nobody's known mistake."""
    ratio = b.gain / a.gain
    if a.pool and b.pool and any(abs(ratio / k - 1) < 1e-5 for n in (np.prod(a.pool.window),) for k in (n, 1 / n)):
        which = SIDES if ratio < 1 else SIDES[::-1]
        return Finding("pool-kind", f"{which[0]} sums over the window, {which[1]} takes the average")
    if a.activation != b.activation:
        gains = told_apart(a.gain, b.gain)
        texts = [_applied(c) + (f" times {text}" if c.gain != 1 else "") for c, text in zip((a, b), gains, strict=True)]
        return Finding("unexplained", f"PyTorch applies {texts[0]}, Flax {texts[1]}")
    numbers = [f"{text}{_root(chain.gain)}" for text, chain in zip(told_apart(a.gain, b.gain), (a, b), strict=True)]
    return Finding("unexplained", f"PyTorch multiplies by {numbers[0]}, Flax by {numbers[1]}")


def _root(value: float) -> str:
    """What a factor is the root of (0.25 = 1/sqrt(16)), as the width of a layer goes into factors; else nothing."""
    for text, square in (("sqrt({})", value * value), ("1/sqrt({})", 1 / (value * value))):
        if value > 0 and square >= 2 and abs(square - round(square)) <= 1e-6 * square and square < 1e5:
            return f" = {text.format(round(square))}"
    return ""


def _layouts(a: Chain, b: Chain, rank: int) -> Finding:
    """Axes in another order: a mistake of the flatten only where one merged them, and the rank is lower than before."""
    if max(len(chain.layout.split(",")) for chain in (a, b)) >= rank:
        texts = [f"{chain.layout or 'keeps the axes as they are'}" for chain in (a, b)]
        return Finding("flatten-order", f"PyTorch flattens {texts[0]}, Flax {texts[1]}")
    texts = [f"has the axes in the order {c.layout}" if c.layout else "keeps the axes as they are" for c in (a, b)]
    return Finding("unexplained", f"PyTorch {texts[0]}, Flax {texts[1]}")


def _pool_findings(first: Chain, second: Chain) -> list[Finding]:
    a, b = first.pool, second.pool
    if a is None or b is None:
        return [Finding("pool-kind", f"PyTorch applies {a or 'no pool'}, Flax {b or 'no pool'}")]
    codes = {"kind": "pool-kind", "window": "pool-kind", "counted": "pool-count-padding"}
    fix = pool_fix(a, b)
    return [Finding(codes.get(name, name), _pool_evidence(name, a, b), fix=fix) for name in _pool_differences(a, b)]


def _pool_evidence(name: str, a: Pool, b: Pool) -> str:
    if name == "kind":
        return f"PyTorch applies {a}, Flax {b}"
    if name == "window":
        return f"PyTorch's window is {times(a.window)}, Flax's {times(b.window)}"
    if name == "stride":
        return f"PyTorch's pool has stride {times(a.stride)}, Flax's {times(b.stride)}"
    if name == "padding":
        return f"PyTorch's pool is padded by {pads(a.padding)}, Flax's by {pads(b.padding)}"
    return _counting(a, b)


def _counting(a: Pool, b: Pool) -> str:
    if a.kind == "max":
        texts = {"yes": "lets the padding's zeros compete in the maximum", "no": "leaves padding out of the maximum"}
    else:
        texts = {
            "yes": "counts the padding in the average",
            "no": "does not count padding in the average",
            "explicit": "counts its own padding in the average, not what rounding the shape up adds",
        }
    return f"PyTorch {texts[a.counted]}, Flax {texts[b.counted]}"


def _dropout(chains: tuple[Chain | None, Chain | None], random: Sequence[bool | None], train: bool) -> list[Finding]:
    """Dropout in either side's chain, or a side whose result changes with the random key."""
    sentences = []
    for side, chain, active in zip(SIDES, chains, random, strict=True):
        if chain and chain.dropout:
            p = chain.dropout
            sentences.append(
                f"{side} sets values to 0 and multiplies the others by {1 / (1 - p):.4g} = 1/(1 - {p:.3g})"
            )
        elif active:
            sentences.append(f"{side}'s result changes with the random key")
    if not sentences:
        return []
    mode = "although it was switched off for the comparison" if train else "in prediction"
    return [Finding("dropout-active", f"{'; '.join(sentences)}: dropout is active {mode}")]


def _related(sources: Sequence[Source], torch: Array, flax: Array, tolerance: float, train: bool) -> list[Finding]:
    """What leads from one side's tensor to the other's."""
    with np.errstate(all="ignore"):
        if torch.shape == flax.shape and np.isfinite(torch).all() and np.isfinite(flax).all():
            for side, a, b in (("Flax", torch, flax), ("PyTorch", flax, torch)):
                one = match(a, b, Target(b, tolerance, limit_of(b, tolerance), True))
                if one and one.dropout:
                    chain = Chain("", dropout=one.dropout)
                    return _dropout((chain, None) if side == "PyTorch" else (None, chain), (None, None), train)
                if one and one.gain != 1:
                    return [_gain(*(Chain("", gain=one.gain if side == name else 1.0) for name in SIDES))]
        if sentence := relations.reordered(torch, flax, tolerance):
            if not sources or _merges(sources[0], torch):
                return [Finding("flatten-order", sentence)]
            return [Finding("unexplained", "Flax's values are PyTorch's in another order, and nothing is flattened")]
        if both := relations.activations_between(torch, flax, tolerance):
            texts = [_applied(Chain("", activation=name)) for name in both]
            evidence = f"PyTorch applies {texts[0]}, Flax {texts[1]} to the same values"
            return [Finding("activation", evidence, fix=activation_fix(*both))]
        return _some_function(sources, torch, flax)


def _merges(source: Source, value: Array) -> bool:
    """Whether axes of the source were merged into the last one of the value: else no order of theirs can be wrong."""
    u = source.value
    return 1 < value.ndim < u.ndim and value.shape[-1] > u.shape[-1]


def _some_function(sources: Sequence[Source], torch: Array, flax: Array) -> list[Finding]:
    """Functions of one thing, element by element, that are none of the known activations: told, and not accused."""
    if torch.shape != flax.shape:
        return []
    ends = Source("Flax's values", flax), Source("PyTorch's values", torch)
    for source in (*sources[:3], *ends):
        if all(is_function(source.value, side, torch - flax) for side in (torch, flax)):
            text = f"both sides are functions of {source.name}, element by element"
            return [Finding("unexplained", f"{text}, and not the same ones, nor two known activations")]
    return []


def _unexplained(chains: list[list[Chain]], sentence: str = "") -> Finding:
    if not sentence:
        texts = [
            f"{side} applies {c[0]}" if c else f"what {side} computes there is no known function of the layers before"
            for side, c in zip(SIDES, chains, strict=True)
        ]
        sentence = "; ".join(texts)
    return Finding("unexplained", sentence)
