"""Weights in files: .pt and .pth, .safetensors, .npz, and Orbax's folders; with them the convention they are meant in.

A file is written whole or not at all. Each framework is imported only where its own format is read or written. What is
read may be damaged or hostile: it raises ValueError, and takes memory as its file is large, or as was expected.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import uuid
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from bn_common.files import write_whole
from bn_common.installed import need
from parity.records import array_files, strict_json
from parity.records.array_files import BFLOAT16, SAFE, an_object, one_line
from parity.sides.module import is_tensor

SUFFIXES = (".pt", ".pth", ".safetensors", ".npz", ".orbax")
METADATA = "parity.json"
_KEY = "parity"
# What weights are, of what safetensors can hold: PyTorch computes with no other whole numbers.
_SAFE = {name: dtype for name, dtype in SAFE.items() if name not in ("U64", "U32", "U16")}


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


def load(path: str | os.PathLike, expected: int | None = None) -> Weights:
    """Read weights.

    A .pt is read with `weights_only=True`: it runs no code. It may hold a state_dict, or {"state_dict": ...} as
    training frameworks write it. Checksums are compared where the format has them (.npz, .pt).

    Args:
      path: the file, or Orbax's folder.
      expected: how many bytes of weights there should be, at most: a compressed file that promises more is not
        unpacked. None: a multiple of the file's own size.

    Raises:
      ValueError: no such file, another suffix, or not what the suffix says; in one line.
      ModuleNotFoundError: the framework of this format is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; allowed: {', '.join(SUFFIXES)} or an Orbax folder")
    if not path.is_dir():
        _check_suffix(path)
    reader = {".safetensors": _load_safetensors, ".npz": _load_npz}.get(path.suffix, _load_torch)
    try:
        if not path.is_dir():
            array_files.check_regular(path)
        return (_load_orbax if path.is_dir() else reader)(path, expected)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        what = "by Orbax" if path.is_dir() else f"as {path.suffix or 'weights'}"
        raise ValueError(f"{path} can't be read {what}: {kind}{one_line(error)}") from error


def expected_bytes(shapes: Iterable[Sequence[int]]) -> int:
    """What a module of these shapes may be written as, at most: in float64, with two moments of an optimiser beside."""
    return 3 * 8 * sum(math.prod(shape) for shape in shapes)


def expected_of(torch_module: Any) -> int | None:
    """The same of one of PyTorch's modules; None of one that has not seen its inputs yet."""
    try:
        return expected_bytes(v.shape for v in torch_module.state_dict().values() if is_tensor(v))
    except RuntimeError:  # what an uninitialised parameter says of its shape
        return None


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
            return value.view(torch.int16).numpy().view(BFLOAT16)
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


def _load_safetensors(path: Path, expected: int | None) -> Weights:
    tensors, metadata = array_files.read_safetensors(path.read_bytes(), _SAFE)
    entry = _about(metadata.get(_KEY, "{}"))
    return Weights({name: tensors[name] for name in _ordered(entry, tensors)}, entry["metadata"])


def _about(text: str | bytes) -> dict[str, Any]:
    """What `save` wrote besides, checked; of files of others, empty."""
    entry = an_object(strict_json.loads(text), _KEY)
    an_object(entry.setdefault("metadata", {}), "metadata")
    for key in ("names", "bfloat16"):
        names = entry.setdefault(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key} is {str(names)[:80]}; allowed: a list of names")
    return entry


def _ordered(entry: Mapping[str, Any], names: Mapping[str, Any]) -> list[str]:
    """All names that there are, those that `save` wrote down in its order."""
    return list(dict.fromkeys([*(name for name in entry["names"] if name in names), *names]))


def _npz_bytes(arrays: Mapping[str, NDArray], about: Mapping[str, Any]) -> bytes:
    # npz has no bfloat16: its bits go as uint16, and the metadata say which these are.
    narrow = [name for name, a in arrays.items() if a.dtype == BFLOAT16]
    entry = json.dumps({"metadata": dict(about), "bfloat16": narrow})
    plain = {name: a.view(np.uint16) if name in narrow else a for name, a in arrays.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **{METADATA: np.array(entry)}, **plain)  # type: ignore[arg-type]  # names are keywords here
    return buffer.getvalue()


def _load_npz(path: Path, expected: int | None) -> Weights:
    tensors = array_files.read(path, expected)
    if "" in tensors:
        raise ValueError("it holds one array without a name")
    wrong = [f"{name[:80]!r} is {a.dtype}" for name, a in tensors.items() if a.dtype.kind not in "biufcU"]
    entry = _about(str(tensors.pop(METADATA, np.array("{}"))))
    wrong += [f"{name[:80]!r} is {a.dtype}" for name, a in tensors.items() if a.dtype.kind == "U"]
    wrong += [f"{name[:80]!r} is no bfloat16" for name in entry["bfloat16"] if not _is_uint16(tensors.get(name))]
    if wrong:
        raise ValueError(f"{wrong[0]}; allowed: arrays of numbers")
    for name in entry["bfloat16"]:
        tensors[name] = tensors[name].view(BFLOAT16)
    return Weights(tensors, entry["metadata"])


def _is_uint16(a: NDArray | None) -> bool:
    return a is not None and a.dtype == np.uint16


# PyTorch


def _torch_bytes(arrays: Mapping[str, NDArray], about: Mapping[str, Any]) -> bytes:
    import collections

    import torch

    state: Any = collections.OrderedDict()
    for name, a in arrays.items():
        is_narrow = a.dtype == BFLOAT16
        tensor = torch.from_numpy(np.array(a.view(np.int16) if is_narrow else a))
        state[name] = tensor.view(torch.bfloat16) if is_narrow else tensor
    # Where PyTorch itself keeps the version of its layers: the state_dict stays one.
    state._metadata = collections.OrderedDict({_KEY: json.dumps(about)})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _load_torch(path: Path, expected: int | None) -> Weights:
    need("a .pt file", "torch")
    import pickle

    import torch

    most = array_files.allowed_bytes(path, expected)
    if zipfile.is_zipfile(path):  # else of before PyTorch 1.6, without checksums
        _check_zip(path, most)
    else:
        _check_pickle(path.read_bytes())
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose advice is to let it run
        raise ValueError("it holds more than tensors, or is damaged; allowed: a state_dict of tensors") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    fine = isinstance(state, Mapping) and all(
        isinstance(name, str) and isinstance(v, torch.Tensor) for name, v in state.items()
    )
    if not fine:
        raise ValueError('it holds no state_dict, and no {"state_dict": ...}')
    # One number may stand for many: a tensor expanded from one.
    size = sum(math.prod(v.shape) * v.element_size() for v in state.values())
    if size > most:
        raise ValueError(f"its tensors have {size / 1e6:.0f} MB; allowed: {most / 1e6:.0f} MB")
    about = getattr(state, "_metadata", None)
    about = about.get(_KEY) if isinstance(about, Mapping) else None
    entry = strict_json.loads(about) if isinstance(about, str) else {}
    return Weights({name: _as_array(v) for name, v in state.items()}, an_object(entry, _KEY))


def _check_zip(path: Path, most: int) -> None:
    """The members' CRC, which PyTorch's own reader passes over, and how much there is to unpack."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        array_files.check_members(members, most)
        has_checksums = any(member.CRC for member in members)  # PyTorch can be told to write none
        for member in members:
            if not has_checksums:
                member.CRC = None  # type: ignore[assignment]  # so that it is not compared
            is_pickle, content = member.filename.endswith(".pkl"), []
            for chunk in array_files.chunks(archive, member):
                content += [chunk] if is_pickle else []
            _check_pickle(b"".join(content))


def _check_pickle(content: bytes) -> None:
    """Of what PyTorch lets a pickle make, bytearray(n) alone takes n bytes without their being in the file."""
    if b"c__builtin__\nbytearray\n" in content or b"cbuiltins\nbytearray\n" in content:
        raise ValueError("it holds more than tensors; allowed: a state_dict of tensors")


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


def _load_orbax(path: Path, expected: int | None) -> Weights:
    need("an Orbax folder", "jax")
    import orbax.checkpoint as ocp

    if not (path / "_CHECKPOINT_METADATA").exists() and not (path / "_METADATA").exists():
        raise ValueError("it is a folder without a checkpoint; allowed: a folder that Orbax has written")
    beside = path / METADATA
    entry = _about(beside.read_bytes() if beside.exists() else "{}")
    with ocp.StandardCheckpointer() as checkpointer:
        promised = _promised_bytes(checkpointer.metadata(path.absolute()))
        array_files.check_bytes(promised, array_files.allowed_bytes(path, expected))
        tree = checkpointer.restore(path.absolute())
    flat = _flat(tree)
    return Weights({name: np.asarray(flat[name]) for name in _ordered(entry, flat)}, entry["metadata"])


def _promised_bytes(about: Any) -> int:
    """What the arrays of a checkpoint take, by their own headers: as they are, or in the parts that are unpacked."""
    about = getattr(about, "item_metadata", about)
    tree, total = getattr(about, "tree", about), 0
    if tree is None:
        raise ValueError("it does not say what is in it")
    leaves = [tree]
    while leaves:
        leaf = leaves.pop()
        if isinstance(leaf, (Mapping, list, tuple)):
            leaves += leaf.values() if isinstance(leaf, Mapping) else leaf
            continue
        part = getattr(getattr(leaf, "storage", None), "chunk_shape", None) or ()
        size = max(math.prod(getattr(leaf, "shape", None) or ()), math.prod(part))
        total += size * np.dtype(getattr(leaf, "dtype", None) or np.float64).itemsize
    return total


def read_weights(path: Path, option: str = "--weights", expected: int | None = None) -> dict[str, NDArray]:
    """Weights by full names from any file that `parity.sides.weight_files` reads; `expected` as in `load`.

    Raises:
      ValueError: no such file, or one that can't be read.
    """
    try:
        return load(path, expected).tensors
    except ValueError as error:
        allowed = "" if "allowed:" in str(error) else f"; allowed: {', '.join(SUFFIXES)}"
        raise ValueError(f"{option}: {error}{allowed}") from None


def checked(
    given: Mapping[str, NDArray], shapes: Mapping[str, Any], tables: Collection[str], name: str
) -> Mapping[str, NDArray]:
    """The weights `given`, which are those of a module of Flax's.

    Raises:
      ValueError: they are not; the message says what is missing, of another shape or there besides.
    """
    problems = [f"lacks {n}" for n in shapes if n not in given]
    problems += [f"has {n} of another shape" for n, v in shapes.items() if n in given and given[n].shape != v.shape]
    problems += [f"has {n}, too" for n in given if n not in shapes and n not in tables]
    if problems:
        raise ValueError(f"--weights {name} {', '.join(problems)}; allowed: those of this module")
    return given
