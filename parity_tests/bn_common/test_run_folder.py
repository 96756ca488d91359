"""The run folder: nothing half written, nothing overwritten."""

import io
import json

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from bn_common import command_line, run_folder
from bn_common.config import Config
from bn_common.run_folder import RunFolder, Totals, write_whole


def open_run(path, **options):
    console = Console(file=io.StringIO(), width=40)
    return RunFolder(Config(out=path, **options), "jax", {"data": "sample", "notice": "a notice"}, console)


def end_epoch(run, epoch, *, train_loss=50.0, test_loss=6.0, weights=None):
    weights = {"w": np.arange(6.0).reshape(2, 3).T} if weights is None else weights
    train, test = Totals(train_loss, 80.0, 100.0), Totals(test_loss, 9.0, 10.0)
    step = 7 * (epoch + 1)
    times = {"start_time": 1.8e9 + epoch, "seconds": 0.5}
    run.end_epoch(epoch=epoch, step=step, train=train, test=test, **times, learning_rate=0.1, weights=weights)


def test_a_run(tmp_path):
    run = open_run(tmp_path / "a" / "b", epochs=12)
    end_epoch(run, 0)
    end_epoch(run, 1)
    run.finish()
    assert sorted(p.name for p in run.path.iterdir()) == [
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "weights.safetensors",
    ]
    config = json.loads((run.path / "config.json").read_text())
    assert config["epochs"] == 12
    assert config["framework"] == "jax"
    assert config["out"] == str(run.path)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "epoch": 2,
        "step": 14,
        "loss": 0.5,
        "train_accuracy": 0.8,
        "test_loss": 0.6,
        "test_accuracy": 0.9,
        "images_per_second": 200.0,
        "start_time": 1.8e9 + 1,
        "seconds": 0.5,
        "learning_rate": 0.1,
        "data": "sample",
        "notice": "a notice",
    }
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(run.path / "weights.safetensors")["w"], np.arange(6.0).reshape(2, 3).T
    )
    assert (run.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = run.console.file.getvalue().splitlines()
    assert printed[0] == "epoch  1/12  loss 0.5000  train accuracy 0.8000  test accuracy 0.9000  200 images/s"


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "weights.safetensors", "curves.png"])
def test_another_run_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("precious")
    (tmp_path / "notes.txt").write_text("other files do no harm")
    with pytest.raises(ValueError, match=f"holds {name} of another run; allowed"):
        open_run(tmp_path)
    assert (tmp_path / name).read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 2


def test_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("a" * 300)):
        with pytest.raises(ValueError, match=r"--out is .*; allowed: a folder that can be written"):
            open_run(path)


def test_new_folders_below_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = open_run(None), open_run(None)
    assert first.path != second.path
    assert first.path.parent.name == second.path.parent.name == "runs"
    assert first.path.name.startswith("jax-")


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_whole(path, b"first")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path, bad):
    """Neither a loss nor a weight; the epoch before stays as it was."""
    run = open_run(tmp_path)
    end_epoch(run, 0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for broken in ({"train_loss": bad}, {"test_loss": bad}, {"weights": {"a": np.ones(2), "b": np.array([0, bad])}}):
        with pytest.raises(FloatingPointError, match="no longer finite in epoch 2"):
            end_epoch(run, 1, **broken)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["a$\\foo$b", ":cat:", "[red]", "\udcff", "ünï"])
def test_names_are_only_names(tmp_path, name):
    """Neither the plot nor the screen sees mathematics, emojis, markup or broken text in a folder's name."""
    assert run_folder.draw_curves([], name).startswith(b"\x89PNG")
    run = open_run(tmp_path)
    run.say(f"run folder: {name}")
    assert run.console.file.getvalue() == f"run folder: {name}\n".encode(errors="replace").decode()


def test_refused_before_the_download(tmp_path, monkeypatch):
    """A slip in --out does not cost 30 MB."""
    monkeypatch.setattr(command_line, "load", lambda *_: pytest.fail("the data were asked for"))
    (tmp_path / "config.json").write_text("")
    with pytest.raises(SystemExit):
        command_line.read_config(["--out", str(tmp_path)], prog="", description="")


def test_progress_bar_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    run = RunFolder(Config(out=tmp_path), "jax", {"data": "sample"}, console)
    with run.progress(3, 10) as advance:
        for _ in range(10):
            advance()
    assert "epoch 3/10" in console.file.getvalue()
    assert "10/10" in console.file.getvalue()
