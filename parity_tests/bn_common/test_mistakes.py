"""The confusion matrix and the sheet of the worst mistakes: of the run's own test set, in either wing."""

import io

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import image_data
import jax_bn.predict
import jax_bn.training
import torch_bn.predict
import torch_bn.training
from bn_common import mistakes
from bn_common.command_line import Program, _pictures
from bn_common.config import Config
from bn_common.record import identity_of
from bn_common.run_folder import RunFolder

WINGS = {"jax": (jax_bn.training, jax_bn.predict), "torch": (torch_bn.training, torch_bn.predict)}


def trained(wing, folder, monkeypatch, predicting):
    """A run of a few steps on the sample: what it printed, and the matrix and the images that were drawn."""
    sample = image_data.load_sample()
    few = sample._replace(train_images=sample.train_images[:640], train_labels=sample.train_labels[:640])
    drawn = []
    plot = mistakes.plot_confusion
    monkeypatch.setattr(
        mistakes, "plot_confusion", lambda counts, classes: drawn.append(counts) or plot(counts, classes)
    )
    run = RunFolder(
        Config(data="sample", epochs=1, out=folder).resolved(), wing, {"data": "sample"}, Console(file=io.StringIO()),
        identity_of(few),
    )  # fmt: skip
    program = Program(WINGS[wing][0].train, predicting=predicting)
    run.pictures = lambda: _pictures(program, few, run.path, wing)
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it
        program.train(run.config, few, run)
    return run, few, drawn


@pytest.mark.parametrize("wing", WINGS)
def test_of_a_run(wing, tmp_path, monkeypatch):
    run, data, drawn = trained(wing, tmp_path / "run", monkeypatch, WINGS[wing][1].of_run)
    (counts,) = drawn
    np.testing.assert_array_equal(counts.sum(1), np.bincount(data.test_labels, minlength=10))
    # A prediction whose two largest logits are an ulp apart may fall either way.
    assert abs(np.trace(counts) / len(data.test_labels) - run.metrics[-1]["test_accuracy"]) <= 0.002
    for name in "confusion.png", "mistakes.png":
        picture = np.asarray(Image.open(tmp_path / "run" / name).convert("L"))
        assert picture.std() > 10
    said = run.console.file.getvalue().splitlines()
    assert said[-2].startswith("confusion.png, mistakes.png: most often ")
    assert said[-1] == f"run folder: {run.path}"


def test_a_picture_that_fails_ends_no_run(tmp_path, monkeypatch):
    def fails(run):
        raise RuntimeError("no such font")

    run, _, drawn = trained("torch", tmp_path / "run", monkeypatch, fails)
    said = run.console.file.getvalue()
    assert "Notice: confusion.png and mistakes.png are not drawn: no such font" in said
    assert drawn == []
    assert not (tmp_path / "run" / "confusion.png").exists()
    assert (tmp_path / "run" / "curves.png").exists()


def test_the_matrix_and_its_words():
    labels, taken = np.array([0, 0, 0, 1, 2]), np.array([0, 2, 2, 1, 1])
    counts = mistakes.confusion(labels, taken, 3)
    assert counts.tolist() == [[1, 0, 2], [0, 1, 0], [0, 1, 0]]
    assert mistakes.commonest(counts, "abc") == "most often c for a, 2 of 3"
    assert mistakes.commonest(np.eye(3, dtype=np.int64), "abc") == "no mistake"
    axes = mistakes.plot_confusion(counts, "abc").axes[0]
    assert [text.get_text() for text in axes.texts] == [str(count) for count in counts.flat]
    assert axes.get_title() == "2 of 5 right, 40.00%"


def test_the_worst_first():
    probabilities = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    labels = np.array([1, 1, 1, 0])
    assert mistakes.worst(labels, probabilities).tolist() == [1, 0]
    images = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((1, 12, 12), np.uint8)
    figure = mistakes.plot_mistakes(images, labels, probabilities, "ab")
    shown = [axes for axes in figure.axes if axes.images]
    assert [int(axes.images[0].get_array()[0, 0]) for axes in shown] == [1, 0]
    assert shown[0].get_title() == "b 10.0%\ntaken for a 90.0%"
