"""Both wings' programs for prediction: the module's numbers, in the same words; what is wrong in one line."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import image_data
import jax_bn.export
import jax_bn.predict
import torch_bn.predict
from bn_common import predictions
from bn_common.trained import read_trained
from image_data import FASHION_MNIST_CLASSES
from parity_tests.trained_runs import standardised, trained_run

WINGS = {"jax": jax_bn.predict, "torch": torch_bn.predict}
IMAGES = image_data.load_sample().test_images[:3]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {wing: trained_run(folder / wing, wing) for wing in WINGS}


@pytest.fixture
def files(tmp_path):
    found = [tmp_path / f"{number}.png" for number in range(len(IMAGES))]
    for path, image in zip(found, IMAGES, strict=True):
        Image.fromarray(image).save(path)
    return found


def started(wing, capsys, *args):
    """Exit status, standard output, standard error."""
    status = 0
    try:
        WINGS[wing].main([str(arg) for arg in args])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    return status, said.out, said.err


def module_probabilities(wing, run):
    x = standardised(IMAGES)
    if wing == "jax":
        model, variables = jax_bn.predict.network(read_trained(run, wing))
        logits = model.apply(jax.tree.map(jnp.asarray, variables), jnp.asarray(x), train=False)
    else:
        with torch.no_grad():
            logits = torch_bn.predict.network(read_trained(run, wing))(torch.from_numpy(np.moveaxis(x, -1, 1)))
    e = np.exp(np.asarray(logits, np.float64))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("wing", WINGS)
def test_json_has_the_modules_probabilities(wing, runs, files, capsys):
    status, said, errors = started(wing, capsys, runs[wing], *files, "--json")
    assert (status, errors) == (0, "")
    found = json.loads(said)
    assert [one["image"] for one in found] == [str(path) for path in files]
    wanted = module_probabilities(wing, runs[wing])
    for one, p in zip(found, wanted, strict=True):
        assert list(one["probabilities"]) == list(FASHION_MNIST_CLASSES)
        # Float32 logits, whichever program has computed them: their last digits.
        np.testing.assert_allclose(list(one["probabilities"].values()), p, rtol=2e-6)
        assert one["label"] == p.argmax()
        assert one["class"] == FASHION_MNIST_CLASSES[p.argmax()]
    assert np.ptp(wanted, axis=0).max() > 1e-4, "images that are all the same would say nothing"


@pytest.mark.parametrize("wing", WINGS)
def test_the_others_are_predicted_still(wing, runs, files, capsys, tmp_path):
    """A wrong file is a line, in the same words in both wings."""
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:200])
    Image.fromarray(IMAGES[0][:20]).save(tmp_path / "low.png")
    given = [tmp_path / "none.png", files[0], tmp_path / "cut.png", tmp_path / "low.png", files[1]]
    status, said, errors = started(wing, capsys, runs[wing], *given, "--json")
    assert status == 2
    assert [one["image"] for one in json.loads(said)] == [str(files[0]), str(files[1])]
    lines = errors.splitlines()
    assert all(line.startswith(f"python -m {wing}_bn.predict: error: image {tmp_path}/") for line in lines)
    assert [line.split("image ")[1].split("/")[-1].split(";")[0][:12] for line in lines] == [
        "none.png: No",
        "cut.png: dam",
        "low.png is 2",
    ]
    assert started(wing, capsys, runs[wing], given[0], "--json")[:2] == (2, "[]\n")
    assert started(wing, capsys, runs[wing], given[0])[:2] == (2, "")
    status, said, errors = started(wing, capsys, runs[wing], given[3], "--resize", "--invert", "--json")
    assert (status, errors) == (0, "")


def test_the_table(tmp_path):
    """The three most likely classes, likeliest first; a file's name is shown as it is."""
    p = np.full(10, 0.05)
    p[[3, 7]] = 0.4, 0.2
    found = [predictions.Prediction(tmp_path.relative_to(tmp_path) / "a[b]\x1b[2J\udcff☃.png", p)]
    console = Console(file=io.StringIO(), width=100)
    console.print(predictions.as_table(found, FASHION_MNIST_CLASSES))
    header, _, row, *_ = [line for line in console.file.getvalue().splitlines() if line.strip()]
    assert header.split() == ["image", "class", "or", "or"]
    assert row.split() == ["a[b]\\x1b[2J?☃.png", "Dress", "40.0%", "Sneaker", "20.0%", "T-shirt/top", "5.0%"]


def test_softmax():
    found = predictions.softmax(np.array([[1000.0, 1000.0, -1e30]], np.float32))
    np.testing.assert_array_equal(found, [[0.5, 0.5, 0.0]])


@pytest.mark.parametrize("wing", WINGS)
def test_classes_that_nobody_has_named(wing, tmp_path, files, capsys):
    """Another data set's: the labels' numbers."""
    run = trained_run(tmp_path / "run", wing, data="fashion-mnist", data_dir=tmp_path)
    (one,) = json.loads(started(wing, capsys, run, files[0], "--json")[1])
    assert list(one["probabilities"]) == [str(number) for number in range(10)]


def test_an_exported_file_in_place_of_a_run(runs, files, capsys, tmp_path):
    """The same numbers to the bit: it is the same function."""
    jax_bn.export.main([str(runs["jax"]), "--out", str(tmp_path / "net")])
    capsys.readouterr()
    a, b = (started("jax", capsys, of, *files, "--json") for of in (runs["jax"], tmp_path / "net"))
    assert a == b
    assert a[0] == 0


def test_refused_in_one_line(runs, files, capsys, tmp_path):
    def refused(wing, *args):
        status, said, errors = started(wing, capsys, *args)
        assert (status, said, errors.count("\n")) == (2, "", 1)
        return errors

    for wing, other in (("jax", "torch"), ("torch", "jax")):
        assert "which holds none; allowed: the folder" in refused(wing, tmp_path, files[0])
        assert "; allowed: one of " in refused(wing, runs[other], files[0])
        assert "IMAGES is empty; allowed: " in refused(wing, runs[wing])
    (tmp_path / "damaged").write_bytes(b"\0" * 1000)
    assert "damaged, which can't be read" in refused("jax", tmp_path / "damaged", files[0])
    other = jax.export.export(jax.jit(lambda x: x + 1))(jax.ShapeDtypeStruct((3,), jnp.float32))
    (tmp_path / "other").write_bytes(other.serialize())
    said = refused("jax", tmp_path / "other", files[0])
    assert "another function (float32[3] -> float32[3]); allowed: a file that python -m jax_bn.export" in said
