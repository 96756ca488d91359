"""Every option of the configuration does something, in both training loops."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

import image_data
import jax_bn.training
import torch_bn.training
from bn_common import run_folder
from bn_common.config import Config
from bn_common.run_folder import RunFolder

LOOPS = {"jax": jax_bn.training.train, "torch": torch_bn.training.train}
OTHER = {
    "batch_size": 16,
    "optimizer": "adam",
    "lr": 0.002,
    "weight_decay": 0.1,
    "label_smoothing": 0.3,
    "schedule": "constant",
    "warmup_epochs": 0.5,
    "seed": 1,
    "bn_momentum": 0.5,
    "bn_eps": 0.1,
    "precision": "bfloat16",
}


def trained(loop, folder, **options):
    """The run of two epochs on 64 images of 12x12."""
    sample = image_data.load_sample()
    cut = sample._replace(train_images=sample.train_images[:64, 8:20, 8:20], train_labels=sample.train_labels[:64])
    cut = cut._replace(test_images=sample.test_images[:100, 8:20, 8:20], test_labels=sample.test_labels[:100])
    defaults = {"epochs": 2, "batch_size": 8, "optimizer": "adamw", "lr": 0.001, "devices": 1, "out": folder}
    config = Config(**defaults | options).resolved()
    run = RunFolder(config, loop, {"data": "cut"}, Console(file=io.StringIO()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))  # optax relies on it
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        LOOPS[loop](config, cut, run)
    return run


def trained_weights(loop, folder, **options):
    """The weights after such a run."""
    trained(loop, folder, **options)
    tensors = safetensors.numpy.load_file(folder / "weights.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


@pytest.mark.thorough
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("quickly_compiled")
def test_every_option_counts(loop, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: b"")  # seen elsewhere; ten times half a second here
    base, again = (trained_weights(loop, tmp_path / name) for name in ("base", "again"))
    np.testing.assert_array_equal(base, again)
    found = {"base": base}
    for name, value in OTHER.items():
        # BLeNet's form for CPUs, of batches of 16 and more, compiles for longer: where its own options are concerned.
        like = "batch_size" if name.startswith("bn_") else "base"
        options = {"batch_size": OTHER["batch_size"]} if like == "batch_size" else {}
        found[name] = trained_weights(loop, tmp_path / name, **options, **{name: value})
        assert (found[name] != found[like]).any(), name


CASES = [
    ("jax", 1e-9, 1, " reached after 1 epochs"),
    ("torch", 1e-9, 1, " reached after 1"),
    ("torch", 1.0, 2, "not reached"),
]


@pytest.mark.parametrize(("loop", "accuracy", "epochs", "said"), CASES)
def test_until_accuracy(loop, accuracy, epochs, said, tmp_path):
    """A run ends with the epoch that reaches it, whole; one that does not reach it has all epochs. Both say so."""
    run = trained(loop, tmp_path / "run", until_accuracy=accuracy)
    assert len(run.metrics) == epochs
    assert (tmp_path / "run" / "curves.png").stat().st_size > 0
    assert said in run.console.file.getvalue()


def test_profile(tmp_path, monkeypatch):
    """The trace can be read, and holds the steps by number: 2 epochs of 8, all of which are of a short run."""
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: b"")
    trained("jax", tmp_path / "jax", profile=True)
    (trace,) = (tmp_path / "jax" / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(trace))
    events = [event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train"]
    assert sorted(dict(event.stats)["step_num"] for event in events) == list(range(16))
    trained("torch", tmp_path / "torch", profile=True)
    (trace,) = (tmp_path / "torch" / "profile").glob("*.pt.trace.json")
    names = {
        event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("cat") == "user_annotation"
    }
    assert {f"train {step}" for step in range(16)} <= names
    for loop, kind in (
        ("jax", "*.xplane.pb"),
        ("torch", "*.pt.trace.json"),
    ):  # runs that end before the last of the steps
        trained(loop, tmp_path / f"{loop} ended", profile=True, until_accuracy=1e-9, epochs=3)
        assert list((tmp_path / f"{loop} ended" / "profile").rglob(kind))
    trained("torch", tmp_path / "without")
    assert not (tmp_path / "without" / "profile").exists()
