"""Dumps and lockstep of networks that are cut otherwise."""

import numpy as np
import pytest
import torch

import parity
from parity_tests.parity.test_recut_attention import FlaxNet, torch_net
from parity_tests.parity.test_recut_attention import X as TOKENS
from parity_tests.parity.test_recut_recurrent import pair as recurrent
from parity_tests.parity.test_recut_stack import LinenStack
from parity_tests.parity.test_recut_stack import X as ROWS
from parity_tests.parity.test_recut_stack import pair as stack


def compared(folder, mine, theirs, x):
    parity.dump(mine, [x], folder / "torch")
    parity.dump(theirs, [x], folder / "flax", weights=folder / "torch", flax_layout=True)
    return parity.compare(folder / "torch", folder / "flax")


def test_fused_attention(tmp_path):
    report = compared(tmp_path, torch_net("fused, key first"), FlaxNet("whole"), TOKENS)
    assert report.ok, str(report)
    assert any("query, key and value are cut from" in note for note in report.notes)


def test_a_scan_and_a_mistake_in_it(tmp_path):
    mine, theirs = stack("scan")
    assert compared(tmp_path, mine, theirs, ROWS).ok
    report = compared(tmp_path, mine, LinenStack(epsilon=1e-2), ROWS)
    assert {d.code for d in report.diagnoses} == {"epsilon"}, str(report)


def test_a_recurrent_network(tmp_path):
    torch.manual_seed(0)
    report = compared(tmp_path, *recurrent("LSTM"), np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32))
    assert report.ok, str(report)


def test_lockstep():
    labels = np.array([0, 1, 1, 0])
    assert parity.lockstep(*stack("scan"), [(ROWS, labels)], steps=2, dtype="float64").ok
    with pytest.raises(ValueError, match="two make two steps where one makes one"):
        parity.lockstep(*recurrent("LSTM"), [(np.zeros((4, 7, 5), np.float32), labels)], steps=1)
