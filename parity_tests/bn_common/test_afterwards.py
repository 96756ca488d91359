"""What is done with a finished run: asked for on the command line, tried before the work, no part of the record."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import image_data
from bn_common import afterwards, command_line
from bn_common.config import Config
from bn_common.files import LOCK
from bn_common.record import FILES
from jax_bn import export
from parity_tests.faults import PROGRAMS, QUICKLY_COMPILED, ROOT, small_folder
from parity_tests.trained_runs import trained_run


def run(program, *args):
    command = [sys.executable, *PROGRAMS[program], *map(str, args)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | QUICKLY_COMPILED
    )
    return done.returncode, done.stdout, done.stderr


def saved_image(path, size=28):
    Image.fromarray(image_data.load_sample().test_images[0][:size, :size]).save(path)
    return path


def test_a_run_is_exported_at_its_end_or_later(tmp_path):
    """The file is that of `python -m jax_bn.export`; given again, the command is refused, or exports what is there."""
    file, out = tmp_path / "run" / "net.jaxexport", tmp_path / "run"
    args = ["--data-dir", small_folder(tmp_path / "data"), "--batch-size", 50, "--epochs", 1, "--out", out]
    status, said, errors = run("jax", *args, "--export", file)
    assert (status, errors) == (0, "")
    content = file.read_bytes()
    assert said.splitlines()[-1] == f"exported: {file}, {len(content):,} bytes"
    export.main([str(out), "--out", str(tmp_path / "other")])
    assert (tmp_path / "other").read_bytes() == content
    for name in "config.json", "config.toml":
        text = (out / name).read_text()
        assert '"export"' not in text
        assert "export =" not in text

    status, said, errors = run("jax", *args, "--export", file)
    assert (status, said, errors.count("\n")) == (2, "", 1)
    assert "there already" in errors
    file.unlink()
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    images = [saved_image(tmp_path / "a.png"), tmp_path / "none.png"]
    status, said, errors = run("jax", "--resume", "--out", out, "--export", file, "--predict", *images)
    assert status == 2
    assert errors == f"train_jax.py: error: image {images[1]}: No such file or directory; allowed: a PNG or JPEG file\n"
    assert "holds all of this run" in said
    assert said.count("%") == 3
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before | {file: content}


def test_predicted_after_training(tmp_path):
    """An image that will not do is told before."""
    args = ["--data-dir", small_folder(tmp_path / "data"), "--batch-size", 50, "--epochs", 1]
    image, other = saved_image(tmp_path / "a.png"), saved_image(tmp_path / "b.png", size=20)
    status, said, errors = run("torch", *args, "--out", tmp_path / "run", "--predict", image, other)
    assert (status, said, errors.count("\n")) == (2, "", 1)
    assert "b.png is 20 x 20; allowed: 28 x 28, or any size with --resize" in errors
    assert not (tmp_path / "run").exists()
    status, said, errors = run("torch", *args, "--out", tmp_path / "run", "--predict", image, other, "--resize")
    assert (status, errors) == (0, "")
    assert said.count("%") >= 2 * 3
    assert '"predict"' not in (tmp_path / "run" / "config.json").read_text()


def test_pytorch_has_no_such_files(tmp_path):
    status, said, errors = run("torch", "--data", "sample", "--out", tmp_path / "run", "--export", tmp_path / "a")
    assert (status, said, errors.count("\n")) == (2, "", 1)
    assert "; allowed: of train_jax.py only" in errors
    assert not list(tmp_path.iterdir())


REFUSED = {
    "there": ("there", "is there already; allowed: a new file"),
    "no folder": ("no/file", "whose folder is not there"),
    "a folder": ("..", "allowed: a file beside the run folder"),
    "the run": ("runs/new", "allowed: a file beside the run folder, or in it"),
    "the run, otherwise": ("runs/../runs/new/", "allowed: a file beside the run folder"),
    "above the run": ("runs", "allowed: a file beside the run folder"),
    "a long name": ("a" * 300, "File name too long"),
    "a long name in the run": ("runs/new/" + "a" * 300, "File name too long"),
    "below the run": ("runs/new/folder/file", "whose folder is not there"),
    **{name: (f"runs/new/{name}", "allowed: a name that is not of ") for name in (*FILES, LOCK, "checkpoints")},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("precious")
    file, words = REFUSED[name]
    with pytest.raises(SystemExit) as stop:
        command_line.read_config(["--out", "runs/new", "--export", file], prog="p", description="", framework="jax")
    said = capsys.readouterr()
    assert (stop.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "p: error: --export is " in said.err
    assert words in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert Path("there").read_text() == "precious"


def test_allowed_is_what_can_be_written_later(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in "new", "runs/new/net", str(tmp_path / "a b"):
        afterwards.check(Config(out=Path("runs/new"), export=Path(file)))
    with pytest.raises(ValueError, match="allowed: a file beside the run folder"):
        afterwards.check(Config(export=Path("runs")))  # where new ones are made
    assert not list(tmp_path.iterdir())


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Another's file is not written over; a disk that is full is told with the name that was asked for."""
    folder, said = trained_run(tmp_path / "run"), []
    config = Config(out=folder, export=tmp_path / "net")

    def do(content):
        return afterwards.do(config, folder, "jax", export=content, predicting=None, say=said.append, prog="p")

    def meanwhile(_):
        (tmp_path / "net").write_text("another's")
        return b"mine"

    with pytest.raises(FileExistsError) as found:
        do(meanwhile)
    assert (found.value.filename, (tmp_path / "net").read_text(), said) == (str(tmp_path / "net"), "another's", [])
    (tmp_path / "net").unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as found:
            do(lambda _: b"mine")
    assert found.value.filename == str(tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    do(lambda trained: json.dumps([trained.framework, trained.fig_size]).encode())
    assert (tmp_path / "net").read_text() == '["jax", 28]'


def test_how_to_go_on_says_it(tmp_path, capsys, monkeypatch):
    """Interrupted: the record does not have what is to be done in the end, the command line does."""
    config = Config(export=Path("a b"))
    assert afterwards.as_arguments(config) == ["--export", "a b"]
    assert afterwards.as_arguments(Config()) == []
    predicting = Config(predict=(Path("a"), Path("b")), invert=True)
    assert afterwards.as_arguments(predicting) == ["--invert", "--predict", "a", "b"]

    def ended(status):
        raise SystemExit(status)

    class Run:
        path, saved_step, writes, close, is_there = Path("r"), 3, True, lambda _: None, lambda _: True

    Run.config = config
    monkeypatch.setattr(command_line, "end", ended)
    with pytest.raises(SystemExit):
        command_line.stopped(Run(), "train_jax.py", "interrupted by SIGTERM", 143)
    assert capsys.readouterr().err.endswith("to go on: python train_jax.py --resume --out r --export 'a b'\n")
