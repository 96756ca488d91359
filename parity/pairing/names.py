"""What two names of layers say of each other, in PyTorch's, linen's and NNX's spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Words that mean the same in names of layers.
WORDS = {"bn": "norm", "batchnorm": "norm", "layernorm": "norm", "ln": "norm", "groupnorm": "norm", "dense": "linear"}
WORDS |= {"fc": "linear", "embed": "embedding", "emb": "embedding", "q": "query", "k": "key", "v": "value"}
WORDS |= {"qproj": "query", "kproj": "key", "vproj": "value"}
WORDS |= {"wq": "query", "wk": "key", "wv": "value", "o": "out", "wo": "out", "output": "out"}

AUTOMATIC = re.compile(r"[A-Z]\w*_\d+")
"""A name that linen gives: the class, and a number that counts the order in which the layers are made."""


def words_of(path: str) -> list[str]:
    """The words and numbers of a path, in one spelling."""
    path = re.sub(r"(Batch|Layer|Group)Norm", "Norm", path)
    found = re.findall(r"\d+x\d+|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", path)  # 3x3 counts nothing
    return [WORDS.get(word.lower(), word.lower()) for word in found]


def similarity(torch_path: str, flax_path: str) -> float:
    """How much two names have in common, 0 to 1: mostly in words and numbers, then in letters."""
    a, b = words_of(_own(torch_path)), words_of(_own(flax_path))
    by_words = SequenceMatcher(None, a, b, autojunk=False).ratio()
    return 0.8 * by_words + 0.2 * SequenceMatcher(None, "/".join(a), "/".join(b), autojunk=False).ratio()


def _own(path: str) -> str:
    """A path without the class of an automatic name at its end, which the kind says already."""
    parent, _, last = path.rpartition("/")
    return f"{parent}/{last.rpartition('_')[2]}" if AUTOMATIC.fullmatch(last) else path


class Name(NamedTuple):
    """What a path says: its words, and its numbers by what they count ("layer" in layer.3 or layers_3)."""

    words: frozenset[str]
    numbers: dict[str, int]


def read(path: str) -> Name:
    """A path as words and numbers.

    A number counts every word of its segment, or of the one before if it stands alone. That of a name that linen gave
    says no more than the order does, and the class in it, at a path's end, no more than the kind.
    """
    words: set[str] = set()
    numbers: dict[str, int] = {}
    counted: list[str] = []
    segments = re.split(r"[./]", path)
    for place, segment in enumerate(segments):
        is_automatic = AUTOMATIC.fullmatch(segment) is not None
        if is_automatic and place == len(segments) - 1:
            continue
        if not segment.isdigit():
            counted = []
        for word in words_of(segment):
            if not word.isdigit():
                words.add(word.removesuffix("s"))
                counted = [w for w in counted if not w.endswith(" #")] + [word.removesuffix("s")]
            elif not is_automatic:
                for w in counted or [""]:
                    numbers.setdefault(w, int(word))
                counted = [f"{w} #" for w in counted]
    return Name(frozenset(words), numbers)


def alike(torch: Sequence[str], flax: Sequence[str], *, numbers: bool = True) -> list[list[float]]:
    """[torch][flax]: what the names of layers that look alike say for (> 0) and against (< 0) each pair.

    A word that both sides use counts 1 for two layers that have it, and 1 against a pair of which only one has it; what
    one side alone says counts nothing. Numbers count likewise, by their place among the numbers of that side: one may
    begin at 0 and the other at 1. Where a word counts one thing here and another there (the blocks, and the layers of a
    block), its numbers count nothing.

    Args:
      torch: PyTorch's paths, in the order of calls.
      flax: Flax's.
      numbers: False: only what the words say.
    """
    a, b = [read(path) for path in torch], [read(path) for path in flax]
    words = _every(name.words for name in a) & _every(name.words for name in b)
    first, second = _counts(a), _counts(b)

    def same(what: str) -> bool:
        here, there = first[what], second[what]
        if len(set(here)) != len(set(there)):
            return False
        return here == there or (here not in second.values() and there not in first.values())

    counted = {what for what in first.keys() & second.keys() if numbers and same(what)}
    places = [
        {what: sorted({name.numbers[what] for name in side if what in name.numbers}) for what in counted}
        for side in (a, b)
    ]

    def said(x: Name, y: Name) -> float:
        total = float(sum(1 if word in y.words else -1 for word in x.words & words))
        total -= len((y.words & words) - x.words)
        for what in counted & x.numbers.keys() & y.numbers.keys():
            same = places[0][what].index(x.numbers[what]) == places[1][what].index(y.numbers[what])
            total += 1 if same else -1
        return total

    return [[said(x, y) for y in b] for x in a]


def equal(torch: Sequence[str], flax: Sequence[str]) -> NDArray[np.bool_]:
    """[torch][flax]: which have one name, where all layers that look alike have; else nowhere.

    Names of numbers alone say the order only, as those that linen gives do.
    """
    a, b = ([words_of(path) for path in side] for side in (torch, flax))
    same = np.array([[x == y for y in b] for x in a], bool).reshape(len(a), len(b))
    alone = any(all(word.isdigit() for word in x) for x in a)
    automatic = any(AUTOMATIC.fullmatch(re.split(r"[./]", path)[-1]) for path in flax)
    whole = (same.sum(axis=0) == 1).all() and (same.sum(axis=1) == 1).all()
    return same if whole and not alone and not automatic else np.zeros_like(same)


def uncounted(path: str) -> str:
    """A path without the numbers that stand for themselves, as those of a list's layers do."""
    return ".".join("#" if segment.isdigit() else segment for segment in re.split(r"[./]", path))


def comes_first(a: str, b: str) -> bool | None:
    """Whether a's numbers come before b's, of two names that differ in numbers alone; None: they differ in more."""
    first, second = words_of(a), words_of(b)
    in_numbers = [(int(x), int(y)) for x, y in zip(first, second, strict=False) if x.isdigit() and y.isdigit()]
    in_words = [(x, y) for x, y in zip(first, second, strict=False) if not (x.isdigit() and y.isdigit())]
    if len(first) != len(second) or any(x != y for x, y in in_words):
        return None
    return next((x < y for x, y in in_numbers if x != y), None)


def _counts(side: Sequence[Name]) -> dict[str, list[int]]:
    """What is counted -> the place of each layer's number among them, in the order of calls."""
    found = {}
    for what in _every(name.numbers for name in side):
        numbers = [name.numbers[what] for name in side if what in name.numbers]
        found[what] = [sorted(set(numbers)).index(n) for n in numbers]
    return found


def _every(sets: Iterable[Iterable[str]]) -> set[str]:
    return {item for each in sets for item in each}
