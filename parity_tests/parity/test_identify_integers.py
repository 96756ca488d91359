"""Integers that arrive at an embedding: positions that are counted otherwise, and what is no position."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity
from parity.diagnosis.between.chains import Source
from parity.diagnosis.between.integers import findings

IDS = np.array([[5, 6, 7, 8, 9, 4], [5, 3, 1, 1, 1, 1], [1, 1, 1, 4, 2, 8]])
SHOWN = (IDS != 1).astype(np.int64)
PLAIN = np.broadcast_to(np.arange(6), IDS.shape)
COUNTED = np.cumsum(SHOWN, 1)
WAYS = {
    "as it stands": PLAIN,
    "from 2": PLAIN + 2,
    "RoBERTa's": COUNTED * SHOWN + 1,
    "GPT-2's in a batch": np.where(SHOWN == 1, COUNTED - 1, 1),
    "the last repeated": np.maximum(COUNTED, 1) - 1,
}


def codes(first, second, inputs):
    return [f.code for f in findings("wpe", first, second, inputs)]


@pytest.mark.parametrize("inputs", [[Source("input 1", IDS)], [Source("input 1", IDS), Source("input 2", SHOWN)]])
@pytest.mark.parametrize("one", WAYS)
@pytest.mark.parametrize("other", WAYS)
def test_positions(one, other, inputs):
    if one != other:
        assert codes(WAYS[one], WAYS[other], inputs) == ["position-ids"]
        assert codes(WAYS[one], WAYS[other], [])[0] == (
            "position-ids" if {one, other} <= {*list(WAYS)[:2]} else "unexplained"
        )


def test_what_the_sentence_says():
    (found,) = findings("wpe", WAYS["RoBERTa's"], WAYS["from 2"], [Source("input 1", IDS)])
    assert found.evidence == (
        "PyTorch counts places where input 1 is not 1 from 2 and has 1 elsewhere, Flax counts every place from 2"
    )
    (found,) = findings("wpe", np.arange(6), np.arange(1, 7), [])
    assert found.evidence == "PyTorch counts every place from 0, Flax counts every place from 1"


def test_what_is_no_position():
    """Words, words shifted by one, and numbers that go by two."""
    for wrong in (IDS, IDS + 1, 2 * PLAIN, PLAIN[:, ::-1]):
        assert codes(PLAIN, wrong, [Source("input 1", IDS)]) == ["unexplained"]
        assert codes(IDS, IDS + 1, [Source("input 1", IDS)]) == ["unexplained"]


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.fc = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x + self.table(torch.arange(4)))


class LinenPlaces(linen.Module):
    step: int = 1

    @linen.compact
    def __call__(self, x):
        return linen.Dense(2, name="fc")(x + linen.Embed(5, 3, name="table")(jnp.arange(4)[:: self.step]))


def test_a_table_that_is_given_other_numbers_is_not_accused_as_well():
    """As of the relative positions of T5 and Swin, with their sign exchanged."""
    x = np.random.default_rng(0).normal(size=(2, 4, 3))
    assert parity.check(Places(), LinenPlaces(), x, flax_inputs=[x]).ok
    report = parity.check(Places(), LinenPlaces(-1), x, flax_inputs=[x])
    assert [(d.code, d.layer) for d in report.diagnoses] == [("unexplained", "table")], report
    assert not any("same input" in text for text in (*report.notes, *(d.evidence for d in report.diagnoses))), report
