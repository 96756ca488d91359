"""Weights in files: .pt and .pth, .safetensors, .npz, and Orbax's folders; with them the convention they are meant in.

A file is written whole or not at all. Each framework is imported only where its own format is read or written.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from bn_common.files import write_whole

SUFFIXES = (".pt", ".pth", ".safetensors", ".npz", ".orbax")
METADATA = "parity.json"
_KEY = "parity"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What safetensors calls numpy's types. Its own reader for numpy knows no bfloat16.
_SAFE = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": _BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
      tensors: full name -> array; PyTorch's names have dots, Flax's begin with the collection: "params/Conv_0/kernel".
      metadata: what was saved with them, such as the convention of the batch norms; empty for files of others.
    """

    tensors: dict[str, NDArray]
    metadata: dict[str, Any]

    @property
    def framework(self) -> str:
        """Whose names they are: "flax" or "torch"."""
        return "flax" if any(name.split("/")[0] in ("params", "batch_stats") for name in self.tensors) else "torch"


def save(path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Write weights in the format that the path's suffix says; without one or with .orbax, an Orbax folder.

    A .pt holds a state_dict that `load_state_dict` takes as it is.

    Args:
      path: where; a file there is replaced, a folder is not.
      tensors: PyTorch's state_dict, Flax's variables (nested or flat), or arrays by full name.
      metadata: of JSON's types.

    Raises:
      ValueError: another suffix; a folder that is there already; no folder to write to.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} is in a folder that does not exist; allowed: an existing folder")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; allowed: a path where there is none, nothing is overwritten")
    arrays = {name: _as_array(v) for name, v in _flat(tensors).items()}
    about = dict(metadata or {})
    if path.suffix in ("", ".orbax"):
        _save_orbax(path, arrays, about)
    else:
        writer = {".safetensors": _safetensors_bytes, ".npz": _npz_bytes}.get(path.suffix, _torch_bytes)
        write_whole(path, writer(arrays, about))


def load(path: str | os.PathLike) -> Weights:
    """Read weights.

    A .pt is read with `weights_only=True`: it runs no code. It may hold a state_dict, or {"state_dict": ...} as
    training frameworks write it.

    Raises:
      ValueError: no such file, another suffix, or not what the suffix says.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; allowed: {', '.join(SUFFIXES)} or an Orbax folder")
    if path.is_dir():
        return _load_orbax(path)
    _check_suffix(path)
    reader = {".safetensors": _load_safetensors, ".npz": _load_npz}.get(path.suffix, _load_torch)
    try:
        return reader(path)
    except Exception as error:
        raise ValueError(f"{path} can't be read as {path.suffix}: {type(error).__name__}: {error}") from error


def nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Flax's variables by full name as nested dicts."""
    tree: dict[str, Any] = {}
    for name, value in tensors.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree


def _check_suffix(path: Path) -> None:
    if path.suffix not in (*SUFFIXES, ""):
        raise ValueError(f"the suffix of {path} is {path.suffix}; allowed: {', '.join(SUFFIXES)}, or none for Orbax")


def _flat(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _as_array(value: Any) -> NDArray:
    if type(value).__module__.split(".")[0] == "torch" or hasattr(value, "detach"):
        import torch

        value = value.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(_BFLOAT16)
        return value.numpy()
    return np.array(value, order="C")


# Safetensors and npz


def _safetensors_bytes(arrays: Mapping[str, NDArray], about: Mapping[str, Any]) -> bytes:
    wrong = [f"{name} is {a.dtype}" for name, a in arrays.items() if a.dtype not in _SAFE.values()]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}; allowed: {', '.join(str(dtype) for dtype in _SAFE.values())}")
    # safetensors sorts the tensors, and their order may be all that tells the order of the layers.
    entry = json.dumps({"metadata": dict(about), "names": list(arrays)})
    return safetensors.numpy.save(dict(arrays), metadata={_KEY: entry})


def _load_safetensors(path: Path) -> Weights:
    content = path.read_bytes()
    tensors = {}
    for name, view in safetensors.deserialize(content):
        tensors[name] = np.frombuffer(bytes(view["data"]), _SAFE[view["dtype"]]).reshape(view["shape"]).copy()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    entry = json.loads(header.get("__metadata__", {}).get(_KEY, "{}"))
    names = [name for name in entry.get("names", ()) if name in tensors] or [name for name in header if name in tensors]
    return Weights({name: tensors[name] for name in names}, entry.get("metadata", {}))


def _npz_bytes(arrays: Mapping[str, NDArray], about: Mapping[str, Any]) -> bytes:
    # npz has no bfloat16: its bits go as uint16, and the metadata say which these are.
    narrow = [name for name, a in arrays.items() if a.dtype == _BFLOAT16]
    entry = json.dumps({"metadata": dict(about), "bfloat16": narrow})
    plain = {name: a.view(np.uint16) if name in narrow else a for name, a in arrays.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **{METADATA: np.array(entry)}, **plain)  # type: ignore[arg-type]  # names are keywords here
    return buffer.getvalue()


def _load_npz(path: Path) -> Weights:
    with np.load(path, allow_pickle=False) as file:
        tensors = {name: file[name] for name in file.files}
    entry = json.loads(str(tensors.pop(METADATA, np.array("{}"))))
    for name in entry.get("bfloat16", []):
        tensors[name] = tensors[name].view(_BFLOAT16)
    return Weights(tensors, entry.get("metadata", {}))


# PyTorch


def _torch_bytes(arrays: Mapping[str, NDArray], about: Mapping[str, Any]) -> bytes:
    import collections

    import torch

    state: Any = collections.OrderedDict()
    for name, a in arrays.items():
        is_narrow = a.dtype == _BFLOAT16
        tensor = torch.from_numpy(np.array(a.view(np.int16) if is_narrow else a))
        state[name] = tensor.view(torch.bfloat16) if is_narrow else tensor
    # Where PyTorch itself keeps the version of its layers: the state_dict stays one.
    state._metadata = collections.OrderedDict({_KEY: json.dumps(about)})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _load_torch(path: Path) -> Weights:
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError('it holds no state_dict, and no {"state_dict": ...}')
    about = getattr(state, "_metadata", {}).get(_KEY, "{}")
    return Weights(
        {name: _as_array(v) for name, v in state.items()}, json.loads(about) if isinstance(about, str) else {}
    )


# Orbax


def _save_orbax(path: Path, arrays: Mapping[str, NDArray], about: Mapping[str, Any]) -> None:
    import orbax.checkpoint as ocp

    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary, nested(arrays))
            checkpointer.wait_until_finished()
        (temporary / METADATA).write_text(json.dumps({"metadata": about, "names": list(arrays)}))
        os.rename(temporary, path)
    finally:
        for left in path.parent.glob(f"{temporary.name}*"):  # Orbax has a temporary folder of its own
            shutil.rmtree(left, ignore_errors=True)


def _load_orbax(path: Path) -> Weights:
    import orbax.checkpoint as ocp

    if not (path / "_CHECKPOINT_METADATA").exists() and not (path / "_METADATA").exists():
        raise ValueError(f"{path} is a folder without a checkpoint; allowed: a folder that Orbax has written")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(path.absolute())
    except Exception as error:
        raise ValueError(f"{path} can't be read by Orbax: {type(error).__name__}: {error}") from error
    beside = path / METADATA
    entry = json.loads(beside.read_text()) if beside.exists() else {}
    flat = _flat(tree)
    names = [name for name in entry.get("names", []) if name in flat] or list(flat)
    return Weights({name: np.asarray(flat[name]) for name in names}, entry.get("metadata", {}))


def read_weights(path: Path, option: str = "--weights") -> dict[str, NDArray]:
    """Weights by full names from any file that `parity.sides.weight_files` reads.

    Raises:
      ValueError: no such file, or one that can't be read.
    """
    try:
        return load(path).tensors
    except ValueError as error:
        allowed = "" if "allowed:" in str(error) else f"; allowed: {', '.join(SUFFIXES)}"
        raise ValueError(f"{option}: {error}{allowed}") from None
