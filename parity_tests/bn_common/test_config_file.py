"""--config: a file of options, which the command line wins over; and the one that a run folder keeps."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from bn_common import command_line
from bn_common.config import GROUPS, Config
from bn_common.config_file import NOT_KEPT, as_toml, read_toml
from bn_common.run_folder import RunFolder


def read(*args):
    return command_line.read_config(args, prog="train_jax.py", description="", framework="jax")


def written(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_the_command_line_wins(tmp_path):
    path = written(
        tmp_path, 'lr = 1\nepochs = 20\nwarmup_epochs = 12\nprofile = true\noptimizer = "sgd"\ndata_dir = "~/a"'
    )
    config = read("--config", path, "--epochs", "15", "--no-profile")
    assert config == dataclasses.replace(
        Config(epochs=15, lr=1.0, warmup_epochs=12.0, optimizer="sgd", data_dir=Path("~/a")).resolved(),
        config=Path(path),
    )
    assert type(config.lr) is float
    assert read("--config", path).profile
    assert read("--config", path, "--profile").profile
    # Whether values fit each other is asked of what is run in the end.
    assert read("--config", written(tmp_path, "warmup_epochs = 12"), "--epochs", "13").warmup_epochs == 12


OTHER = Config(
    bn_momentum=0.75, bn_eps=1e-7, sync_bn="local", precision="bfloat16", data_dir=Path('a "b"\\c\x7f\t☃'),
    batch_size=7, seed=2**32 - 1, optimizer="momentum", epochs=3, lr=1e-22, schedule="constant", warmup_epochs=0.5,
    weight_decay=0.0, label_smoothing=0.0, until_accuracy=0.9, devices=3, coordinator="h:1", num_processes=2,
    process_id=1, deterministic=True, out=Path("b"), checkpoint_every=9, keep_checkpoints=1, profile=True,
    tensorboard=True, export=Path("c"), predict=(Path("d"),), resize=True, invert=True,
)  # fmt: skip


@pytest.mark.parametrize("config", [Config().resolved(), OTHER], ids=["defaults", "others"])
def test_there_and_back(config, tmp_path):
    """All but where the run is kept, and which of its processes this is."""
    (tmp_path / "config.toml").write_text(as_toml(config))
    kept = {
        name: v for name, v in vars(config).items() if v is not None and name not in {"config", "resume", *NOT_KEPT}
    }
    assert read_toml(tmp_path / "config.toml") == kept
    assert set(vars(OTHER)) == {field.name for group in GROUPS for field in dataclasses.fields(group)}
    defaults = vars(Config())
    assert [name for name, v in vars(OTHER).items() if v == defaults[name]] == ["config", "resume", "data"]


def test_a_run_folder_keeps_one(tmp_path):
    """What is run, wherever that was said: given again it is the same run, in a folder of its own."""
    path = written(tmp_path, "epochs = 3\nseed = 5")
    config = read("--config", path, "--seed", "6", "--out", str(tmp_path / "run"))
    RunFolder(config, "jax", {"data": "x"}, Console(file=io.StringIO())).close()
    kept = tmp_path / "run" / "config.toml"
    again = read("--config", str(kept), "--out", str(tmp_path / "again"))
    assert dataclasses.replace(again, config=config.config, out=config.out) == config
    assert read("--config", str(kept)).out is None
    before = kept.read_bytes()
    other = dataclasses.replace(config, keep_checkpoints=9)
    RunFolder(other, "jax", {"data": "x"}, Console(file=io.StringIO())).close()
    assert kept.read_bytes() == before


def test_resumed(tmp_path):
    """The run's own options, then the file's, then the command line's: the same where they must be."""
    out = str(tmp_path / "run")
    RunFolder(read("--out", out, "--seed", "5"), "jax", {"data": "x"}, Console(file=io.StringIO())).close()
    path = written(tmp_path, "keep_checkpoints = 7\ncheckpoint_every = 3")
    config = read("--resume", "--out", out, "--config", path, "--checkpoint-every", "4")
    assert (config.seed, config.keep_checkpoints, config.checkpoint_every) == (5, 7, 4)
    with pytest.raises(SystemExit):
        read("--resume", "--out", out, "--config", written(tmp_path, "seed = 6"))


BAD = {
    "unknown": ("learning_rate = 0.1", "learning_rate in ", " is 0.1; allowed: the fields bn_momentum, "),
    "as an option": ("batch-size = 3", "batch-size in ", " is 3; allowed: the fields "),
    "a table": ("[model]\nbn_eps = 1e-3", "model in ", "allowed: the fields "),
    "resume": ("resume = true", "resume in ", " is True; allowed: the fields "),
    "another file": ('config = "a.toml"', "config in ", "allowed: the fields "),
    "text for a number": ('lr = "fast"', "lr in ", " is 'fast'; allowed: a finite number"),
    "not finite": ("lr = inf", "lr in ", " is inf; allowed: a finite number"),
    "not a number": ("bn_eps = nan", "bn_eps in ", " is nan; allowed: a finite number"),
    "far too large": ("lr = 1" + "0" * 400, "lr in ", "; allowed: a finite number"),
    "part of an epoch": ("epochs = 1.5", "epochs in ", " is 1.5; allowed: an integer"),
    "truth for an integer": ("epochs = true", "epochs in ", " is True; allowed: an integer"),
    "truth for a number": ("lr = true", "lr in ", " is True; allowed: a finite number"),
    "integer for truth": ("profile = 1", "profile in ", " is 1; allowed: true or false"),
    "integer for a path": ("out = 3", "out in ", " is 3; allowed: a path in quotes"),
    "empty path": ('out = ""', "out in ", " is ''; allowed: a path in quotes"),
    "empty text": ('coordinator = ""', "coordinator in ", " is ''; allowed: a text in quotes"),
    "no choice": ('optimizer = "lion"', "optimizer in ", " is 'lion'; allowed: sgd, momentum, adam, adamw"),
    "a list": ("precision = [1]", "precision in ", " is [1]; allowed: float32, bfloat16"),
    "a date": ("seed = 2026-01-01", "seed in ", "; allowed: an integer"),
    "out of range": ("lr = -1", "--lr is -1.0; allowed: a number > 0"),
    "at odds": ("epochs = 2\nwarmup_epochs = 3", "--warmup-epochs is 3.0; allowed: 0 to --epochs, 2"),
    "no TOML": ("lr: 0.1", "--config is ", "allowed: a TOML file"),
    "twice": ("lr = 1\nlr = 2", "--config is ", "allowed: a TOML file"),
    "no text": (b"lr = \xff", "--config is ", "allowed: a TOML file"),
    "too deep": ("lr = " + "[" * 100000, "--config is ", "allowed: a TOML file"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(name, tmp_path, capsys):
    text, *words = BAD[name]
    with pytest.raises(SystemExit) as stop:
        read("--config", written(tmp_path, text))
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert said.startswith("train_jax.py: error: ")
    for word in words:
        assert word in said


@pytest.mark.parametrize("path", ["nothing.toml", "."])
def test_no_file(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        read("--config", path)
    assert stop.value.code == 2
    assert f"--config is {path}: " in capsys.readouterr().err
