"""Pairs of models that are the same network, written as an ordinary user writes them, and weights carried by hand."""

from parity_tests.parity.zoo import classic, modern, others, resnet, twisted
from parity_tests.parity.zoo.pair import Pair, outputs, randomise

ZOO: list[Pair] = [*resnet.PAIRS, *classic.PAIRS, *modern.PAIRS, *others.PAIRS, *twisted.PAIRS]

__all__ = ["ZOO", "Pair", "outputs", "randomise"]
