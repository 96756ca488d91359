"""A row of a table that is not trained: by both sides, by one, each another, beside another mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import parity
from parity_tests.parity.planted.tables import PADDING, WORDS, LinenText, NnxTwo, TorchText, TorchTwo, made, words


def check(planted):
    return parity.check(planted.torch_module, planted.flax_module, *planted.inputs, **planted.options)


def named(report):
    """What is found; nothing is left unexplained beside it."""
    assert not [note for note in report.notes if note.startswith("besides")]
    return [(d.code, d.layer) for d in report.diagnoses]


@pytest.mark.parametrize("masked", ["behind", "within"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_row_that_neither_trains(masked, tied):
    """PyTorch in the layer, Flax in the layer or behind it; of a tied table the head trains it all the same."""
    torch.manual_seed(0)
    assert check(made(TorchText(PADDING, 1, tied), LinenText(masked, 1, tied))).ok


def test_a_row_that_neither_trains_in_nnx():
    torch.manual_seed(0)
    assert check(made(TorchTwo(PADDING), NnxTwo(True))).ok


def test_a_row_that_both_train_and_one_that_is_not_looked_up():
    torch.manual_seed(0)
    assert check(made(TorchTwo(None), NnxTwo(False))).ok
    assert check(made(TorchTwo(0), NnxTwo(False))).ok


def test_neither_trains_it_beside_another_mistake():
    """Which alone is told: where the row is left out, in the layer or behind it, is no difference."""
    torch.manual_seed(0)
    pair = made(TorchText(PADDING, 1), LinenText("behind", 1))
    pair.torch_module.blocks[0].norm.eps = 1e-2
    report = check(pair)
    assert named(report) == [("epsilon", "blocks.0.norm")], report.diagnoses


def test_it_is_found_beside_another_mistake():
    torch.manual_seed(0)
    pair = made(TorchText(PADDING, 1), LinenText("", 1))
    pair.torch_module.blocks[0].norm.eps = 1e-2
    report = check(pair)
    assert named(report) == [("epsilon", "blocks.0.norm"), ("padding-index", "words")], report.diagnoses


def test_each_side_leaves_out_another_row():
    torch.manual_seed(0)
    other = int(words()[0, 0])
    report = check(made(TorchText(other, 1), LinenText("behind", 1)))
    assert named(report) == [("padding-index", "words")] * 2
    evidence = " ".join(d.evidence for d in report.diagnoses)
    assert f"PyTorch does not train row {other} of words.weight" in evidence
    assert f"Flax does not train row {PADDING} of words/embedding" in evidence


def test_the_evidence_has_the_row_and_both_numbers():
    torch.manual_seed(0)
    pair = made(TorchTwo(PADDING), NnxTwo(False))
    steps = {"steps": 2, "optimizers": (lambda p: torch.optim.SGD(p, 0.1), optax.sgd(0.1))}
    report = check(pair._replace(options=pair.options | steps))
    assert named(report) == [("padding-index", "words")]
    evidence = report.diagnoses[0].evidence
    assert f"row {PADDING} of words.weight, which is looked up in 6 places" in evidence
    assert "is 0 in PyTorch, 0." in evidence
    assert report.first_divergence.phase == "backward"


class Frozen(NnxTwo):
    """No row is trained, or one half of the places."""

    def __init__(self, places):
        super().__init__(masked=False)
        self.places = places

    def __call__(self, ids):
        y = self.words(ids)
        if self.places:
            stop = (jnp.arange(ids.shape[1]) < 2)[None, :, None]
            return self.head(jnp.tanh(jnp.where(stop, jax.lax.stop_gradient(y), y)))
        return self.head(jnp.tanh(jax.lax.stop_gradient(y)))


@pytest.mark.parametrize("places", [False, True])
def test_other_gradients_that_are_left_out_are_no_row(places):
    torch.manual_seed(0)
    report = check(made(TorchTwo(None), Frozen(places)))
    assert not report.ok
    assert "padding-index" not in [d.code for d in report.diagnoses]


def test_a_table_of_which_one_row_alone_is_looked_up_is_no_row():
    """Not trained, it may be frozen as well."""
    torch.manual_seed(0)
    pair = made(TorchTwo(None), Frozen(False))
    report = check(pair._replace(inputs=(np.full((2, 3), WORDS - 1, np.int32),)))
    assert not report.ok
    assert "padding-index" not in [d.code for d in report.diagnoses]
