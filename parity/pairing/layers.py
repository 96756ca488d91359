"""Which layer is which on the other side: by order, kind and shapes, or by the user's map."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from parity.pairing import rules
from parity.pairing.agreement import AGREES, closest
from parity.pairing.alignment import LEFT, LIKE_KIND, SAME_KIND, Alignment, in_order, shapes_of
from parity.pairing.names import similarity
from parity.pairing.pairs import LayerPair, Pairing
from parity.pairing.recut import cut
from parity.pairing.recut.cut import Recut
from parity.pairing.recut.propose import candidates, folded_in_prediction
from parity.pairing.unordered import ByNames
from parity.records import kinds
from parity.records.distance import error_of
from parity.records.recording import Layer, Recording
from parity.records.structure import Structure, of_recording

# What it costs a pair in the alignment by order that its shapes differ.
MISFIT = -2.0


MOST_CUTS = 32
"""How many ways to cut the layers are tried."""


def pair(
    torch: Structure,
    flax: Structure,
    layer_map: Mapping[str, str] | None = None,
    distance: Callable[[Pairing], float] | None = None,
    *,
    train: bool = False,
) -> Pairing:
    """Which layer and which tensor is which on the other side; of layers that are cut otherwise there, which part.

    Layers are cut only where tensors are without partner as they are, and where all that is cut has one then. Which
    cut it is, the numbers say: the first with which both networks agree.

    Args:
      torch: PyTorch's layers, in the order of execution where it is known.
      flax: Flax's, likewise; where their order means nothing, their names decide.
      layer_map: {PyTorch's dotted name: Flax's path} of layers that are paired otherwise than by themselves.
      distance: how far apart both networks are with the weights carried so. None: no numbers are known, and only what
        is certain without is cut.
      train: of two networks in training, where no batch norm is folded into the layer before it.

    Raises:
      ValueError: a name in the map that is no layer; layers that only an order could tell apart, and there is none.
    """
    plain = pair_as_they_are(torch, flax, layer_map)
    least = unpaired(plain)
    if not least:
        return plain
    if train:
        plain.told += folded_in_prediction(torch, flax)
    possible = list(_possible(torch, flax, dict(layer_map or {}), least, train=train))
    fewest = min((unpaired(found) for found in possible), default=0)
    possible = [found for found in possible if unpaired(found) == fewest]
    if not possible:
        return plain
    if distance is None:
        certain = (found for found in possible if all(recut.is_certain for recut in found.recuts))
        plain.hint = f"it may be that {'; '.join(possible[0].notes())}; allowed: both modules, whose numbers show it"
        return next(certain, plain)
    chosen = closest(possible, distance)
    if chosen is None:
        # A guess takes nobody's partner away.
        had = _whole(plain)
        chosen = next((found for found in possible if had <= _whole(found) | _replaced(found.recuts)), plain)
        chosen.is_guessed = not all(recut.is_certain for recut in chosen.recuts)
    return chosen


def pair_begun(
    torch: Structure,
    flax: Structure,
    layer_map: Mapping[str, str] | None = None,
    distance: Callable[[Pairing], float] | None = None,
    *,
    train: bool = False,
) -> Pairing:
    """Likewise where only Flax's first layers are known: with as many of PyTorch's first ones as leave least over.

    What comes behind these has no partner that is known; nothing is said of it.
    """
    count, known = len(flax.layers), dict(layer_map or {})

    def found(first: int) -> Pairing:
        layers = torch.layers[:first]
        paths = {x.path for x in layers}, {x.path for x in flax.layers}
        mine = {t: f for t, f in known.items() if t in paths[0] and f in paths[1]}
        return pair(replace(torch, layers=layers), flax, mine, distance, train=train)

    sizes = sorted(range(len(torch.layers) + 1), key=lambda first: abs(first - count))[:MOST_CUTS]
    return min(map(found, sizes), key=unpaired)


def _possible(
    torch: Structure, flax: Structure, layer_map: dict[str, str], least: int, *, train: bool
) -> Iterator[Pairing]:
    """The pairings in which all that is cut has its partner, and less is left than without cuts."""
    for recuts in itertools.islice(candidates(torch, flax, train=train), MOST_CUTS):
        replaced = _replaced(recuts)
        if replaced & {place for t, f in layer_map.items() for place in (("torch", t), ("flax", f))}:
            continue
        mine = cut.structure(torch, cut.of_side(recuts, "torch")), cut.structure(flax, cut.of_side(recuts, "flax"))
        known = layer_map | {t: f for recut in recuts for t, f in recut.partners.items()}
        found = pair_as_they_are(*mine, known)
        found.recuts = recuts
        new = {(recut.framework, layer.path) for recut in recuts for layer in recut.layers} - replaced
        if unpaired(found) < least and new <= _whole(found):
            yield found


def _replaced(recuts: Sequence[Recut]) -> set[tuple[str, str]]:
    """(framework, path) of the layers that are cut: both sides may have a layer of one name."""
    return {(recut.framework, path) for recut in recuts for path in recut.replaced}


def _whole(found: Pairing) -> set[tuple[str, str]]:
    """(framework, path) of the layers all of whose tensors have a partner of their shape."""
    pairs = [p for p in found.layers if not p.torch_left and not p.flax_left and all(t.fits for t in p.tensors)]
    return {place for p in pairs for place in (("torch", p.torch.path), ("flax", p.flax.path))}


def unpaired(found: Pairing) -> int:
    """How many tensors have no partner, or one of another shape."""
    left = found.left()
    return sum(not t.fits for pair in found.layers for t in pair.tensors) + len(left[0]) + len(left[1])


def pair_as_they_are(
    torch: Structure,
    flax: Structure,
    layer_map: Mapping[str, str] | None = None,
) -> Pairing:
    """Which layer and which tensor is which, no layer cut.

    What fits in its kind and shapes is aligned by names, feeders and order (see `parity.pairing.alignment`); then what
    does not fit but stands in the same place, as where a mistake has changed a shape; tensors that are left are paired
    one by one, by name and shape.

    Args:
      torch: PyTorch's layers, in the order of execution where it is known.
      flax: Flax's, likewise; where their order means nothing, their names decide.
      layer_map: {PyTorch's dotted name: Flax's path} of layers that are paired otherwise than by themselves.

    Raises:
      ValueError: a name in the map that is no layer, or one of Flax's twice;
        layers that only an order could tell apart, and there is none.
    """
    known = dict(layer_map or {})
    _check_map(known, torch, flax)
    # Constants pair among themselves.
    ts = [x for x in torch.layers if x.is_constant and x.path not in known]
    fs = [x for x in flax.layers if x.is_constant and x.path not in known.values()]
    torch, flax = _without(torch, ts), _without(flax, fs)
    alignment = (Alignment if flax.ordered else ByNames)(torch, flax, known)
    found = alignment.run()
    by_path = {layer.path: layer for layer in flax.layers}
    pairs = [_pair(t, by_path[found[t.path]], torch, flax) for t in torch.layers if t.path in found]
    for called in True, False:
        taken = {p.flax.path for p in pairs}
        a = [x for x in torch.layers if x.is_called == called and x.path not in found]
        b = [x for x in flax.layers if x.is_called == called and x.path not in taken]
        pairs += _misfits(a, b, torch, flax)
    order = {layer.path: i for i, layer in enumerate(torch.layers)}
    pairs.sort(key=lambda pair: order[pair.torch.path])
    paired = {p.torch.path for p in pairs}, {p.flax.path for p in pairs}
    pairing = Pairing(
        pairs,
        [x for x in torch.layers if x.path not in paired[0]],
        [x for x in flax.layers if x.path not in paired[1]],
        shapes=(torch.shapes, flax.shapes),
        by_order=alignment.by_order(),
    )
    _pair_loose(pairing, (torch.shapes, flax.shapes))
    _complete(pairing, torch, flax)
    _leave_frozen_tables(pairing)
    _pair_constants(pairing, ts, fs, torch, flax)
    _pair_buffers(pairing)
    return pairing


def _without(structure: Structure, left: Sequence[Layer]) -> Structure:
    return replace(structure, layers=[x for x in structure.layers if x not in left])


def _pair_constants(
    pairing: Pairing, ts: Sequence[Layer], fs: Sequence[Layer], torch: Structure, flax: Structure
) -> None:
    """Layers of buffers alone, each with the first of the other side that has the same, by names and shapes."""
    free = [*fs]
    for t in ts:
        both = [(f, _pair(t, f, torch, flax)) for f in free]
        fitting = [(f, p) for f, p in both if not p.torch_left and not p.flax_left and all(x.fits for x in p.tensors)]
        if not fitting:
            pairing.torch_alone.append(t)
            continue
        f, pair = max(fitting, key=lambda found: similarity(t.path, found[0].path))
        free.remove(f)
        pairing.layers.append(pair)
    pairing.flax_alone += free


def _pair_buffers(pairing: Pairing) -> None:
    """PyTorch's buffers with what is a parameter in Flax, and has their name and shape, as Marian's bias of the end."""
    shapes = pairing.shapes
    for layer in pairing.torch_alone:
        for local, t in layer.tensors.items() if layer.is_constant else ():
            alike = [f for f in pairing.left()[1] if f.startswith("params/") and f.rpartition("/")[2] == local]
            alike = [f for f in alike if shapes[0][t] == shapes[1][f]]
            if alike:
                f = max(alike, key=lambda name: similarity(t, name))
                made = rules.pair_tensors(kinds.OTHER, {local: shapes[0][t]}, {local: shapes[1][f]})
                pairing.loose.append((t, f, made.pairs[0]))


def _leave_frozen_tables(pairing: Pairing) -> None:
    """Tables that PyTorch keeps in a parameter and does not train, as of sinusoids, the other side has in its code."""
    left = set(pairing.left()[0])
    layers = [*(p.torch for p in pairing.layers), *pairing.torch_alone]
    pairing.constants = [x.tensors[n] for x in layers for n in x.frozen_tables if x.tensors.get(n) in left]
    for pair in pairing.layers:
        pair.torch_left = [n for n in pair.torch_left if pair.torch.tensors[n] not in pairing.constants]


def _check_map(layer_map: Mapping[str, str], torch: Structure, flax: Structure) -> None:
    paths = [layer.path for layer in torch.layers], [layer.path for layer in flax.layers]
    problems = [f"{t!r} (PyTorch)" for t in layer_map if t not in paths[0]]
    problems += [f"{f!r} (Flax)" for f in layer_map.values() if f not in paths[1]]
    if problems:
        raise ValueError(
            f"layer_map names {', '.join(problems)}; allowed: {', '.join(map(repr, paths[0]))} "
            f"to {', '.join(map(repr, paths[1]))}"
        )
    senders = {f: [t for t, target in layer_map.items() if target == f] for f in layer_map.values()}
    several = [f"{' and '.join(map(repr, ts))} to {f!r}" for f, ts in senders.items() if len(ts) > 1]
    if several:
        raise ValueError(f"layer_map sends {', '.join(several)}; allowed: each of Flax's layers once")


def _pair(t: Layer, f: Layer, torch: Structure, flax: Structure) -> LayerPair:
    found = rules.pair_tensors(
        kinds.common(t.kind, f.kind), shapes_of(t, torch), shapes_of(f, flax), {**t.config, **f.config}
    )
    return LayerPair(t, f, list(found.pairs), list(found.torch_left), list(found.flax_left))


def _misfits(ts: Sequence[Layer], fs: Sequence[Layer], torch: Structure, flax: Structure) -> list[LayerPair]:
    """Layers of known and like kinds whose shapes differ, in their common order."""
    worth = np.full((len(ts), len(fs)), -np.inf)
    for i, t in enumerate(ts):
        for j, f in enumerate(fs):
            if kinds.OTHER not in (t.kind, f.kind) and kinds.like(t.kind, f.kind):
                pair = _pair(t, f, torch, flax)
                worth[i, j] = (SAME_KIND if t.kind == f.kind else LIKE_KIND) + MISFIT
                worth[i, j] += LEFT * (len(pair.torch_left) + len(pair.flax_left)) + similarity(t.path, f.path) / 10
    return [_pair(ts[i], fs[j], torch, flax) for i, j in in_order(worth)]


def _owners(layers: Sequence[Layer]) -> dict[str, Layer]:
    return {full: layer for layer in layers for full in layer.tensors.values()}


def _may_be_same(t: str, f: str, torch_owner: Mapping[str, Layer], flax_owner: Mapping[str, Layer]) -> bool:
    """Whether two tensors of layers that are no pair may be the same: of like kinds, and not a scale and a shift."""
    names = t.rpartition(".")[2], f.rpartition("/")[2]
    is_shift = [kinds.SHIFT.fullmatch(name) is not None for name in names]
    is_scale = [kinds.SCALE.fullmatch(name) or kinds.WEIGHT.fullmatch(name) for name in names]
    crossed = (is_shift[0] and is_scale[1]) or (is_scale[0] and is_shift[1])
    locals_ = {full: local for local, full in torch_owner[t].tensors.items()}
    made_of = locals_[t].startswith(kinds.MADE_OF)
    return not crossed and not made_of and kinds.like(torch_owner[t].kind, flax_owner[f].kind)


def _pair_loose(pairing: Pairing, shapes) -> None:
    torch, flax = pairing.left()
    torch_owner = _owners([*(p.torch for p in pairing.layers), *pairing.torch_alone])
    flax_owner = _owners([*(p.flax for p in pairing.layers), *pairing.flax_alone])
    for by_shape in (False, True):
        for t in list(torch):
            names = [f for f in flax if f.startswith("params/") or not by_shape]
            names = [f for f in names if _may_be_same(t, f, torch_owner, flax_owner)]
            found = rules.pair_tensors(
                kinds.OTHER,
                {t.rpartition(".")[2]: shapes[0][t]},
                {f: shapes[1][f] for f in names if by_shape or f.rpartition("/")[2] == t.rpartition(".")[2]},
            )
            fitting = [pair for pair in found.pairs if pair.fits]
            if fitting:
                pairing.loose.append((t, fitting[0].flax_name, fitting[0]))
                torch.remove(t)
                flax.remove(fitting[0].flax_name)


def pairing_of(
    torch: Recording,
    flax: Recording,
    layer_map: Mapping[str, str] | None = None,
    *,
    same_weights: bool = False,
    train: bool = False,
) -> Pairing:
    """Which layer of two recordings is which; `same_weights`: by these it is seen how layers are cut.

    Raises:
      ValueError: a name in layer_map that is no layer.
    """

    def distance(found: Pairing) -> float:
        moved = found.moved(cut.apart(torch.tensors, found.of_torch()))
        given = cut.apart(flax.tensors, found.of_flax())
        return float(np.mean([n not in given or error_of(given[n], a) > AGREES for n, a in moved.items()]))

    return pair(of_recording(torch), of_recording(flax), layer_map, distance if same_weights else None, train=train)


def _complete(found: Pairing, torch: Structure, flax: Structure) -> None:
    """Pair what is alone and stands in one place on both sides, though its shapes differ."""
    loose = {t for t, _, _ in found.loose}
    for t in list(found.torch_alone):
        if loose & set(t.tensors.values()):
            continue
        f = next((f for f in found.flax_alone if _in_one_place(t, f, found, torch, flax)), None)
        if f is not None:
            found.layers.append(_pair(t, f, torch, flax))
            found.torch_alone.remove(t)
            found.flax_alone.remove(f)


def _in_one_place(t: Layer, f: Layer, found: Pairing, torch: Structure, flax: Structure) -> bool:
    if not kinds.like(t.kind, f.kind) or _ranks(t, torch) != _ranks(f, flax):
        return False
    partner = {pair.torch.path: pair.flax.path for pair in found.layers}
    before = [partner[x.path] for x in torch.layers[: torch.layers.index(t)] if x.path in partner]
    place = [x.path for x in flax.layers[: flax.layers.index(f)] if x.path in partner.values()]
    return set(before) == set(place)


def _ranks(layer: Layer, structure: Structure) -> list[int]:
    return sorted(len(structure.shapes[full]) for full in layer.tensors.values())
