"""What people are shown of a run: in 80 columns, in percent, by names and not by paths."""

import contextlib
import io
import itertools

import pytest
from rich.console import Console

from bn_common import run_folder
from bn_common.config import Config
from bn_common.run_folder import RunFolder
from bn_common.shown import data_title, epoch_line, plot_curves, summary


def line(epoch=1, *, accuracy=0.9, loss=0.5, rate=200.0, seconds=30.0):
    accuracies = {"train_accuracy": 0.8, "test_accuracy": accuracy}
    return {"epoch": epoch, "loss": loss, "test_loss": loss, "images_per_second": rate, "seconds": seconds} | accuracies


def test_an_epoch_in_80_columns():
    said = "epoch 10/10  loss 0.5000  train 0.8000  test accuracy 0.9000"
    assert epoch_line(line(10, rate=98765.4), 10) == f"{said}  98,765 images/s"
    for epochs, loss, rate in itertools.product((1, 10, 99999, 2**31 - 1), (0.1, 99.9, 3e38), (1, 1e6, 1e9)):
        said = epoch_line(line(epochs, loss=loss, rate=rate), epochs)
        assert len(said) <= 80
        assert said.startswith(f"epoch {epochs}/{epochs}  loss ")
        assert "test accuracy 0.9000" in said
        assert said.endswith("/s") or epochs == 2**31 - 1 or rate == 1e9


def test_a_summary():
    assert summary([line()]) == "test accuracy 0.9000 after 1 epoch, 0:00:30 of training"
    metrics = [line(1, seconds=3600), line(2, accuracy=0.95), line(3, accuracy=0.91)]
    assert summary(metrics) == "test accuracy 0.9100 after 3 epochs (best 0.9500, epoch 2), 1:01:00 of training"


TITLES = {
    "/usr/share/datasets/fashion-mnist": "Fashion-MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "/home/somebody/kmnist/": "KMNIST",
    "data/MNIST": "MNIST",
    "/data/my letters": "my letters",
    "sample": "Fashion-MNIST (sample)",
    "/": "/",
}


@pytest.mark.parametrize("data", TITLES)
def test_curves_name_the_data(data):
    assert data_title(data) == TITLES[data]
    figure = plot_curves([line()], data)
    assert figure.get_suptitle() == f"BLeNet on {TITLES[data]}, test accuracy 90.00%"


def test_curves_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "kmnist").mkdir()
    monkeypatch.chdir(tmp_path / "kmnist")
    assert data_title(".") == "KMNIST"


def test_curves_in_percent():
    figure = plot_curves([line(1, accuracy=0.85), line(2, accuracy=0.9)], "sample")
    figure.canvas.draw()
    loss, accuracy = ([text.get_text() for text in axes.get_yticklabels()] for axes in figure.axes)
    assert all(text.endswith("%") for text in accuracy)
    assert not any("%" in text for text in loss)


def opened(folder, **options):
    return RunFolder(Config(out=folder, **options), "jax", {"data": "x"}, Console(file=io.StringIO()))


def test_what_runs_where(tmp_path):
    run = opened(tmp_path, batch_size=512, precision="bfloat16")
    run.say_what_runs_where("H100", 8, framework="jax 1.2.3")
    assert run.console.file.getvalue() == "8 x H100, global batch 512, 64 each, bfloat16\njax 1.2.3, data: x\n"
    run.close()
    run = opened(tmp_path / "uneven", batch_size=27)
    run.say_what_runs_where("cpu", 4, processes=2, framework="jax")
    assert "4 x cpu in 2 processes, global batch 27, 6 or 7 each, float32\n" in run.console.file.getvalue()


def test_a_spinner_on_a_terminal_only(tmp_path, monkeypatch):
    """Standard error's: what standard output is does not matter."""
    run = opened(tmp_path)
    assert isinstance(run.waiting("compiling"), contextlib.nullcontext)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(run_folder.sys, "stderr", Terminal())
    with run.waiting("compiling"):
        pass
    assert "compiling" in run_folder.sys.stderr.getvalue()
    run.writes = False  # of several processes one shows it
    assert isinstance(run.waiting("compiling"), contextlib.nullcontext)
