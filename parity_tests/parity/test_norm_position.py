"""Pre-norm against post-norm: named where the sums are seen in the numbers, and nowhere else."""

import pytest

import parity
from parity_tests.parity.planted.positions import made


def check(first, second, count=2):
    planted = made(first, second, count)
    return parity.check(planted.torch_module, planted.flax_module, *planted.inputs, **planted.options)


@pytest.mark.parametrize("where", ["before", "behind", "inside"])
def test_the_same_position_is_silence(where):
    assert check(where, where).ok


@pytest.mark.parametrize("first", ["before", "behind"])
@pytest.mark.parametrize("second", ["inside", "half"])
@pytest.mark.parametrize("swap", [False, True], ids=["flax", "torch"])
def test_what_is_no_other_position(first, second, swap):
    """The norm inside the branch, and half of the branch in the sum."""
    report = check(*((second, first) if swap else (first, second)), count=1)
    assert not report.ok
    assert "norm-position" not in [d.code for d in report.diagnoses]


def test_every_block_is_told_and_nothing_that_follows():
    report = check("before", "behind")
    assert [(d.code, d.layer) for d in report.diagnoses] == [
        ("norm-position", "blocks.0.norm"), ("norm-position", "blocks.1.norm")
    ]  # fmt: skip
