"""A run as one file: what a program without this project predicts with it is what the module predicts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

import image_data
import jax_bn
from bn_common.trained import FASHION_MNIST, read_trained
from jax_bn import blenet_cpu, export
from parity_tests.trained_runs import standardised, trained_run

ROOT = Path(__file__).parents[2]
SIZES = 1, blenet_cpu.FEWEST_EXAMPLES - 1, blenet_cpu.FEWEST_EXAMPLES, 100
# What a stranger runs: no module of this project is to be found, nor Flax.
STRANGER = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
predict = jax.jit(jax.export.deserialize(bytearray(open("run.jaxexport", "rb").read())).call)
images = np.load("images.npy")
np.savez("logits.npz", *[np.asarray(predict(images[:n])) for n in map(int, sys.argv[1:])])
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("runs") / "run")


def check_no_paths(content):
    """Of the machine that wrote it, of this project or of a library: not one source file is named."""
    assert b"stablehlo" in content.lower(), "the file is not packed: names would be seen"
    here = [str(ROOT), str(Path(jax.__file__).parent), str(Path.home()), os.getcwd(), ".py", "site-packages"]
    assert [name for name in here if name.encode() in content] == []


def module_logits(folder, x, **options):
    """As the module has them, its variables being arguments."""
    variables = unflatten_dict(safetensors.numpy.load_file(folder / "weights.safetensors"), sep="/")
    model = jax_bn.BLeNet(**options)
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, jnp.asarray(x)))


def test_a_stranger_predicts_as_the_module(run, tmp_path):
    export.main([str(run), "--out", str(tmp_path / "run.jaxexport")])
    check_no_paths((tmp_path / "run.jaxexport").read_bytes())
    images = image_data.load_sample().test_images[: max(SIZES)]
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", STRANGER, *map(str, SIZES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    mine = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"} | {"flax"}
    assert not {name.split(".")[0] for name in done.stdout.split()} & mine
    with np.load(tmp_path / "logits.npz") as found:
        for n, logits in zip(SIZES, found.values(), strict=True):
            wanted = module_logits(run, standardised(images[:n]))
            assert (logits.shape, logits.dtype) == ((n, 10), np.float32)
            bound = np.finfo(np.float32).eps * np.abs(wanted).max()
            assert np.abs(logits - wanted).max() <= bound
            assert n == 1 or np.ptp(wanted, 0).min() > 1000 * bound, "logits that are all the same would say nothing"


def test_other_options_are_the_runs_own(tmp_path):
    """Epsilon and precision: neither is a weight."""
    folder = trained_run(tmp_path / "run", bn_eps=0.1, precision="bfloat16")
    images = image_data.load_sample().test_images[:20]
    found = np.asarray(jax.jit(export.predictor(read_trained(folder, "jax")))(jnp.asarray(images)))
    wanted = module_logits(folder, standardised(images), epsilon=0.1, dtype=jnp.bfloat16)
    # A bfloat16 in between may round the other way where programs are fused otherwise: by its last bit.
    assert np.abs(found - wanted).max() <= jnp.finfo(jnp.bfloat16).eps * np.abs(wanted).max()
    other = module_logits(folder, standardised(images), dtype=jnp.bfloat16)
    assert np.abs(found - other).max() > jnp.finfo(jnp.bfloat16).eps * np.abs(wanted).max()


def test_the_form_follows_the_platform_compiled_for(run, monkeypatch):
    """Not the host: this one or another, the file is the same. In it are three platforms."""
    here = export.exported(read_trained(run, "jax"))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.clear_caches()
    there = export.exported(read_trained(run, "jax"))
    found = [jax.export.deserialize(bytearray(content)) for content in (here, there)]
    assert here == there
    assert found[0].platforms == ("cpu", "cuda", "tpu")
    assert found[0].mlir_module().count("stablehlo.dot_general") > 3, "a CPU's form, beside the layers"
    assert str(found[0].in_avals) == "(ShapedArray(uint8[b,28,28]),)"
    assert found[0].fun_name == FASHION_MNIST


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        export.main([str(arg) for arg in args])
    said = capsys.readouterr()
    assert (stop.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    return said.err


def test_refused_in_one_line(run, tmp_path, capsys):
    new = tmp_path / "new.jaxexport"
    assert "holds none" in refused(capsys, tmp_path, "--out", new)
    assert "there already" in refused(capsys, run, "--out", run / "weights.safetensors")
    assert "folder is not there" in refused(capsys, run, "--out", tmp_path / "no" / "new")
    theirs = trained_run(tmp_path / "torch", "torch")
    assert "of python -m torch_bn.training; allowed: one of train_jax.py" in refused(capsys, theirs, "--out", new)
    for name, change in {
        "unfinished": lambda folder: (folder / "weights.safetensors").unlink(),
        "damaged": lambda folder: (folder / "weights.safetensors").write_bytes(b"\0" * 100),
        "other": lambda folder: safetensors.numpy.save_file({"w": np.zeros(2)}, folder / "weights.safetensors"),
        "old": lambda folder: (folder / "config.json").write_text(
            json.dumps({k: v for k, v in json.loads((run / "config.json").read_text()).items() if k != "pixel_mean"})
        ),
    }.items():
        folder = Path(shutil.copytree(run, tmp_path / name))
        change(folder)
        words = {
            "unfinished": "finished epoch",
            "damaged": "damaged",
            "other": "missing; allowed: (",
            "old": "pixel_mean",
        }
        assert words[name] in refused(capsys, folder, "--out", new)
    assert not new.exists()


def test_without_flatbuffers(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    assert "pip install 'blenet-parity[export]'" in refused(capsys, run, "--out", tmp_path / "new")
