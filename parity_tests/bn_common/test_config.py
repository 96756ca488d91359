"""The configuration and the command line: what is refused, with which words."""

import dataclasses
import inspect
import math
import re

import pytest

import torch_bn.training
import train_jax
from bn_common.command_line import parse, read_config
from bn_common.config import DEFAULTS, GROUPS, Config

BAD = {
    "epochs": (0, -1, 1.5, True, 2**31),
    "batch_size": (1, 0, 2.5),
    "optimizer": ("rmsprop", "SGD", ""),
    "lr": (0.0, -0.1, math.nan, math.inf, 1e7),
    "weight_decay": (-1e-4, math.nan, math.inf),
    "label_smoothing": (-0.1, 1.0, math.nan),
    "schedule": ("linear",),
    "until_accuracy": (0, -0.5, 1.01, 90, math.nan),
    "warmup_epochs": (-1, 11, math.nan),
    "checkpoint_every": (0, -1, 1.5, True),
    "keep_checkpoints": (0, -1, 1.5, True),
    "seed": (-1, 2**32, 0.5),
    "bn_momentum": (-0.1, 1.01, math.nan),
    "bn_eps": (0.0, -1e-5, math.nan, math.inf),
    "sync_bn": ("none", "Global"),
    "precision": ("float16", "bf16"),
    "devices": (0, -1, 1.5, True),
    "data": ("mnist",),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_refused_in_code(field, value):
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} is .*; allowed: "):
        Config(**{field: value})


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3


@pytest.mark.parametrize("optimizer", DEFAULTS)
def test_resolved(optimizer):
    config = Config(optimizer=optimizer).resolved()
    assert (config.lr, config.weight_decay) == DEFAULTS[optimizer]
    assert Config(optimizer=optimizer, lr=0.25, weight_decay=0.0).resolved().lr == 0.25
    assert Config(optimizer=optimizer, weight_decay=0.0).resolved().weight_decay == 0


def test_home(monkeypatch):
    """A ~ that the shell has left alone."""
    monkeypatch.setenv("HOME", "/home/somebody")
    config = parse(
        Config, ["--data-dir", "~/kmnist", "--out=~/runs/a", "--export", "~/b"], prog="", description=""
    ).resolved()
    found = config.data_dir, config.out, config.export
    assert [str(path) for path in found] == ["/home/somebody/kmnist", "/home/somebody/runs/a", "/home/somebody/b"]


PROGRAMS = {"train_jax.py": train_jax.__doc__, "python -m torch_bn.training": torch_bn.training.__doc__}


def help_of(description, capsys):
    with pytest.raises(SystemExit) as stop:
        read_config(["--help"], prog="train_jax.py", description=description)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("prog", PROGRAMS)
def test_help_on_two_screens(prog, capsys, monkeypatch):
    """Of 50 lines and 80 columns, in groups, no word of it broken."""
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(PROGRAMS[prog], capsys)
    lines = text.splitlines()
    assert len(lines) <= 2 * 50
    assert max(map(len, lines)) <= 80
    _, *parts = re.split(r"^\W*(\w+) options\W*$", text, flags=re.MULTILINE)
    within = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(within) == ["general", "model", "data", "optimiser", "devices", "output"]
    for group in GROUPS:
        for field in dataclasses.fields(group):
            assert f" --{field.name.replace('_', '-')}" in within[group.__name__.lower()]
    words = set(text.split())
    for group in GROUPS:
        said = re.findall(r'"""(.*)"""', inspect.getsource(group))[1:]
        assert len(said) == len(dataclasses.fields(group))
        for one in said:
            assert set(one.split()) <= words, one


def test_help_tells_the_defaults(capsys):
    """The numbers in the help text are those of the table."""
    text = " ".join(help_of(PROGRAMS["train_jax.py"], capsys).replace("│", " ").split())
    for optimizer, (lr, decay) in DEFAULTS.items():
        assert f"{lr:g}" in text.partition("Highest learning rate")[2].partition("(default")[0], optimizer
        assert f"{decay:g}".replace("0.0001", "1e-4") in text.partition("Weight decay")[2].partition("(default")[0]
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text


COMMANDS = {
    "no number": (["--epochs", "ten"], "--epochs: invalid literal", "--epochs INT"),
    "out of range": (["--lr", "-1"], "--lr is -1.0; allowed: a number > 0"),
    "no such choice": (["--optimizer", "lion"], "'lion'", "'sgd', 'momentum', 'adam', 'adamw'"),
    "no such option": (["--learning-rate", "1"], "--learning-rate", "--help"),
    "no value": (["--seed"], "--seed"),
    "empty path": (["--out", ""], "--out is ''; allowed: "),
    "empty folder": (["--epochs", "2", "--data-dir="], "--data-dir is ''; allowed: "),
    "left over": (["sample"], "sample"),
    "sample in a folder": (["--data", "sample", "--data-dir", "/tmp"], "--data-dir is /tmp with --data sample"),
    "no port": (
        ["--coordinator", "host", "--num-processes", "2", "--process-id", "0"],
        "--coordinator is host; allowed: H",
    ),
    "no number of processes": (
        ["--coordinator", "a:1", "--process-id", "0"],
        "--num-processes is None; allowed: an integer",
    ),
    "auto": (
        ["--coordinator", "auto", "--process-id", "0"],
        "--process-id is 0; allowed: with --coordinator HOST:PORT",
    ),
    "one process": (["--coordinator", "a:1", "--num-processes", "1", "--process-id", "0"], "--num-processes is 1"),
    "third of two": (
        ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
        "--process-id is 2; allowed: 0 to 1",
    ),
    "percent": (["--until-accuracy", "90"], "--until-accuracy is 90.0; allowed: a number > 0, at most 1"),
    "resized for nothing": (["--resize"], "--resize is True; allowed: with --predict"),
    "inverted for nothing": (["--invert"], "--invert is True; allowed: with --predict"),
    "no image": (["--predict", "no.png"], "image no.png: No such file"),
    "none at all": (["--predict"], "--predict is ''; allowed: "),
    "warm-up": (["--epochs", "2", "--warmup-epochs", "3"], "--warmup-epochs is 3.0; allowed: 0 to --epochs, 2"),
}


@pytest.mark.parametrize(("args", "words"), [(c[0], c[1:]) for c in COMMANDS.values()], ids=COMMANDS)
def test_one_line_and_exit_status_2(args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        read_config(args, prog="train_jax.py", description="")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("train_jax.py: error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    for word in words:
        assert word in captured.err


def test_every_option_reaches_the_config():
    args = "--epochs 3 --batch-size 7 --optimizer adam --lr 0.125 --weight-decay 0.5 --schedule constant"
    args += (
        " --label-smoothing 0.25 --warmup-epochs 0.5 --seed 9 --bn-momentum 0.75 --bn-eps 0.001 --data-dir a --out b"
        " --until-accuracy 0.75 --resume --checkpoint-every 11 --keep-checkpoints 5 --deterministic"
        " --sync-bn local --devices 3 --precision bfloat16 --profile --tensorboard"
        " --coordinator host:1234 --num-processes 4 --process-id 2 --config c.toml --export d"
        " --predict e f --resize --invert"
    )
    config = parse(Config, args.split(), prog="", description="")
    given = {k: str(v) for k, v in dataclasses.asdict(config).items()}
    assert given == {
        "epochs": "3",
        "batch_size": "7",
        "optimizer": "adam",
        "lr": "0.125",
        "weight_decay": "0.5",
        "label_smoothing": "0.25",
        "schedule": "constant",
        "until_accuracy": "0.75",
        "warmup_epochs": "0.5",
        "seed": "9",
        "bn_momentum": "0.75",
        "bn_eps": "0.001",
        "sync_bn": "local",
        "precision": "bfloat16",
        "devices": "3",
        "coordinator": "host:1234",
        "num_processes": "4",
        "process_id": "2",
        "profile": "True",
        "tensorboard": "True",
        "data": "fashion-mnist",
        "data_dir": "a",
        "out": "b",
        "resume": "True",
        "deterministic": "True",
        "checkpoint_every": "11",
        "keep_checkpoints": "5",
        "config": "c.toml",
        "export": "d",
        "predict": "(PosixPath('e'), PosixPath('f'))",
        "resize": "True",
        "invert": "True",
    }
