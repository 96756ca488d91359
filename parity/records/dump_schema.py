"""What a dump's JSON holds, field by field, and how its arrays belong to it: what was damaged or made up is refused.

The files are described in `records/dump_file.py`. A dump of a version before some field was written is without it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.records.answers import RAMP, Response
from parity.records.evidence import Evidence
from parity.records.kinds import KINDS
from parity.records.recording import PHASES, Recording
from parity.records.schema import (
    Rule,
    below,
    fields,
    flag,
    list_of,
    map_of,
    maybe,
    number,
    one_of,
    plain,
    row,
    text,
    whole,
    wrong,
)

RUNS = "free", "forced", "own"
DIGEST = re.compile("[0-9a-f]{64}")
NUMBER = r"(0|[1-9][0-9]{0,8})"
ARRAYS = re.compile(
    rf"(?P<run>free|forced|own)/((tensor|new_statistic|gradient)/.*|(input|output)(_gradient)?/{NUMBER}"
    rf"|call/{NUMBER}/((input|arrived|input_gradient)/{NUMBER}|output|output_gradient))"
    rf"|exact/{NUMBER}|state/{NUMBER}/.*|answer/.*/(gradients|parameters|updates|rates|asked|sums)",
    re.DOTALL,
)


def digest(value: Any, where: str) -> None:
    """A SHA-256."""
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        wrong(value, where, "a SHA-256 of 64 digits 0 to f")


def sizes(value: Any, where: str) -> None:
    """Plain; a whole number in it counts something, or is a step."""
    if isinstance(value, list):
        list_of(sizes)(value, where)
    elif isinstance(value, int) and not isinstance(value, bool):
        whole(1)(value, where)
    else:
        plain(value, where)


def config(value: Any, where: str) -> None:
    """What a layer says of itself."""
    map_of(plain)(value, where)
    for name in ("stride", "dilation", "groups"):
        if name in value:
            sizes(value[name], below(where, name))


LAYER = fields(
    {
        "path": text,
        "kind": one_of(*KINDS),
        "class_name": text,
        "tensors": map_of(text),
        "statistics": list_of(text),
        "config": config,
        "is_called": flag,
        "feeder": maybe(text),
    },
    {"calls": whole()},
)
RUN = fields(
    {
        "loss": maybe(number),
        "failure": maybe(text),
        "calls": list_of(fields({"path": text, "index": whole()})),
        "glue": list_of(fields({"path": text, "class_names": list_of(text), "position": whole()})),
    },
    {
        "failed_in": maybe(row(one_of("forward", "backward"), text)),
        "dropout_off": flag,
        "dropouts": list_of(row(number, whole())),
        "output_names": list_of(text),
        "rounds_loss": flag,
    },
)
INPUT = fields({"shape": list_of(whole()), "dtype": text, "sha256": digest})


SAID: dict[str, Rule] = {"mode": one_of("train", "eval"), "inputs": maybe(list_of(INPUT)), "fed_by": digest}
SAID |= dict.fromkeys(("class", "dtype", "parameters", "loss", "numpy", "torch", "jax", "flax"), text)


def details(value: Any, where: str) -> None:
    """Of the run: what is read of it, by name; and whatever else was to be said."""
    further = dict.fromkeys(value, plain) if isinstance(value, dict) else {}
    fields({"mode": SAID["mode"]}, further | SAID)(value, where)


DUMP = fields(
    {
        "format": text,
        "version": whole(),
        "sha256": digest,
        "framework": one_of("torch", "flax"),
        "details": details,
        "layers": list_of(LAYER),
        "runs": fields({"free": RUN}, dict.fromkeys(RUNS[1:], RUN)),
        "noise": list_of(row(one_of(*PHASES), text, whole(-1), number)),
    },
    {"checksum": digest, "notes": list_of(text), "answers": map_of(maybe(number))},
)


def check(about: Mapping[str, Any]) -> None:
    """ValueError that names the first field that no dump has like that."""
    DUMP(about, "")
    paths = [layer["path"] for layer in about["layers"]]
    _unlike(paths, "layers", "path")
    for name, run in about["runs"].items():
        keys = [(call["path"], call["index"]) for call in run["calls"]]
        _unlike(keys, f"runs.{name}.calls", "path and index")
        for i, (path, _) in enumerate(keys):
            if path not in paths:
                wrong(path, f"runs.{name}.calls[{i}].path", "the path of a layer")


def _unlike(values: Sequence[Any], where: str, what: str) -> None:
    seen = set()
    for i, value in enumerate(values):
        if value in seen:
            raise ValueError(f"{where}[{i}] is of the same {what} as one before it; allowed: each once")
        seen.add(value)


def check_names(about: Mapping[str, Any], names: Collection[str]) -> None:
    """ValueError for an array that belongs to nothing in the JSON, or one that it needs and that is not there."""
    for name in names:
        match = ARRAYS.fullmatch(name)
        if match is None:
            wrong(name, "an array's name", "those that `dump --out` writes")
        text(name, "an array's name")
    present = set(names)
    for run, entry in about["runs"].items():
        for n in range(len(entry["calls"])):
            if f"{run}/call/{n}/output" not in present:
                raise ValueError(f"runs.{run}.calls[{n}] has no output; allowed: an array {run}/call/{n}/output")
        for name in names:
            if name.startswith(f"{run}/call/") and int(name.split("/")[2]) >= len(entry["calls"]):
                wrong(name, "an array's name", f"one of the {len(entry['calls'])} calls in runs.{run}.calls")
    for i, layer in enumerate(about["layers"]):
        for j, local in enumerate(layer["statistics"]):
            if local not in layer["tensors"]:
                wrong(local, f"layers[{i}].statistics[{j}]", "a name in the layer's tensors")
        for local, full in layer["tensors"].items():
            if f"free/tensor/{full}" not in present:
                wrong(full, below(f"layers[{i}].tensors", local), "the name of an array free/tensor/NAME")
    for name in about.get("answers", {}):
        for field in ("gradients", "parameters", "updates"):
            if f"answer/{name}/{field}" not in present:
                raise ValueError(f"{below('answers', name)} has no {field}; allowed: an array answer/NAME/{field}")


def numbered(named: Mapping[str, NDArray], key: str, most: int | None = None) -> list[Any]:
    """[array or None] of KEY/0, KEY/1, ...

    Args:
      named: arrays by name.
      key: what stands before the number.
      most: how many there are; a number may then be left out, and None stands there. None: as many as there are names,
        and none is left out.

    Raises:
      ValueError: a number that is too large.
    """
    start = f"{key}/"
    found = {k: a for k, a in named.items() if k.startswith(start) and k[len(start) :].isdecimal()}
    count = len(found) if most is None else most
    made = [found.get(f"{start}{i}") for i in range(count)]
    if sum(a is not None for a in made) < len(found):
        known = {f"{start}{i}" for i in range(count)}
        wrong(next(k for k in found if k not in known), "an array's name", f"numbers below {count}, none left out")
    return made


def check_whole(dump: Evidence) -> None:
    """ValueError where something is missing that a comparison reads, or has a shape or numbers of the wrong kind."""
    for name in ("class", "dtype", "loss", "numpy", "inputs", dump.free.framework):
        if name not in dump.details:
            raise ValueError(f"details.{name} is missing; allowed: all that `dump --out` writes")
    tensors = dump.free.tensors
    for name, run in (("free", dump.free), ("forced", dump.forced), ("own", dump.own)):
        if run is not None:
            _check_run(name, run)
    for number_, state in enumerate(dump.states):
        if state.keys() != dump.states[0].keys():
            full = min(state.keys() ^ dump.states[0].keys())
            raise ValueError(f"{ascii(full)[:80]} is not in every state; allowed: the same tensors in each")
        for full, a in state.items():
            _same(f"state/{number_}/{full}", a, tensors.get(full))
    for key, a in dump.exact.items():
        call = None if dump.own is None else dump.own.call(key)
        _same(f"exact of {key[0]}", a, None if call is None else call.output)
    for full, answer in dump.answers.items():
        _check_answer(full, answer)


def _check_run(name: str, run: Recording) -> None:
    kept = [layer.tensors[local] for layer in run.layers.values() for local in layer.statistics]
    if run.framework == "torch" and run.has_ended and (absent := {*kept} - run.new_statistics.keys()):
        raise ValueError(f"{name}/new_statistic/{ascii(min(absent))[1:-1]} is missing; allowed: all statistics")
    for attribute in ("gradients", "new_statistics"):
        for full, a in getattr(run, attribute).items():
            _same(f"{name}/{attribute[:-1]}/{full}", a, run.tensors.get(full))
    places: list[tuple[str, Sequence[Any], Sequence[Any]]] = [
        ("input", run.inputs, run.input_gradients),
        ("output", run.outputs, run.output_gradients),
        *((f"call/{n}/input", call.inputs, call.input_gradients) for n, call in enumerate(run.calls)),
        *((f"call/{n}/output", [call.output], [call.output_gradient]) for n, call in enumerate(run.calls)),
    ]
    for key, values, gradients in places:
        for i, (a, gradient) in enumerate(zip(values, gradients, strict=False)):
            if gradient is not None:
                # In single-layer mode it is the other side's, as it came, whatever its shape.
                _same(f"{name}/{key}_gradient/{i}", gradient, gradient if name == "forced" else a)
    if len(run.output_names) not in (0, len(run.outputs)):
        raise ValueError(f"runs.{name}.output_names are {len(run.output_names)}; allowed: {len(run.outputs)}, or none")


def _same(where: str, a: NDArray, like: NDArray | None) -> None:
    """ValueError, unless `a` has the shape of what it belongs to, and floating numbers where that has."""
    where = ascii(where)[1:-1][:80]
    if like is None:
        raise ValueError(f"{where} belongs to no tensor; allowed: those in free/tensor")
    if a.shape != like.shape:
        wrong(a.shape, f"the shape of {where}", f"{like.shape}, that of what it belongs to")
    if (a.dtype.kind in "fc") != (like.dtype.kind in "fc"):
        wrong(str(a.dtype), f"the dtype of {where}", f"of the kind of {like.dtype}")


def _check_answer(full: str, answer: Response) -> None:
    where = below("answer", full)
    steps = answer.updates.shape
    expected = {"gradients": steps, "parameters": steps, "rates": steps[:1], "asked": steps[1:]}
    for field, shape in {**expected, "sums": (4, 2, *steps[:1], RAMP + 1)}.items():
        a = getattr(answer, field)
        if len(steps) != 2 or (a is not None and a.shape != shape):
            wrong(a.shape, f"the shape of {where}/{field}", f"{shape}, as the updates are {steps}, [T, K]")
        if a is not None and a.dtype.kind not in ("iu" if field == "asked" else "f"):
            wrong(str(a.dtype), f"the dtype of {where}/{field}", "whole numbers" if field == "asked" else "floats")
    if answer.asked is not None and np.any(np.diff(answer.asked) <= 0):
        raise ValueError(f"{where}/asked is not ascending; allowed: numbers of questions, each larger than before")
