"""A recording as two files that any environment reads: NAME.safetensors with the arrays, NAME.json with the rest.

The JSON file:

    {"format": "parity dump", "version": 1, "sha256": of the other file, "checksum": of all else in this one,
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

The checksum is the SHA-256 of the other fields as JSON with sorted names, without spaces, in ASCII. Older dumps have
none. What a file may hold, field by field, is in `records/dump_schema.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from bn_common.files import write_whole
from parity.records import array_files, dump_schema, strict_json
from parity.records.answers import Response
from parity.records.constructors import is_plain
from parity.records.dump_schema import numbered
from parity.records.evidence import Evidence
from parity.records.recording import Call, Failure, GlueCall, Layer, Recording

FORMAT, VERSION = "parity dump", 1
COMPLEX = " complex"
LISTS = {"input": "inputs", "input_gradient": "input_gradients", "output": "outputs"}
LISTS |= {"output_gradient": "output_gradients"}
GRADIENTS = {"input": "input_gradient", "output": "output_gradient"}
MAPS = {"tensor": "tensors", "new_statistic": "new_statistics", "gradient": "gradients"}
ANSWER = "gradients", "parameters", "updates", "rates", "asked", "sums"
CALL_LISTS = {"input": "inputs", "arrived": "arrived", "input_gradient": "input_gradients"}


def files_of(path: str | Path) -> tuple[Path, Path]:
    """The two files of a dump, arrays and JSON, by their common name or the name of either."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


def is_dump(path: str | Path) -> bool:
    """Whether both files are there and the JSON says so, or did before it was damaged."""
    arrays, about = files_of(path)
    try:
        content = about.read_bytes() if arrays.is_file() and about.is_file() else b""
    except OSError:
        return False
    try:
        read = strict_json.loads(content)
    except ValueError:
        return FORMAT.encode() in content
    return isinstance(read, dict) and read.get("format") == FORMAT


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
    about = plain(about)
    about["checksum"] = checksum(about)
    write_whole(arrays_file, content)
    write_whole(about_file, (json.dumps(about, indent=1, allow_nan=False) + "\n").encode())


def checksum(about: Mapping[str, Any]) -> str:
    """SHA-256 of all fields but the checksum itself, however the file is indented and its names are sorted."""
    rest = {name: value for name, value in about.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load(path: str | Path) -> Evidence:
    """Read a dump.

    Raises:
      ValueError: no dump, one of another version, or two files that do not belong together.
    """
    arrays_file, about_file = files_of(path)
    for file in (arrays_file, about_file):
        with _named(file):
            array_files.check_regular(file)
    try:
        content, about = arrays_file.read_bytes(), about_file.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} is no dump ({error}); allowed: the name that `dump --out` was given") from None
    with _named(about_file):
        read = strict_json.loads(about)
    if not isinstance(read, dict) or (read.get("format"), read.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{about_file} is no {FORMAT} of version {VERSION}; allowed: what `dump --out` wrote")
    with _named(about_file):
        dump_schema.check(read)
        if "checksum" in read and read["checksum"] != checksum(read):
            raise ValueError("it was changed since it was written: its checksum is that of something else")
    if read["sha256"] != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{arrays_file} is not the file that {about_file} was written with; allowed: both of one dump")
    with _named(arrays_file):
        held, _ = array_files.read_safetensors(content)
        named = _as_they_were(held)
        dump_schema.check_names(read, named)
        dump = _evidence(read, named)
    dump.name, dump.sha256 = str(path), read["sha256"]
    return dump


def load_whole(path: str | Path) -> Evidence:
    """The same of a dump that is to be compared: all is in it, and of shapes that belong together.

    Raises:
      ValueError: as `load`, or something is missing.
    """
    dump = load(path)
    with _named(files_of(path)[1]):
        dump_schema.check_whole(dump)
    return dump


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """ValueError in one line that names the file."""
    try:
        yield
    except ValueError as error:
        allowed = "" if "allowed:" in str(error) else "; allowed: a file as `dump --out` wrote it"
        raise ValueError(f"{file}: {error}{allowed}") from None


def _evidence(about: Mapping[str, Any], named: Mapping[str, NDArray]) -> Evidence:
    """What the checked JSON and the arrays say."""
    layers = {entry["path"]: _read_layer(entry) for entry in about["layers"]}
    runs = {name: _read_run(name, entry, about["framework"], layers, named) for name, entry in about["runs"].items()}
    for run in runs.values():
        run.tensors = runs["free"].tensors
    noise = {(phase, (layer, index)): float(value) for phase, layer, index, value in about["noise"]}
    own = runs.get("own")
    calls = enumerate(own.calls if own is not None else [])
    return Evidence(
        runs["free"],
        runs.get("forced"),
        noise,
        own,
        {call.key: named[f"exact/{n}"] for n, call in calls if f"exact/{n}" in named},
        {name: _answer(named, name, buffer) for name, buffer in about.get("answers", {}).items()},
        _states(named),
        notes=about.get("notes", []),
        details=about["details"],
    )


def _as_file_has_it(name: str, a: NDArray) -> tuple[str, NDArray]:
    """Complex numbers as [..., 2], as the format has no complex128."""
    if a.dtype.kind == "c":
        return f"{name}{COMPLEX}", np.stack([a.real, a.imag], -1)
    return name, np.array(a, order="C")


def _as_they_were(held: Mapping[str, NDArray]) -> dict[str, NDArray]:
    made = {}
    for name, a in held.items():
        if name.endswith(COMPLEX):
            if a.shape[-1:] != (2,) or a.dtype.kind != "f" or name.removesuffix(COMPLEX) in held:
                raise ValueError(f"{ascii(name)[:80]} is {a.dtype} {a.shape}; allowed: floats [..., 2], once")
            made[name.removesuffix(COMPLEX)] = a[..., 0] + 1j * a[..., 1]
        else:
            made[name] = a
    return made


def _answer(named: Mapping[str, NDArray], name: str, buffer: float | None) -> Response:
    fields: dict[str, Any] = {field: named.get(f"answer/{name}/{field}") for field in ANSWER}
    return Response(buffer=buffer, **fields)


def _states(named: Mapping[str, NDArray]) -> list[dict[str, NDArray]]:
    states: dict[str, dict[str, NDArray]] = {}
    for key, a in named.items():
        if key.startswith("state/"):
            _, number, name = key.split("/", 2)
            states.setdefault(number, {})[name] = a
    if {*states} != {str(i) for i in range(len(states))}:
        raise ValueError(f"its states are {', '.join(states)[:80]}; allowed: all from 0")
    return [states[str(i)] for i in range(len(states))]


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
    config = {name: v for name, v in layer.config.items() if is_plain(v)}
    return fields | {"config": config, "calls": sum(call.path == layer.path for call in recording.calls)}


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
        "rounds_loss": recording.rounds_loss,
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
    recording.rounds_loss = entry.get("rounds_loss", False)
    recording.dropout_off = entry.get("dropout_off", False)
    recording.dropouts = [(rate, position) for rate, position in entry.get("dropouts", [])]
    recording.glue = [GlueCall(**glue) for glue in entry["glue"]]
    own = {key.removeprefix(f"{name}/"): a for key, a in named.items() if key.startswith(f"{name}/")}
    for key, attribute in MAPS.items():
        of_key = {k.removeprefix(f"{key}/"): a for k, a in own.items() if k.startswith(f"{key}/")}
        setattr(recording, attribute, of_key)
    for values, gradients in GRADIENTS.items():
        held = numbered(named, f"{name}/{values}")
        setattr(recording, LISTS[values], held)
        setattr(recording, LISTS[gradients], numbered(named, f"{name}/{gradients}", len(held)))
    recording.output_names = entry.get("output_names", [])
    for n, call in enumerate(entry["calls"]):
        inputs, arrived = (numbered(named, f"{name}/call/{n}/{key}") for key in ("input", "arrived"))
        by_inputs = numbered(named, f"{name}/call/{n}/input_gradient", len(inputs))
        output, gradient = own[f"call/{n}/output"], own.get(f"call/{n}/output_gradient")
        recording.calls.append(
            Call(
                **call,
                inputs=inputs,
                output=output,
                arrived=arrived,
                input_gradients=by_inputs,
                output_gradient=gradient,
            )
        )
    return recording


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
