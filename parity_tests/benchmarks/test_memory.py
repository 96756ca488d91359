"""Memory stays flat: what a run keeps does not grow with its steps or its checkpoints. Both wings.

Counted are arrays, Python's objects and its blocks of memory, which depend on no machine; the resident memory is what
`python -m benchmarks.memory` prints.
"""

import contextlib
import importlib

import jax
import pytest

import image_data
from benchmarks import memory
from bn_common import run_folder
from bn_common.config import Config


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """What a run holds after each of its epochs, of so many steps on images of 12x12."""
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: b"")

    def run(loop, epochs, steps, **options):
        sample, size = image_data.load_sample(), 8 * steps
        cut = sample._replace(train_images=sample.train_images[:size, 8:20, 8:20])
        cut = cut._replace(train_labels=sample.train_labels[:size])
        cut = cut._replace(test_images=sample.test_images[:100, 8:20, 8:20], test_labels=sample.test_labels[:100])
        config = Config(epochs=epochs, batch_size=8, devices=1, out=tmp_path / "run", **options).resolved()
        found = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.numpy_dtype_promotion("standard"))  # optax relies on it
            stack.enter_context(jax.numpy_rank_promotion("allow"))
            memory.train(loop, config, cut, found.append)
        assert [one.step for one in found] == [steps * epoch for epoch in range(1, epochs + 1)]
        return found

    return run


@pytest.mark.parametrize("loop", memory.LOOPS)
@pytest.mark.usefixtures("quickly_compiled")
def test_checkpoints_leave_nothing(loop, measured):
    """Of each step one. Orbax and pathlib know the last 32 names of a kind: then one goes with each that comes."""
    *_, warm, _, last = measured(loop, 7, 8, checkpoint_every=1)
    assert warm.step >= 32 + 8
    assert last.arrays == warm.arrays > 0
    # One object that is kept of each would be 16.
    assert last.objects - warm.objects < (last.step - warm.step) / 2


@pytest.mark.thorough
@pytest.mark.parametrize("loop", memory.LOOPS)
@pytest.mark.usefixtures("quickly_compiled")
def test_steps_leave_nothing(loop, measured, monkeypatch):
    """Nor a number, which is no object to Python's collector but a block. (Of a checkpoint TensorStore keeps some.)"""
    wing = importlib.import_module(f"{loop}_bn.checkpoint")
    monkeypatch.setattr(wing.Checkpoints, "save", lambda *_: None)
    *_, warm, last = measured(loop, 4, 600)
    assert last.arrays == warm.arrays > 0
    # An epoch's line of the metrics and what Python holds ready for the next objects are some hundred blocks at first;
    # a number that is kept of each step would be 600.
    assert last.blocks - warm.blocks < (last.step - warm.step) / 2
