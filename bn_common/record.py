"""What a run folder says about its run: whether that is the one to be continued, another, under way, or finished."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from bn_common.checks import require
from bn_common.config import AFTERWARDS, MAY_CHANGE, NUM_CLASS, Config
from bn_common.config_file import checked
from bn_common.conventions import PROJECT
from bn_common.files import LOCK, check_can_be_made, lock, read_json
from image_data import ImageDataset, pixel_mean_and_std

CONFIG, METRICS, WEIGHTS, CURVES = "config.json", "metrics.jsonl", "weights.safetensors", "curves.png"
CONFUSION, MISTAKES = "confusion.png", "mistakes.png"
OPTIONS = "config.toml"
"""For people, and for --config; what a run is, config.json says."""
FILES = (CONFIG, OPTIONS, METRICS, WEIGHTS, CURVES, CONFUSION, MISTAKES)
"""Of a run folder, beside its folders."""
FRAMEWORKS = "jax", "torch"
# What is read again: of a line of the metrics, and of what a run is beside its configuration.
OF_AN_EPOCH: dict[str, type] = {"epoch": int, "step": int, "seconds": float}
OF_AN_EPOCH |= dict.fromkeys(("loss", "train_accuracy", "test_loss", "test_accuracy"), float)
OF_A_NETWORK: dict[str, type] = {"fig_size": int, "pixel_mean": float, "pixel_std": float}


def record_of(config: Config, framework: str) -> dict[str, Any]:
    """What config.json says of a configuration."""
    fields = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}
    left_out = {"config", "resume", *AFTERWARDS}
    return {"framework": framework, **{name: v for name, v in fields.items() if name not in left_out}}


def identity_of(dataset: ImageDataset) -> dict[str, Any]:
    """What a run is beside its configuration: the network, its convention and the data, by their digest."""
    sha256 = hashlib.sha256()
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        sha256.update(repr(array.shape).encode() + np.ascontiguousarray(array).data)
    mean, std = pixel_mean_and_std(dataset.train_images)
    return {
        "network": "BLeNet",
        "fig_size": dataset.train_images.shape[1],
        "num_class": NUM_CLASS,
        "convention": {name: v for name, v in PROJECT._asdict().items() if name != "momentum"},
        "data_sha256": sha256.hexdigest(),
        "pixel_mean": float(mean),
        "pixel_std": float(std),
    }


def read_record(path: Path) -> dict[str, Any] | None:
    """What config.json in a run folder says; None if there is none, or it is no run's."""
    try:
        record = read_json((path / CONFIG).read_bytes())
        check_record(record)
    except (OSError, ValueError):
        return None
    return record


def check_record(record: Any) -> None:
    """Raise ValueError for what no config.json says."""
    # What changes no number may be missing: an option that is new does not make another run of an older one.
    whole = isinstance(record, dict) and record.keys() >= record_of(Config(), "").keys() - MAY_CHANGE
    require(whole, CONFIG, f"{record!r:.80}", "all fields of a run")
    require(record["framework"] in FRAMEWORKS, "framework", record["framework"], ", ".join(FRAMEWORKS))
    for name, kind in {**get_type_hints(Config), **OF_A_NETWORK}.items():
        if record.get(name) is not None:
            checked(name, record[name], kind)


def check_epoch(line: Any) -> None:
    """Raise ValueError for what no line of the metrics says."""
    require(isinstance(line, dict) and line.keys() >= OF_AN_EPOCH.keys(), METRICS, f"{line!r:.80}", "epochs")
    for name, kind in OF_AN_EPOCH.items():
        checked(name, line[name], kind)


def recorded_config(path: Path) -> Config:
    """The configuration of the run in a folder. ValueError if there is none."""
    record = read_record(path)
    if record is None:
        raise ValueError(f"--out is {path}, which holds no run; allowed with --resume: a folder with one")
    names = {field.name for field in dataclasses.fields(Config)} & record.keys()
    paths = {name: Path(record[name]) for name in ("out", "data_dir") if record.get(name) is not None}
    return Config(**{name: record[name] for name in names} | paths)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in a run folder; none where it is missing or no longer what was written."""
    try:
        lines = [read_json(line) for line in (path / METRICS).read_bytes().splitlines()]
        for line in lines:
            check_epoch(line)
    except (OSError, ValueError):
        return []
    return lines


def refuse_other(path: Path, mine: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder holds a run that `mine` is not, or is no folder to write to. Nothing is changed.

    Args:
      path: of the run folder.
      mine: what is to be run: names and values as config.json has them, all of them or some.
    """
    check_can_be_made("--out", path)
    theirs = read_record(path)
    if theirs is None:
        held = [name for name in FILES if os.path.exists(path / name)]
        if held:
            raise ValueError(f"--out is {path}, which holds {held[0]} of another run; allowed: a folder without a run")
        return
    differs = difference(mine, theirs)
    if differs is not None:
        called, value, other = differs
        raise ValueError(f"{called} is {value}; allowed: {other}, as the run in {path} has it, or another --out")


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first thing that makes two runs: what it is called, how it is in mine, how in theirs; None for one run."""
    options = {field.name for field in dataclasses.fields(Config)}
    for name, value in json.loads(json.dumps(mine)).items():
        if name not in MAY_CHANGE and value != theirs.get(name):
            return f"--{name.replace('_', '-')}" if name in options else f"the {name}", value, theirs.get(name)
    return None


def refuse_under_way(path: Path) -> None:
    """Raise ValueError if another process is training in this folder."""
    if path.is_dir() and (path / LOCK).exists():
        unlock = lock(path)
        if unlock is None:
            raise ValueError(under_way(path))
        unlock()


def under_way(path: Path) -> str:
    """What is said of a folder that another process has locked."""
    return f"--out is {path}, where another process is training; allowed: a folder of its own for every run"


def is_finished(config: Config, path: Path) -> bool:
    """Whether the folder holds all of this run, to the curves."""
    metrics = read_metrics(path)
    return (path / CURVES).exists() and (len(metrics) >= config.epochs or reached(config, metrics))


def names_the_same_data(config: Config, path: Path) -> bool:
    """Whether the run in the folder was told to take its data from where this one is."""
    mine, theirs = record_of(config, ""), read_record(path) or {}
    return all(mine[name] == theirs.get(name) for name in ("data", "data_dir"))


def reached(config: Config, metrics: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last of these epochs has the test accuracy that config.until_accuracy asks for."""
    wanted = config.until_accuracy
    return wanted is not None and bool(metrics) and metrics[-1]["test_accuracy"] >= wanted
