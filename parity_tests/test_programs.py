"""The two training programs from outside, and what each package may import."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax.traverse_util import unflatten_dict

import image_data
import jax_bn
import torch_bn
from image_data.dataset import FILES
from parity_tests.faults import PROGRAMS, QUICKLY_COMPILED, small_folder

ROOT = Path(__file__).parents[1]


def run(program, *args, **environment):
    return subprocess.run(
        [sys.executable, *PROGRAMS[program], *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_on_the_sample(program, tmp_path):
    """Learns something, and leaves weights that predict as the last line says."""
    done = run(program, "--data", "sample", "--epochs", 2, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "Notice: this is the sample" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(line["data"] == "sample" and "sample" in line["notice"] for line in lines)
    assert lines[1]["test_accuracy"] > 0.75
    for line in lines:
        assert f"test accuracy {line['test_accuracy']:.4f}" in done.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["epochs"] == 2
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")

    tensors = safetensors.numpy.load_file(tmp_path / "run" / "weights.safetensors")
    sample = image_data.load_sample()
    mean, std = image_data.pixel_mean_and_std(sample.train_images)
    x = ((sample.test_images.astype(np.float32) - np.float32(mean)) / np.float32(std))[:, None]
    if program == "jax":
        variables = unflatten_dict(tensors, sep="/")
        logits = jax_bn.BLeNet().apply(variables, jnp.asarray(np.moveaxis(x, 1, -1)), train=False)
    else:
        model = torch_bn.BLeNet().eval()
        model.load_state_dict({name: torch.from_numpy(v) for name, v in tensors.items()})
        with torch.no_grad():
            logits = model(torch.from_numpy(x))
    accuracy = (np.asarray(logits).argmax(-1) == sample.test_labels).mean()
    # A prediction whose two largest logits are an ulp apart may fall either way.
    assert abs(accuracy - lines[1]["test_accuracy"]) <= 0.002


@pytest.mark.parametrize("program", PROGRAMS)
def test_any_folder_of_four_files(program, tmp_path):
    """And two such runs are the same bit for bit, of which one is asked to be."""
    folder, weights = small_folder(tmp_path / "data"), []
    for name, more in ("a", []), ("b", ["--deterministic"]):
        args = "--data-dir", folder, "--epochs", 2, "--batch-size", 50, "--out", tmp_path / name, *more
        done = run(program, *args, **QUICKLY_COMPILED)
        assert done.returncode == 0, done.stderr
        for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()):
            assert line["data"] == str(folder)
            assert "notice" not in line
        assert "Notice" not in done.stdout
        weights.append((tmp_path / name / "weights.safetensors").read_bytes())
    assert weights[0] == weights[-1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_refused_before_any_work(program, tmp_path):
    folder = small_folder(tmp_path / "data")
    image_data.write_idx(folder / FILES[3], np.full(50, 10, np.uint8))
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "metrics.jsonl").write_text("")
    cases = [
        (["--data-dir", folder], "label 10"),
        (["--data-dir", tmp_path / "nothing"], "no such folder"),
        (["--data", "sample", "--batch-size", 6001], "--batch-size is 6001; allowed: 2 to 6000"),
        (["--data", "sample", "--out", occupied], "another run"),
        (["--data", "sample", "--epochs", "0"], "--epochs is 0"),
        (["--data", "sample", "--epochs", "100000000"], "--epochs is 100000000; allowed: 1 to 23091222"),
    ]
    for args, words in cases if program == "jax" else cases[:1]:
        done = run(program, "--out", tmp_path / "run", *args)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the platform may be there")
@pytest.mark.parametrize("platform", ["tpu", "cuda", "nonsense"])
def test_a_platform_that_is_not_there(platform, tmp_path):
    done = run("jax", "--data", "sample", "--out", tmp_path / "run", JAX_PLATFORMS=platform)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"JAX_PLATFORMS is '{platform}'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_refused_where_there_is_only_ascii():
    """The same line: tyro draws another box then."""
    for args, words in (["--epochs", "x"], "'x'; allowed: --epochs INT"), (["--rounds", "3"], "--rounds, 3; allowed: "):
        errors = [run("jax", *args, PYTHONIOENCODING=encoding).stderr for encoding in ("ascii", "utf-8")]
        assert words in errors[0]
        assert errors[0] == errors[1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_that_diverges(program, tmp_path):
    """One line, exit status 1, and no NaN in any file, wherever it first appears."""
    folder = small_folder(tmp_path / "data")
    # Every step multiplies the weights by -1e12, and an epoch has two steps: infinite in the second.
    bad = ["--optimizer", "sgd", "--schedule", "constant", "--lr", 1e6, "--weight-decay", 1e6, "--warmup-epochs", 0]
    args = ["--data-dir", folder, "--batch-size", 100, "--epochs", 3, "--out", tmp_path / "run"]
    done = run(program, *args, *bad, **QUICKLY_COMPILED)
    assert done.returncode == 1
    assert "no longer finite in epoch" in done.stderr
    assert "step" in done.stderr
    if "the loss" in done.stderr:
        assert re.search("first in (Conv_|BatchNorm_|Dense_|conv|fc)", done.stderr)
    assert done.stderr.count("\n") == 1
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in metrics
    assert "Infinity" not in metrics
    written = tmp_path / "run" / "weights.safetensors"
    assert written.exists() == bool(metrics)
    if metrics:
        assert all(np.isfinite(v).all() for v in safetensors.numpy.load_file(written).values())


@pytest.mark.parametrize("program", PROGRAMS)
def test_interrupted(program, tmp_path):
    """Ctrl-C in the midst of an epoch: one line, exit status 130, the step is saved, and how to go on is said."""
    given = ["--data-dir", str(small_folder(tmp_path / "data")), "--batch-size", "50", "--epochs", "100000"]
    command = [sys.executable, *PROGRAMS[program], *given, "--out", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Whoever runs the tests in the background of a shell has them, and what they start, ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | QUICKLY_COMPILED, **pipes)
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch      2/100000"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.count("\n") == 1
    assert "interrupted" in errors
    step = int(re.search(r"holds the checkpoint of step (\d+); to go on: .* --resume --out ", errors)[1])
    assert (tmp_path / "run" / "checkpoints" / str(step) / "checkpoint.json").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
    assert (tmp_path / "run" / "weights.safetensors").exists()


FORBIDDEN = {
    "image_data": {"jax", "torch", "flax", "matplotlib", "rich", "tyro"},
    "bn_common": {"jax", "torch", "flax"},
    "jax_bn": {"torch", "torch_bn"},
    "torch_bn": {"jax", "jaxlib", "flax", "optax", "jax_bn"},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports(package):
    """A wing works where the other framework is not installed; image_data needs numpy only."""
    modules = [f"{package}.{p.stem}" for p in (ROOT / package).glob("*.py") if p.stem != "__init__"]
    code = f"import sys, {package}, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not FORBIDDEN[package] & set(done.stdout.split())


def test_the_wing_without_its_framework():
    """PyTorch is an extra: what to install, in the message."""
    code = "import sys; sys.modules['torch'] = None\nimport torch_bn"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    said = "ModuleNotFoundError: torch_bn needs PyTorch, which is not installed; allowed: pip install torch"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == said
    assert "During handling" not in done.stderr


@pytest.mark.parametrize(("program", "framework"), [("jax", "jax"), ("torch", "torch")])
def test_a_program_without_its_framework(program, framework, tmp_path):
    """One line with exit status 2, as whatever is refused before any work; whoever imports it first."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{framework!r}] = None\n")
    done = run(program, "--data", "sample", "--out", tmp_path / "run", PYTHONPATH=str(tmp_path))
    name = "train_jax.py" if program == "jax" else "python -m torch_bn.training"
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"{name}: error: ")
    assert done.stderr.endswith(f", which is not installed; allowed: pip install {framework}\n")
    assert not (tmp_path / "run").exists()
