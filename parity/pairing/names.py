"""What two names of layers say of each other, in PyTorch's, linen's and NNX's spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

# Words that mean the same in names of layers.
WORDS = {"bn": "norm", "batchnorm": "norm", "layernorm": "norm", "ln": "norm", "groupnorm": "norm", "dense": "linear"}
WORDS |= {"fc": "linear", "embed": "embedding", "emb": "embedding", "q": "query", "k": "key", "v": "value"}
WORDS |= {"wq": "query", "wk": "key", "wv": "value", "o": "out", "wo": "out", "output": "out"}

AUTOMATIC = re.compile(r"[A-Z]\w*_\d+")
"""A name that linen gives: the class, and a number that counts the order in which the layers are made."""


def words_of(path: str) -> list[str]:
    """The words and numbers of a path, in one spelling."""
    path = re.sub(r"(Batch|Layer|Group)Norm", "Norm", path)
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", path)
    return [WORDS.get(word.lower(), word.lower()) for word in found]


def similarity(torch_path: str, flax_path: str) -> float:
    """How much two names have in common, 0 to 1: mostly in words and numbers, then in letters."""
    a, b = words_of(torch_path), words_of(flax_path)
    by_words = SequenceMatcher(None, a, b, autojunk=False).ratio()
    return 0.8 * by_words + 0.2 * SequenceMatcher(None, "/".join(a), "/".join(b), autojunk=False).ratio()


class Name(NamedTuple):
    """What a path says: its words, and its numbers by what they count ("layer" in layer.3 or layers_3)."""

    words: frozenset[str]
    numbers: dict[str, int]


def read(path: str) -> Name:
    """A path as words and numbers. The number of a name that linen gave says no more than the order does."""
    words: set[str] = set()
    numbers: dict[str, int] = {}
    counted = ""
    for segment in re.split(r"[./]", path):
        is_automatic = AUTOMATIC.fullmatch(segment) is not None
        for word in words_of(segment):
            if not word.isdigit():
                counted = word.removesuffix("s")
                words.add(counted)
            elif not is_automatic:
                numbers.setdefault(counted, int(word))
                counted += " #"
    return Name(frozenset(words), numbers)


def alike(torch: Sequence[str], flax: Sequence[str]) -> list[list[float]]:
    """[torch][flax]: what the names of layers that look alike say for (> 0) and against (< 0) each pair.

    A word that both sides use counts 1 for two layers that have it, and 1 against a pair of which only one has it; what
    one side alone says counts nothing. Numbers count likewise, by their place among the numbers of that side: one may
    begin at 0 and the other at 1.
    """
    a, b = [read(path) for path in torch], [read(path) for path in flax]
    words = _every(name.words for name in a) & _every(name.words for name in b)
    counted = _every(name.numbers for name in a) & _every(name.numbers for name in b)
    places = [
        {what: sorted({name.numbers[what] for name in side if what in name.numbers}) for what in counted}
        for side in (a, b)
    ]
    # Of another count the places say nothing.
    counted = {what for what in counted if len(places[0][what]) == len(places[1][what])}

    def said(x: Name, y: Name) -> float:
        total = float(sum(1 if word in y.words else -1 for word in x.words & words))
        total -= len((y.words & words) - x.words)
        for what in counted & x.numbers.keys() & y.numbers.keys():
            same = places[0][what].index(x.numbers[what]) == places[1][what].index(y.numbers[what])
            total += 1 if same else -1
        return total

    return [[said(x, y) for y in b] for x in a]


def _every(sets: Iterable[Iterable[str]]) -> set[str]:
    return {item for each in sets for item in each}
