"""The run folder: nothing half written, nothing overwritten."""

import contextlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from bn_common import checkpoints, command_line, files, run_folder
from bn_common.config import Config
from bn_common.files import write_whole
from bn_common.run_folder import RunFolder, Totals
from bn_common.trained import read_trained


def open_run(path, **options):
    console = Console(file=io.StringIO(), width=40)
    return RunFolder(Config(out=path, **options).resolved(), "jax", {"data": "sample", "notice": "a notice"}, console)


def end_epoch(run, epoch, *, train_loss=50.0, test_loss=6.0, weights=None):
    weights = {"w": np.arange(6.0).reshape(2, 3).T} if weights is None else weights
    train, test = Totals(train_loss, 80.0, 100.0), Totals(test_loss, 9.0, 10.0)
    step = 7 * (epoch + 1)
    times = {"start_time": 1.8e9 + epoch, "seconds": 0.5}
    run.end_epoch(epoch=epoch, step=step, train=train, test=test, **times, learning_rate=0.1, weights=weights)


def test_curves_that_cannot_be_drawn_end_no_run(tmp_path, monkeypatch):
    """That is told, and all else is there; the same run again draws them."""
    run = open_run(tmp_path / "run", epochs=1)
    end_epoch(run, 0)

    def fails(metrics, data):
        raise RuntimeError("no such font")

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "draw_curves", fails)
        run.finish()
    said = run.console.file.getvalue().splitlines()
    assert "Notice: curves.png is not drawn: no such font" in said
    assert any(line.startswith("test accuracy 0.9000 after 1 epoch") for line in said)
    assert said[-1] == f"run folder: {run.path}"
    assert not (run.path / "curves.png").exists()
    assert (run.path / "weights.safetensors").exists()
    again = open_run(tmp_path / "run", epochs=1)
    again.finish()
    assert (run.path / "curves.png").exists()


def test_a_run(tmp_path):
    run = open_run(tmp_path / "a" / "b", epochs=12)
    end_epoch(run, 0)
    end_epoch(run, 1)
    run.finish()
    assert sorted(p.name for p in run.path.iterdir()) == [
        "config.json",
        "config.toml",
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
    assert printed[0] == "epoch  1/12  loss 0.5000  train 0.8000  test accuracy 0.9000  200 images/s"
    assert printed[-2] == "test accuracy 0.9000 after 2 epochs (best 0.9000, epoch 1), 0:00:01 of training"
    assert printed[-1] == f"run folder: {run.path}"


@pytest.mark.parametrize("name", ["config.json", "config.toml", "metrics.jsonl", "weights.safetensors", "curves.png"])
def test_another_run_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("precious")
    (tmp_path / "notes.txt").write_text("other files do no harm")
    with pytest.raises(ValueError, match=f"holds {name} of another run; allowed"):
        open_run(tmp_path)
    assert (tmp_path / name).read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_weights_tell_their_epoch(tmp_path):
    """In the same bytes each time: the library would write metadata in any order."""
    contents = set()
    for number in range(5):
        run = open_run(tmp_path / str(number))
        end_epoch(run, 0)
        path = run.path / "weights.safetensors"
        assert run_folder.weights_metadata(path) == {"epoch": "1", "step": "7"}
        assert list(safetensors.numpy.load_file(path)) == ["w"]
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_the_same_run_goes_on(tmp_path):
    run = open_run(tmp_path, epochs=3)
    end_epoch(run, 0)
    run.close()
    again = open_run(tmp_path, epochs=3, checkpoint_every=5)
    assert [line["epoch"] for line in again.metrics] == [1]
    end_epoch(again, 0, test_loss=5.0)  # once more: no second line
    end_epoch(again, 1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["test_loss"]) for line in lines] == [(1, 0.5), (2, 0.6)]


def test_a_run_from_before_an_option_goes_on(tmp_path):
    """config.json lacks an option that changes no number: it is the same run all the same."""
    run = open_run(tmp_path, epochs=3)
    end_epoch(run, 0)
    run.close()
    record = json.loads((tmp_path / "config.json").read_text())
    del record["tensorboard"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert [line["epoch"] for line in open_run(tmp_path, epochs=3).metrics] == [1]


OTHER = {"epochs": 11, "seed": 1, "bn_momentum": 0.8, "bn_eps": 1e-3, "optimizer": "sgd", "lr": 0.5}


@pytest.mark.parametrize("name", OTHER)
def test_another_run_does_not_go_on(tmp_path, name):
    open_run(tmp_path).close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is {OTHER[name]}; allowed: .*, as the run in"):
        open_run(tmp_path, **{name: OTHER[name]})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_data_or_another_network_does_not_go_on(tmp_path):
    def identity(**other):
        return {"network": "BLeNet", "fig_size": 28, "convention": {"unbiased": False}, "data_sha256": "a"} | other

    def opened(framework, **other):
        return RunFolder(Config(out=tmp_path), framework, {"data": "x"}, Console(file=io.StringIO()), identity(**other))

    opened("jax").close()
    opened("jax").close()
    for name, value in {"fig_size": 12, "convention": {"unbiased": True}, "data_sha256": "b"}.items():
        with pytest.raises(ValueError, match=f"the {name} is .*; allowed: "):
            opened("jax", **{name: value})
    with pytest.raises(ValueError, match="the framework is torch; allowed: jax"):
        opened("torch")


def test_one_process_at_a_time(tmp_path):
    run = open_run(tmp_path)
    with pytest.raises(ValueError, match="where another process is training; allowed: "):
        open_run(tmp_path)
    run.close()
    assert not (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text("left behind by a killed process")
    open_run(tmp_path).close()


def test_of_many_at_once_one_wins(tmp_path):
    def start(_):
        try:
            return open_run(tmp_path / "new")
        except ValueError as error:
            assert "another process is training" in str(error)  # noqa: PT017
            return None

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            winners = [run for run in pool.map(start, range(8)) if run]
        assert len(winners) == 1
        winners[0].close()


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_killed_between_two_files(tmp_path, monkeypatch, replaced):
    """Weights and metrics agree after the next start, wherever in their writing the process has ended."""
    run = open_run(tmp_path)
    end_epoch(run, 0)
    with monkeypatch.context() as patch:
        calls, replace = [], os.replace

        def killed(*names):
            if len(calls) == replaced:
                raise KeyboardInterrupt
            calls.append(replace(*names))

        patch.setattr(files.os, "replace", killed)
        patch.setattr(files.Path, "unlink", lambda *_, **__: None)  # a killed process tidies up nothing
        with pytest.raises(KeyboardInterrupt) if replaced < 2 else contextlib.nullcontext():
            end_epoch(run, 1)
    run.close()
    again = open_run(tmp_path)
    epochs = [line["epoch"] for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert epochs == [line["epoch"] for line in again.metrics] == [1, 2][: 1 + (replaced > 0)]
    assert run_folder.weights_metadata(tmp_path / "weights.safetensors")["epoch"] == str(epochs[-1])
    again.close()
    names = ["config.json", "config.toml", "metrics.jsonl", "weights.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


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


REFUSED = {
    "another run": (["--out", "other"], "holds metrics.jsonl of another run"),
    "other option": (["--out", "run", "--bn-momentum", "0.8"], "--bn-momentum is 0.8; allowed: 0.9, as the run in run"),
    "other option to resume": (["--resume", "--out", "run", "--seed", "2"], "--seed is 2; allowed: 1"),
    "other framework": (["--out", "of torch"], "the framework is jax; allowed: torch"),
    "nothing to resume": (["--resume", "--out", "new"], "holds no run; allowed with --resume"),
    "resume what": (["--resume"], "--out is missing; allowed with --resume"),
    "a file": (["--out", "file"], "--out is file: it is a file; allowed: "),
    "below a file": (["--out", "file/below"], "file is a file; allowed: "),
    "read-only": (["--out", "read-only/new"], "read-only can't be written; allowed: "),
    "long name": (["--out", "a" * 300], "File name too long; allowed: "),
    "under way": (["--out", "busy", "--seed", "1"], "another process is training"),
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The current one, with what the table above names."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "of torch", "busy"):
        config = Config(out=Path(name), seed=1).resolved()
        run = RunFolder(config, "torch" if "torch" in name else "jax", {"data": "x"}, Console(file=io.StringIO()))
        if name != "busy":
            run.close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "read-only").mkdir()
    # Root may write anywhere but where the file system says no.
    access = os.access
    monkeypatch.setattr(files.os, "access", lambda path, mode: "read-only" not in str(path) and access(path, mode))
    yield tmp_path
    run.close()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(name, folders, monkeypatch, capsys):
    """One line; a slip in --out does not cost a download, and nothing is made."""
    monkeypatch.setattr(command_line, "load", lambda *_: pytest.fail("the data were asked for"))
    args, words = REFUSED[name]
    args = args if "--seed" in args or "--resume" in args else [*args, "--seed", "1"]
    before = sorted(folders.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        command_line.read_config(args, prog="p", description="", framework="jax")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert sorted(folders.rglob("*")) == before


def test_options_of_the_run_that_is_resumed(folders):
    def read(*args):
        return command_line.read_config(args, prog="p", description="", framework="jax")

    assert read("--resume", "--out", "run") == Config(out=Path("run"), seed=1, resume=True).resolved()
    assert read("--resume", "--out", "run", "--seed", "1", "--checkpoint-every", "5").checkpoint_every == 5
    assert read("--out", "run", "--seed", "1").seed == 1


def test_a_run_that_is_finished_already(tmp_path, capsys):
    run = open_run(tmp_path, epochs=1)
    end_epoch(run, 0)
    args = "--epochs", "1", "--out", str(tmp_path)
    run.close()
    assert command_line.read_config(args, prog="p", description="", framework="jax").epochs == 1  # not yet: no curves
    open_run(tmp_path, epochs=1).finish()
    with pytest.raises(SystemExit) as stop:
        command_line.read_config(args, prog="p", description="", framework="jax")
    assert stop.value.code == 0
    assert "holds all of this run" in capsys.readouterr().out
    # Of other data nobody can say so before they are looked at.
    other = command_line.read_config([*args, "--data", "sample"], prog="p", description="", framework="jax")
    assert other.data == "sample"
    assert capsys.readouterr().out == ""


RECORDS = {
    "nested": "[" * 100_000,
    "a list": "[]",
    "epochs of words": {"epochs": "x"},
    "a number for a folder": {"data_dir": 5},
    "another framework": {"framework": "x"},
    "half a pixel": {"fig_size": 12.5},
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_a_record_that_no_run_has_written(change, tmp_path, capsys):
    run = open_run(tmp_path / "run")
    run.close()
    record = json.dumps({**run.record, **change}) if isinstance(change, dict) else change
    (tmp_path / "run" / "config.json").write_text(record)
    for more, words in ([], "which holds config.json of another run"), (["--resume"], "which holds no run"):
        args = ["--out", str(tmp_path / "run"), *more]
        with pytest.raises(SystemExit) as stop:
            command_line.read_config(args, prog="p", description="", framework="jax")
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert words in said
    with pytest.raises(ValueError, match="which holds none"):
        read_trained(tmp_path / "run")


@pytest.mark.parametrize("line", ["[" * 100_000, "7", '{"epoch": "1"}', '{"epoch": 1, "step": 7}'])
def test_metrics_that_no_run_has_written(line, tmp_path):
    """None of them are taken; left half written by a killed process, they are removed."""
    run = open_run(tmp_path, epochs=1)
    end_epoch(run, 0)
    run.finish()
    for name in ("metrics.jsonl", ".metrics.jsonl.1"):
        (tmp_path / name).write_text(f"{line}\n")
    again = open_run(tmp_path, epochs=1)
    assert again.metrics == []
    assert not (tmp_path / ".metrics.jsonl.1").exists()
    again.close()


def test_a_checkpoint_of_another_run(tmp_path):
    """As good as this one's own for any array: it is refused, and stays."""
    for name, seed in ("mine", 0), ("theirs", 1):
        run = open_run(tmp_path / name, seed=seed, epochs=3)
        end_epoch(run, 0)
        path = tmp_path / name / "checkpoints" / "7"
        path.mkdir(parents=True)
        checkpoints.seal(path, run.about_checkpoint(checkpoints.Place(1), {"w": "float32 2"}, {"jax": "1"}))
        run.close()
    mine = tmp_path / "mine" / "checkpoints"
    (tmp_path / "theirs" / "checkpoints" / "7").rename(mine / "8")
    run = open_run(tmp_path / "mine", seed=0, epochs=3)
    with pytest.raises(
        checkpoints.UnfitError, match=r"8 is a checkpoint of another run: --seed is 1 there; allowed: 0, as"
    ):
        run.newest_checkpoint()
    run.close()
    assert sorted(path.name for path in mine.iterdir()) == ["7", "8"]


def test_progress_bar_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    run = RunFolder(Config(out=tmp_path), "jax", {"data": "sample"}, console)
    with run.progress(3, 10) as advance:
        for _ in range(10):
            advance()
    assert "epoch 3/10" in console.file.getvalue()
    assert "10/10" in console.file.getvalue()
