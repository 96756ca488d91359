"""A recording as two files that any environment reads: NAME.safetensors with the arrays, NAME.json with the rest.

The JSON file:

    {"format": "parity dump", "version": 1, "sha256": of the other file,
     "framework": "torch" | "flax", "details": {"mode": "train" | "eval", "class", "versions", "inputs", ...},
     "layers": [{"path", "kind", "class_name", "tensors": {local name: full name}, "statistics", "config", "is_called",
                 "calls": how many}],
     "runs": {"free": {"loss", "failure", "failed_in": [phase, path], "dropout_off", "dropouts": [[rate, position]],
                       "output_names": [name], "calls": [{"path", "index"}],
                       "glue": [{"path", "class_name", "position"}]},
              "forced": the same, or absent, "own": the same, or absent},
     "noise": [[phase, path, index, value]], "notes": [text], "answers": {full name: buffer}}

Layers stand in the order of the module's definition, calls in the order of execution. The arrays, each in the
framework's own layout, are called RUN/tensor/FULL NAME, RUN/new_statistic/FULL NAME, RUN/gradient/FULL NAME,
RUN/input/I, RUN/input_gradient/I, RUN/output/I, RUN/output_gradient/I, and RUN/call/N/ input/I, arrived/I,
input_gradient/I, output, output_gradient for the N-th call. exact/N is the output of the N-th call of "own" in float64,
see `records/evidence.py`. state/N/FULL NAME is a parameter after N steps of training, answer/FULL NAME/FIELD what the
optimiser answered for it (`records/answers.py`). Complex numbers are [..., 2], under "NAME complex". What there is not
(the gradient of an integer; what an older dump did not write) is absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from bn_common.files import write_whole
from parity.records.answers import Response
from parity.records.evidence import Evidence
from parity.records.recording import Call, Failure, GlueCall, Layer, Recording

FORMAT, VERSION = "parity dump", 1
COMPLEX = " complex"
LISTS = {"input": "inputs", "input_gradient": "input_gradients", "output": "outputs"}
LISTS |= {"output_gradient": "output_gradients"}
MAPS = {"tensor": "tensors", "new_statistic": "new_statistics", "gradient": "gradients"}
ANSWER = "gradients", "parameters", "updates", "rates", "asked", "sums"
CALL_LISTS = {"input": "inputs", "arrived": "arrived", "input_gradient": "input_gradients"}


def files_of(path: str | Path) -> tuple[Path, Path]:
    """The two files of a dump, arrays and JSON, by their common name or the name of either."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


def is_dump(path: str | Path) -> bool:
    """Whether both files are there and the JSON says so."""
    arrays, about = files_of(path)
    try:
        return arrays.is_file() and json.loads(about.read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def save(dump: Evidence, path: str | Path) -> None:
    """Write both files, each whole or not at all.

    Raises:
      OSError: a file can't be written.
    """
    arrays_file, about_file = files_of(path)
    every = ("free", dump.free), ("forced", dump.forced), ("own", dump.own)
    runs = {name: run for name, run in every if run is not None}
    # The weights are those of the free run, and written once.
    named = {f"{run}/{name}": a for run, recording in runs.items() for name, a in arrays(recording)}
    named = {name: a for name, a in named.items() if not name.startswith(("forced/tensor/", "own/tensor/"))}
    numbers = {} if dump.own is None else {call.key: n for n, call in enumerate(dump.own.calls)}
    named |= {f"exact/{numbers[key]}": a for key, a in dump.exact.items() if key in numbers}
    named |= {f"state/{n}/{name}": a for n, state in enumerate(dump.states) for name, a in state.items()}
    for name, response in dump.answers.items():
        fields = {field: getattr(response, field) for field in ANSWER}
        named |= {f"answer/{name}/{field}": a for field, a in fields.items() if a is not None}
    content = safetensors.numpy.save(dict(_as_file_has_it(name, a) for name, a in named.items()))
    dump.sha256 = hashlib.sha256(content).hexdigest()
    about = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": dump.sha256,
        "framework": dump.free.framework,
        "details": dump.details,
        "layers": [_layer(layer, dump.free) for layer in dump.free.layers.values()],
        "runs": {name: _run(run) for name, run in runs.items()},
        "noise": [[phase, *key, value] for (phase, key), value in dump.noise.items()],
        "notes": dump.notes,
        "answers": {name: response.buffer for name, response in dump.answers.items()},
    }
    write_whole(arrays_file, content)
    write_whole(about_file, (json.dumps(plain(about), indent=1, allow_nan=False) + "\n").encode())


def load(path: str | Path) -> Evidence:
    """Read a dump.

    Raises:
      ValueError: no dump, one of another version, or two files that do not belong together.
    """
    arrays_file, about_file = files_of(path)
    try:
        content, about = arrays_file.read_bytes(), json.loads(about_file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no dump ({error}); allowed: the name that `dump --out` was given") from None
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{about_file} is no {FORMAT} of version {VERSION}; allowed: what `dump --out` wrote")
    if about["sha256"] != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{arrays_file} is not the file that {about_file} was written with; allowed: both of one dump")
    named = dict(_as_it_was(name, a) for name, a in safetensors.numpy.load(content).items())
    layers = {entry["path"]: _read_layer(entry) for entry in about["layers"]}
    runs = {name: _read_run(name, entry, about["framework"], layers, named) for name, entry in about["runs"].items()}
    for run in runs.values():
        run.tensors = runs["free"].tensors
    noise = {(phase, (layer, index)): float(value) for phase, layer, index, value in about["noise"]}
    own = runs.get("own")
    numbered = enumerate(own.calls if own is not None else [])
    return Evidence(
        runs["free"],
        runs.get("forced"),
        noise,
        own,
        {call.key: named[f"exact/{n}"] for n, call in numbered if f"exact/{n}" in named},
        {name: _answer(named, name, buffer) for name, buffer in about.get("answers", {}).items()},
        _states(named),
        notes=about.get("notes", []),
        details=about["details"],
        name=str(path),
        sha256=about["sha256"],
    )


def _as_file_has_it(name: str, a: NDArray) -> tuple[str, NDArray]:
    """Complex numbers as [..., 2], as the format has no complex128."""
    if a.dtype.kind == "c":
        return f"{name}{COMPLEX}", np.stack([a.real, a.imag], -1)
    return name, np.array(a, order="C")


def _as_it_was(name: str, a: NDArray) -> tuple[str, NDArray]:
    return (name.removesuffix(COMPLEX), a[..., 0] + 1j * a[..., 1]) if name.endswith(COMPLEX) else (name, a)


def _answer(named: Mapping[str, NDArray], name: str, buffer: float | None) -> Response:
    fields: dict[str, Any] = {field: named.get(f"answer/{name}/{field}") for field in ANSWER}
    return Response(buffer=buffer, **fields)


def _states(named: Mapping[str, NDArray]) -> list[dict[str, NDArray]]:
    states: dict[int, dict[str, NDArray]] = {}
    for key, a in named.items():
        if key.startswith("state/"):
            _, number, name = key.split("/", 2)
            states.setdefault(int(number), {})[name] = a
    return [states[number] for number in sorted(states)]


def arrays(recording: Recording) -> Iterator[tuple[str, NDArray]]:
    """Every array by its name in the file."""
    for name, attribute in MAPS.items():
        yield from ((f"{name}/{full}", a) for full, a in getattr(recording, attribute).items())
    for name, attribute in LISTS.items():
        yield from _numbered(name, getattr(recording, attribute))
    for n, call in enumerate(recording.calls):
        for name, attribute in CALL_LISTS.items():
            yield from _numbered(f"call/{n}/{name}", getattr(call, attribute))
        yield f"call/{n}/output", call.output
        if call.output_gradient is not None:
            yield f"call/{n}/output_gradient", call.output_gradient


def _numbered(name: str, given: list[NDArray | None]) -> Iterator[tuple[str, NDArray]]:
    yield from ((f"{name}/{i}", a) for i, a in enumerate(given) if a is not None)


def _layer(layer: Layer, recording: Recording) -> dict[str, Any]:
    fields = dataclasses.asdict(layer) | {"statistics": sorted(layer.statistics)}
    config = {name: v for name, v in layer.config.items() if _is_plain(v)}
    return fields | {"config": config, "calls": sum(call.path == layer.path for call in recording.calls)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _read_layer(entry: Mapping[str, Any]) -> Layer:
    fields = {f.name: entry[f.name] for f in dataclasses.fields(Layer)}
    config = {name: _as_tuple(v) for name, v in entry["config"].items()}
    return Layer(**fields | {"statistics": frozenset(entry["statistics"]), "config": config})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _run(recording: Recording) -> dict[str, Any]:
    return {
        "loss": recording.loss,
        "failure": None if recording.failure is None else recording.failure.error,
        "failed_in": None if recording.failure is None else [recording.failure.phase, recording.failure.layer],
        "dropout_off": recording.dropout_off,
        "dropouts": recording.dropouts,
        "output_names": recording.output_names,
        "calls": [{"path": call.path, "index": call.index} for call in recording.calls],
        "glue": [dataclasses.asdict(glue) for glue in recording.glue],
    }


def _read_run(
    name: str, entry: Mapping[str, Any], framework: Any, layers: dict[str, Layer], named: Mapping
) -> Recording:
    recording = Recording(framework, layers, loss=None if entry["loss"] is None else float(entry["loss"]))
    if entry["failure"] is not None:
        phase, layer = entry.get("failed_in") or ("forward", "")
        recording.failure = Failure(entry["failure"], layer, phase)
    recording.dropout_off = entry.get("dropout_off", False)
    recording.dropouts = [(rate, position) for rate, position in entry.get("dropouts", [])]
    recording.glue = [GlueCall(**glue) for glue in entry["glue"]]
    own = {key.removeprefix(f"{name}/"): a for key, a in named.items() if key.startswith(f"{name}/")}
    for key, attribute in MAPS.items():
        of_key = {k.removeprefix(f"{key}/"): a for k, a in own.items() if k.startswith(f"{key}/")}
        setattr(recording, attribute, of_key)
    for key, attribute in LISTS.items():
        setattr(recording, attribute, _list(own, key))
    recording.output_names = entry.get("output_names", [])
    recording.output_gradients += [None] * (len(recording.outputs) - len(recording.output_gradients))
    for n, call in enumerate(entry["calls"]):
        lists: dict[str, Any] = {attribute: _list(own, f"call/{n}/{key}") for key, attribute in CALL_LISTS.items()}
        gradient = own.get(f"call/{n}/output_gradient")
        recording.calls.append(Call(**call, output=own[f"call/{n}/output"], output_gradient=gradient, **lists))
    recording.input_gradients += [None] * (len(recording.inputs) - len(recording.input_gradients))
    for call in recording.calls:
        call.input_gradients += [None] * (len(call.inputs) - len(call.input_gradients))
    return recording


def _list(own: Mapping[str, NDArray], key: str) -> list[Any]:
    """[array or None] of KEY/0, KEY/1, ...; None where a number is left out."""
    numbers = [int(k.rpartition("/")[2]) for k in own if re.fullmatch(rf"{re.escape(key)}/\d+", k)]
    return [own.get(f"{key}/{i}") for i in range(max(numbers, default=-1) + 1)]


def plain(value: Any) -> Any:
    """As lists, dicts with names for keys, strings and numbers that JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
