"""The run folder: nothing half written, nothing overwritten."""

import io
import json

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from bn_common import run_folder
from bn_common.config import Config
from bn_common.run_folder import RunFolder, Totals, write_whole


def open_run(path, **options):
    console = Console(file=io.StringIO(), width=40)
    return RunFolder(Config(out=path, **options), {"data": "sample", "notice": "a notice"}, console)


def log(run, epoch):
    train, test = Totals(50.0, 80.0, 100.0), Totals(6.0, 9.0, 10.0)
    run.log(epoch=epoch, step=7 * (epoch + 1), train=train, test=test, seconds=0.5, learning_rate=0.1)


def test_a_run(tmp_path):
    run = open_run(tmp_path / "a" / "b", epochs=12)
    log(run, 0)
    log(run, 1)
    run.save_weights({"w": np.arange(6.0).reshape(2, 3).T}, {"format": "flax"})
    run.finish()
    assert sorted(p.name for p in run.path.iterdir()) == [
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "weights.safetensors",
    ]
    config = json.loads((run.path / "config.json").read_text())
    assert config["epochs"] == 12
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
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"--out is .*; allowed: a folder that can be written"):
            open_run(path)


def test_new_folders_below_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = open_run(None), open_run(None)
    assert first.path != second.path
    assert first.path.parent.name == second.path.parent.name == "runs"


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


def test_loss_that_is_not_finite(tmp_path):
    run = open_run(tmp_path)
    run.check(0, Totals(1.0, 1.0, 1.0))
    for loss in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="in epoch 3"):
            run.check(2, Totals(loss, 1.0, 1.0))


def test_progress_bar_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    run = RunFolder(Config(out=tmp_path), {"data": "sample"}, console)
    with run.progress(3, 10) as advance:
        for _ in range(10):
            advance()
    assert "epoch 3/10" in console.file.getvalue()
    assert "10/10" in console.file.getvalue()
