"""A run as ONNX: what ONNX Runtime makes of the file, in a process without this project, is what both wings predict."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import image_data
import jax_bn.export
import jax_bn.predict
import torch_bn.export
import torch_bn.predict
from bn_common.trained import FASHION_MNIST, read_trained
from parity.comparison.bounds import FLOAT32_LOGITS
from parity.wings.carried import to_torch
from parity_tests.trained_runs import standardised, trained_run

ROOT = Path(__file__).parents[1]
WINGS = {"jax": jax_bn, "torch": torch_bn}
ASKED = {"jax": ["--format", "onnx"], "torch": []}
SIZES = 1, 2, 7
IMAGES = image_data.load_sample().test_images[: max(SIZES)]
# What a stranger runs: no module of this project is to be found, nor PyTorch or JAX.
STRANGER = """
import sys
import numpy as np, onnxruntime
network = onnxruntime.InferenceSession("run.onnx")
images = np.load("images.npy")
np.savez("logits.npz", *[network.run(None, {"images": images[:n]})[0] for n in map(int, sys.argv[1:])])
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {wing: trained_run(folder / wing, wing) for wing in WINGS}


@pytest.fixture(scope="module")
def files(runs, tmp_path_factory):
    """(wing, folded) -> the file."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for wing, run in runs.items():
        for fold in (False, True):
            found[wing, fold] = folder / f"{wing}{fold}.onnx"
            args = [str(run), "--out", str(found[wing, fold]), *ASKED[wing], *(["--fold"] if fold else [])]
            importlib.import_module(f"{wing}_bn.export").main(args)
    return found


def wings_logits(run, wing):
    """The logits of IMAGES by JAX's network, by PyTorch's, and by PyTorch's in float64: the truth."""
    read = read_trained(run, wing)
    carried = to_torch(read) if wing == "jax" else read
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(standardised(IMAGES), -1, 1)))
    model = torch_bn.predict.network(carried)
    with torch.no_grad():
        found = {"torch": model(x).numpy(), "truth": model.double()(x.double()).numpy()}
    if wing == "jax":
        model, variables = jax_bn.predict.network(read)
        found["jax"] = np.asarray(
            model.apply(jax.tree.map(jnp.asarray, variables), jnp.asarray(standardised(IMAGES)), train=False)
        )
    return found


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("fold", [False, True])
def test_onnx_runtime_predicts_as_the_wings(wing, fold, runs, files, tmp_path):
    """Within DESIGN's bound for float32 logits.

    One eps of the logits' size can't be held: programs that add up the 400 terms of a linear layer, or the 150 of a
    convolution, in another order are some eps apart in float32. Folding rounds each weight and bias once more, by half
    an eps of a term, as each product is rounded anyway. So both are held to what the wings are held to, against the
    float64 truth: no file is farther from it than 4 times the farther wing, or than 4 eps.
    """
    (tmp_path / "run.onnx").write_bytes(files[wing, fold].read_bytes())
    np.save(tmp_path / "images.npy", IMAGES)
    command = [sys.executable, "-c", STRANGER, *map(str, SIZES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    mine = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"} | {"torch", "jax"}
    assert not {name.split(".")[0] for name in done.stdout.split()} & mine
    wanted = wings_logits(runs[wing], wing)
    truth, size = wanted.pop("truth"), np.abs(wanted["torch"]).max()
    farthest = max(np.abs(logits - truth).max() for logits in wanted.values())
    with np.load(tmp_path / "logits.npz") as found:
        for n, logits in zip(SIZES, found.values(), strict=True):
            assert (logits.shape, logits.dtype) == ((n, 10), np.float32)
            for theirs in wanted.values():
                assert np.abs(logits - theirs[:n]).max() <= FLOAT32_LOGITS * size
            assert np.abs(logits - truth[:n]).max() <= 4 * max(farthest, np.finfo(np.float32).eps * size)
    assert np.ptp(truth, 0).min() > 1000 * FLOAT32_LOGITS * size, "logits that are all the same would say nothing"


@pytest.mark.parametrize("wing", WINGS)
def test_what_is_in_the_file(wing, files):
    """Four batch norms, or none when folded; one size of batch for any; a name that tells the classes; no paths."""
    for fold, norms in (False, 4), (True, 0):
        content = files[wing, fold].read_bytes()
        held = onnx.load_from_string(content)
        onnx.checker.check_model(held, full_check=True)
        kinds = [node.op_type for node in held.graph.node]
        assert kinds.count("BatchNormalization") == norms
        if fold:  # nor one written out
            assert not {"Sub", "Mul", "Div", "Sqrt"} & set(kinds)
        assert [one.version for one in held.opset_import if one.domain == ""] == [20]
        (images,), (logits,) = held.graph.input, held.graph.output
        shapes = [[d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in (images, logits)]
        assert shapes == [["b", 28, 28], ["b", 10]]
        assert held.graph.name == FASHION_MNIST
        here = [str(ROOT), str(Path(torch.__file__).parent), str(Path.home()), os.getcwd(), ".py", "site-packages"]
        assert [name for name in here if name.encode() in content] == []


def test_the_runs_own_epsilon(tmp_path):
    """Of a batch norm, folded or not; it is no weight."""
    for wing, fold in ("jax", ["--fold"]), ("torch", []):
        run, out = trained_run(tmp_path / wing, wing, bn_eps=0.1), tmp_path / f"{wing}.onnx"
        wanted = wings_logits(run, wing)["torch"]
        importlib.import_module(f"{wing}_bn.export").main([str(run), "--out", str(out), *ASKED[wing], *fold])
        found = onnxruntime.InferenceSession(out).run(None, {"images": IMAGES})[0]
        assert np.abs(found - wanted).max() <= FLOAT32_LOGITS * np.abs(wanted).max()


def predicted(wing, capsys, *args):
    """Exit status, standard output, standard error."""
    status = 0
    try:
        importlib.import_module(f"{wing}_bn.predict").main([str(arg) for arg in args])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize("wing", WINGS)
def test_predict_takes_the_file_in_place_of_a_run(wing, runs, files, tmp_path, capsys):
    """Either wing's program takes either wing's file; another file is one line."""
    image = tmp_path / "a.png"
    Image.fromarray(IMAGES[0]).save(image)
    for whose, run in runs.items():
        wanted = json.loads(predicted(whose, capsys, run, image, "--json")[1])
        status, said, errors = predicted(wing, capsys, files[whose, False], image, "--json")
        assert (status, errors) == (0, "")
        (found,), (one,) = json.loads(said), wanted
        assert found["class"] == one["class"]
        assert list(found["probabilities"]) == list(one["probabilities"])
        given, theirs = (np.array(list(each["probabilities"].values())) for each in (found, one))
        np.testing.assert_allclose(given, theirs, rtol=1e-5)
    (tmp_path / "damaged.onnx").write_bytes(b"\0" * 1000)
    x = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["b", 28, 28])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["images"], ["y"])], "g", [x], [
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, ["b", 28, 28])
    ])  # fmt: skip
    other = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
    for name, words in ("damaged", "which can't be read"), ("other", "another function"):
        status, said, errors = predicted(wing, capsys, tmp_path / f"{name}.onnx", image)
        assert (status, said, errors.count("\n")) == (2, "", 1)
        assert f"{name}.onnx, {words}" in errors


@pytest.mark.parametrize("wing", WINGS)
def test_refused_in_one_line(wing, runs, tmp_path, capsys, monkeypatch):
    export, new = importlib.import_module(f"{wing}_bn.export"), tmp_path / "new.onnx"

    def refused(*args):
        with pytest.raises(SystemExit) as stop:
            export.main([str(arg) for arg in args])
        said = capsys.readouterr()
        assert (stop.value.code, said.out, said.err.count("\n")) == (2, "", 1)
        return said.err

    args = runs[wing], "--out", new, *ASKED[wing]
    narrow = trained_run(tmp_path / "narrow", wing, precision="bfloat16")
    assert "precision is bfloat16; allowed: float32" in refused(narrow, *args[1:])
    assert "holds none" in refused(tmp_path, *args[1:])
    other = "torch" if wing == "jax" else "jax"
    assert "; allowed: one of " in refused(runs[other], *args[1:])
    if wing == "jax":
        assert "--fold is True; allowed: with --format onnx" in refused(*args[:3], "--fold")
        assert "onxx" in refused(*args[:3], "--format", "onxx")
    monkeypatch.setattr(export, "read_trained", lambda *_: pytest.fail("work had begun"))
    assert "there already" in refused(*args[:1], "--out", runs[wing] / "weights.safetensors", *args[3:])
    for name in ("onnx", "onnxscript"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            assert f"{name} is not installed; allowed: pip install 'blenet-parity[onnx]'" in refused(*args)
    assert not new.exists()


@pytest.mark.parametrize("wing", WINGS)
def test_without_onnxruntime(wing, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    status, said, errors = predicted(wing, capsys, files[wing, True], tmp_path / "a.png")
    assert (status, said, errors.count("\n")) == (2, "", 1)
    assert "onnxruntime is not installed; allowed: pip install 'blenet-parity[onnx]'" in errors
