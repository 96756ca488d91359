"""Causal convolutions: padded on both sides and cut, or padded in front; at the wrong end, or by SAME."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity
from parity.report.cards import EXAMPLE, cards

SERIES = np.random.default_rng(0).normal(size=(2, 4, 14)).astype(np.float32)
DILATIONS = {"a": 1, "b": 2}


class Torch(nn.Module):
    """Two causal convolutions of different dilation, maybe each with a branch around it, and the last step."""

    def __init__(self, *, last: bool = True, branch: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Conv1d(4, 4, 3, padding=2 * d, dilation=d) for d in DILATIONS.values())
        self.head, self.last, self.branch = nn.Linear(4, 2), last, branch

    def forward(self, x):
        for name, d in DILATIONS.items():
            y = getattr(self, name)(x)
            y = torch.tanh(y[..., : -2 * d] if self.last else y[..., 2 * d :])
            x = x + y if self.branch else y
        return self.head(x[..., -1])


class Flax(linen.Module):
    """The same; `padding` "both" pads as PyTorch's does, and cuts off the last, or the first."""

    padding: str = "CAUSAL"
    last: bool = True
    branch: bool = False

    @linen.compact
    def __call__(self, x):
        for name, d in DILATIONS.items():
            both = ((2 * d, 2 * d),) if self.padding == "both" else self.padding
            y = linen.Conv(4, (3,), padding=both, kernel_dilation=d, name=name)(x)
            if self.padding == "both":
                y = y[:, : -2 * d] if self.last else y[:, 2 * d :]
            x = x + jnp.tanh(y) if self.branch else jnp.tanh(y)
        return linen.Dense(2, name="head")(x[:, -1])


@pytest.mark.parametrize("padding", ["CAUSAL", "both"])
def test_the_right_end_is_no_mistake(padding):
    assert parity.check(Torch(branch=True), Flax(padding, branch=True), SERIES).ok


@pytest.mark.parametrize(
    ("torch_last", "padding", "flax_last", "told"),
    [
        (False, "CAUSAL", True, "of what it gives PyTorch leaves out the first 2, Flax none"),
        (True, "SAME", True, "PyTorch pads (2, 2), Flax SAME = (1, 1) at stride 1"),
        (True, "both", False, "of the positions of the output of a PyTorch leaves out the last 2, Flax the first 2"),
        pytest.param(
            *(
                False,
                "both",
                True,
                "of the positions of the output of a PyTorch leaves out the first 2, Flax the last 2",
            ),
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_the_wrong_end_is_one_mistake_of_padding(torch_last, padding, flax_last, told):
    # With a branch, a layer of another shape cannot be given the other side's input.
    branch = padding == "both"
    report = parity.check(Torch(last=torch_last, branch=branch), Flax(padding, flax_last, branch), SERIES)
    assert [d.code for d in report.diagnoses] == ["padding"], report
    (found,) = report.diagnoses
    assert found.layer == "a"
    assert told in found.evidence
    if padding != "both":
        assert found.layers == ["a", "b"]
        assert "likewise at b: PyTorch pads (4, 4)" in found.evidence


def test_what_to_write_keeps_the_function():
    """What is left of a padding that is cut off is what the other is to pad."""
    (card,) = cards(parity.check(Torch(), Flax("SAME"), SERIES))
    assert card.fix.flax[1] == "nn.Conv(4, (3,), padding=((2, 0),))"
    assert card.fix.torch[1] == "nn.Conv1d(4, 4, 3, padding=1)  # and nothing left out behind it"
    (card,) = cards(parity.check(Torch(branch=True), Flax("SAME", branch=True), SERIES))
    assert (card.code, card.advice) == ("padding", EXAMPLE)  # it stops there, and what is left out is not seen
    (card,) = cards(parity.check(Torch(), Flax("both", False), SERIES))
    assert card.fix == (("y[:, :, :-2]", "y[:, :, 2:]"), ("y[:, 2:]", "y[:, :-2]"))
