"""Damaged and hostile files of weights and inputs: one line, no memory, nothing run."""

import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile

import flax.linen
import numpy as np
import pytest
import torch

import parity
from image_data import read_idx
from parity.cli import convert
from parity.cli.named_objects import read_arrays
from parity.records import array_files, dump_file, strict_json
from parity.sides import weight_files
from parity.weights import ParityWarning
from parity_tests import damage


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_damaged_weights(suffix, tmp_path):
    """Every cut and 200 damages more; and those of a file that has checksums are seen."""
    path = tmp_path / f"w{suffix}"
    weight_files.save(path, damage.arrays(), {"framework": "flax"})
    content = path.read_bytes()
    for damaged in damage.every_kind(content, np.random.default_rng(0), 260):
        path.write_bytes(damaged)
        damage.tried(lambda: weight_files.load(path), len(damaged))
    path.write_bytes(content)
    assert damage.tried(lambda: weight_files.load(path), len(content)) is None


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_a_flipped_bit_of_a_number_is_seen(suffix, tmp_path):
    """PyTorch's own reader passes over the CRC of what it reads."""
    path = tmp_path / f"w{suffix}"
    a = np.arange(100, dtype=np.float32)
    weight_files.save(path, {"a": a})
    content = bytearray(path.read_bytes())
    content[content.find(a.tobytes()) + 41] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\{suffix} can't be read as \{suffix}: (BadZipFile: )?Bad CRC-32"):
        weight_files.load(path)


def test_a_file_without_checksums_is_read(tmp_path):
    """PyTorch can be told to write none."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(weight_files.load(tmp_path / "w.pt").tensors["a"], [0, 1, 2])


def bomb(path, megabytes):
    """A .npz of a thousandth of that size."""
    header = io.BytesIO()
    shape = (megabytes << 18,)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("weight.npy", "w") as file:
        file.write(header.getvalue())
        for _ in range(megabytes):
            file.write(bytes(1 << 20))


MODULES = """
import torch, flax.linen
def net(): return torch.nn.Linear(3, 4)
def flax_net(): return flax.linen.Dense(4)
"""


def test_what_unpacks_to_too_much(tmp_path, monkeypatch, capsys):
    """By the file's own size alone, and by what the module may have: before anything is unpacked."""
    bomb(tmp_path / "w.npz", 200)
    said = damage.tried(lambda: weight_files.load(tmp_path / "w.npz"), 0)
    assert said is not None
    assert "it unpacks to 210 MB; allowed: " in said
    assert "it unpacks to 210 MB" in damage.tried(lambda: read_arrays("--inputs", tmp_path / "w.npz"), 0)
    # What is expected counts, in either direction.
    bomb(tmp_path / "v.npz", 70)
    assert weight_files.load(tmp_path / "v.npz", expected=70 << 20).tensors["weight"].nbytes == 70 << 20
    assert "it unpacks to 73 MB; allowed: 67 MB" in damage.tried(lambda: weight_files.load(tmp_path / "v.npz", 1), 0)
    (tmp_path / "nets_of_a_test.py").write_text(MODULES)
    monkeypatch.setitem(sys.modules, "nets_of_a_test", None)  # so that what is imported is taken away again
    del sys.modules["nets_of_a_test"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(array_files, "MOST_TIMES", 10**6)
    names = {"torch_module": "nets_of_a_test.py:net", "flax_module": "nets_of_a_test.py:flax_net"}
    assert convert.convert(tmp_path / "w.npz", tmp_path / "x.npz", **names) == 2
    assert "it unpacks to 210 MB; allowed: 67 MB" in capsys.readouterr().err


def test_a_checkpoint_that_unpacks_to_too_much(tmp_path, monkeypatch):
    """Orbax writes a million zeros into some hundred bytes: their shapes are read before they are."""
    weight_files.save(tmp_path / "w", {"params/Dense_0/kernel": np.zeros((1000, 2000), np.float32)})
    assert weight_files.load(tmp_path / "w").tensors["params/Dense_0/kernel"].shape == (1000, 2000)
    monkeypatch.setattr(array_files, "ALWAYS", 1 << 20)
    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.restore", lambda *_: pytest.fail("it was unpacked"))
    for expected in (None, 1 << 20):
        with pytest.raises(ValueError, match="it unpacks to 8 MB; allowed: "):
            weight_files.load(tmp_path / "w", expected)


def test_a_checkpoint_that_is_damaged(tmp_path):
    """Whatever Orbax and its storage say of it is one line, if they say anything.

    But for the index of all files, manifest.ocdbt and d/: where that is damaged, tensorstore 0.1 reads on in threads of
    its own while it tells so, and one time in ten the process ends with a segmentation fault. See docs/limits.md.
    """
    whole = tmp_path / "whole"
    weight_files.save(whole, damage.arrays(), {"framework": "flax"})
    rng = np.random.default_rng(3)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    names = [name for name in names if name.parts[0] not in ("d", "manifest.ocdbt")]
    assert len(names) > 5
    for i, name in enumerate(names):
        shutil.copytree(whole, tmp_path / f"w{i}")
        content = (whole / name).read_bytes()
        steps = [(("flip", "cut", "drop")[rng.integers(3)], rng.random(), int(rng.integers(512)))]
        (tmp_path / f"w{i}" / name).write_bytes(damage.damaged(content, steps))
        damage.tried(lambda i=i: weight_files.load(tmp_path / f"w{i}"), 1 << 20)


def test_a_size_that_is_a_lie(tmp_path):
    """A member that unpacks to more than it says costs no more than it says."""
    bomb(tmp_path / "w.npz", 100)
    content = bytearray((tmp_path / "w.npz").read_bytes())
    size = zipfile.ZipFile(tmp_path / "w.npz").infolist()[0].file_size.to_bytes(4, "little")
    for _ in range(content.count(size)):
        at = content.find(size)
        content[at : at + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "w.npz").write_bytes(content)
    said = damage.tried(lambda: weight_files.load(tmp_path / "w.npz"), 0)
    assert said is not None
    assert "can't be read as .npz" in said


NORMS = """
import torch, flax.linen
def net(): return torch.nn.BatchNorm1d(3).eval()
def flax_net(): return flax.linen.BatchNorm(use_running_average=True)
"""


def test_variances_below_zero_are_said_aloud(tmp_path, monkeypatch, capsys):
    """By `convert` either way, and by `check` and `compare`: prediction takes their square root on both sides."""
    (tmp_path / "norms_of_a_test.py").write_text(NORMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"torch_module": "norms_of_a_test:net", "flax_module": "norms_of_a_test:flax_net"}
    said = "running_var: variances below 0"
    layer = torch.nn.BatchNorm1d(3).eval()
    layer.running_var[1] = -0.5
    weight_files.save(tmp_path / "a.pt", layer.state_dict())
    for source, target in (("a.pt", "b.npz"), ("b.npz", "c.pt")):
        assert convert.convert(tmp_path / source, tmp_path / target, **names) == 0
        assert said in capsys.readouterr().out
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    options = {"train": False, "flax_call": lambda module, variables, x, train: module.apply(variables, x)}
    report = parity.check(layer, flax.linen.BatchNorm(use_running_average=True), x, **options)
    assert any(said in note for note in report.notes)
    assert any("batch_stats/var: variances below 0" in note for note in report.notes)
    assert not report.ok  # NaN on both sides is nothing that was compared
    layer.running_var[1] = 0.5
    assert parity.check(layer, flax.linen.BatchNorm(use_running_average=True), x, **options).notes == []


def test_functions_say_variances_below_zero_too():
    layer, twin = torch.nn.BatchNorm1d(3), flax.linen.BatchNorm(use_running_average=True)
    layer.running_var[1] = -0.5
    with pytest.warns(ParityWarning, match="^running_var: variances below 0"):
        variables = parity.to_flax(layer, twin)
    with pytest.warns(ParityWarning, match="^running_var: variances below 0"):
        state = parity.to_torch(variables, layer, flax_module=twin)
    assert torch.equal(state["running_var"], layer.running_var)


def test_the_byte_order_of_another_machine(tmp_path):
    """The numbers count, from files and in memory; neither framework takes them as they are."""
    w = np.arange(6, dtype=">f4").reshape(2, 3)
    np.savez(tmp_path / "w.npz", **{"params/kernel": w, "params/bias": np.ones(3, ">f8")})
    np.save(tmp_path / "w.npy", w)
    read = [
        weight_files.load(tmp_path / "w.npz").tensors["params/kernel"],
        read_arrays("--inputs", tmp_path / "w.npy")[""],
    ]
    for a in read:
        assert a.dtype == np.float32
        assert a.dtype.isnative
        np.testing.assert_array_equal(a, w)
    variables = {"params": {"kernel": w, "bias": np.ones(3, ">f4")}}
    layer = torch.nn.Linear(2, 3)
    state = parity.to_torch(variables, layer, flax_module=flax.linen.Dense(3))
    np.testing.assert_array_equal(state["weight"].numpy(), w.T)
    layer.load_state_dict(state)
    x = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    assert parity.check(layer, flax.linen.Dense(3), x.astype(">f4"), variables=variables).ok


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="there is no wider one here")
def test_numbers_that_no_framework_has(tmp_path):
    wide = np.ones((2, 3), np.longdouble)
    np.savez(tmp_path / "w.npz", a=wide)
    with pytest.raises(ValueError, match=r"it holds float128; allowed: numbers of up to 64 bits"):
        weight_files.load(tmp_path / "w.npz")
    layer, twin = torch.nn.Linear(2, 3), flax.linen.Dense(3)
    variables = {"params": {"kernel": wide, "bias": np.ones(3, np.float32)}}
    with pytest.raises(ValueError, match=r"params/kernel is float128; allowed: floating point"):
        parity.to_torch(variables, layer, flax_module=twin)
    with pytest.raises(ValueError, match="params/kernel is float128; allowed: numbers of up to 64 bits"):
        parity.check(layer, twin, np.ones((4, 2), np.float32), variables=variables)
    with pytest.raises(TypeError, match="one of inputs is float128; allowed: numbers of up to 64 bits"):
        parity.check(layer, twin, np.ones((4, 2), np.longdouble))


def test_names_that_would_steer_a_terminal(tmp_path, monkeypatch, capsys):
    """In what `convert` says, in errors and in warnings, a name is in the line in which it is told."""
    (tmp_path / "steered_nets_of_a_test.py").write_text(MODULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"torch_module": "steered_nets_of_a_test:net", "flax_module": "steered_nets_of_a_test:flax_net"}
    arrays = {"params/kernel": np.ones((3, 4), np.float32), "params/bias": np.ones(4, np.float32)}
    weight_files.save(tmp_path / "a.npz", arrays | {"params/\x1b[2J\nx": np.ones(1, np.float32)})
    assert convert.convert(tmp_path / "a.npz", tmp_path / "b.pt", **names) == 2
    told = r"params/\x1b[2J\nx is left over: the target has no place for it"
    assert capsys.readouterr().err.splitlines() == ["python -m parity convert: error: 1 problem(s):", f"  {told}"]
    with pytest.raises(ValueError, match=r"^--inputs is .*, which can't be read"):
        read_arrays("--inputs", tmp_path / "\x1b.npy")
    layer, twin = torch.nn.BatchNorm1d(3), flax.linen.BatchNorm(use_running_average=True)
    state = {f"\x1b.{name}": v for name, v in layer.state_dict().items()}
    state["\x1b.running_var"] = -torch.ones(3)
    with pytest.warns(ParityWarning, match=r"^\\x1b\.running_var: variances below 0"):
        parity.to_flax(state, twin)


@pytest.mark.skipif(not os.path.exists(os.devnull) or os.name == "nt", reason="no device has a path there")
def test_what_is_no_regular_file(tmp_path):
    """A pipe may never begin, and /dev/zero never end: neither is opened. This one would do no harm."""
    names = "w.npz", "w.pt", "w.safetensors", "x.npy", "d.json", "images"
    for name in names:
        (tmp_path / name).symlink_to(os.devnull)
    (tmp_path / "d.safetensors").write_bytes(b"")
    for name in names[:3]:
        with pytest.raises(ValueError, match=r"can't be read as \.\w+: it is no regular file"):
            weight_files.load(tmp_path / name)
    with pytest.raises(ValueError, match="it is no regular file"):
        read_arrays("--inputs", tmp_path / "x.npy")
    with pytest.raises(ValueError, match="it is no regular file"):
        dump_file.load(tmp_path / "d")
    assert not dump_file.is_dump(tmp_path / "d")
    with pytest.raises(ValueError, match="images: found no regular file; expected an IDX file"):
        read_idx(tmp_path / "images")


def test_a_pickle_that_asks_for_memory(tmp_path):
    """PyTorch lets one make a bytearray of any size, in files of either of its formats."""
    asks = b"\x80\x02}X\x01\x00\x00\x00ac%s\nbytearray\nJ\x00\x00\x00\x10\x85Rs."  # {"a": bytearray(2**28)}
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    before = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, sizes))
    for module in (b"builtins", b"__builtin__"):
        with zipfile.ZipFile(tmp_path / "new.pt", "w") as archive:
            for name, content in {"data.pkl": asks % module, "version": "3\n", "byteorder": "little"}.items():
                archive.writestr(f"a/{name}", content)
        (tmp_path / "old.pt").write_bytes(before + asks % module + pickle.dumps([], 2))
        for name in ("new.pt", "old.pt"):
            said = damage.tried(lambda name=name: weight_files.load(tmp_path / name), 0)
            assert said is not None
            assert "it holds more than tensors; allowed: a state_dict of tensors" in said


def test_headers_that_numpy_would_have_trusted(tmp_path):
    """Its advice is an option that is not there."""
    for version, size in (b"\x01\x00", struct.pack("<H", 65_000)), (b"\x02\x00", struct.pack("<I", 4_000_000_000)):
        (tmp_path / "x.npy").write_bytes(b"\x93NUMPY" + version + size + b"(" * 65_000)
        with pytest.raises(ValueError, match=r"a header is said to have \d+ bytes; allowed: 10000\)"):
            read_arrays("--inputs", tmp_path / "x.npy")


def test_one_number_that_stands_for_many(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="its tensors have 4000 MB; allowed: 67 MB"):
        weight_files.load(tmp_path / "w.pt")


def test_a_header_that_promises_more(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    (tmp_path / "x.npy").write_bytes(header.getvalue() + bytes(80))
    with pytest.raises(ValueError, match=r"--inputs is .* is said to be float64 \(1000000000000000,\), and has 208 b"):
        read_arrays("--inputs", tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "'a' is in it twice"),
        ('{"a": NaN}', "NaN is no number of JSON's"),
        ("1e999", "1e999 is beyond what a float holds"),
        ("[" * 200 + "]" * 200, "it is nested too deeply"),
        ("[" * 200_000, "it is nested too deeply"),
        ("1" * 5000, "Exceeds the limit"),
        (b'"\xff"', "byte 1 is no UTF-8"),
    ],
)
def test_json(text, said):
    with pytest.raises(ValueError, match=said):
        strict_json.loads(text)
    assert strict_json.loads('{"a": [1, 2.5, null, true, "x"]}') == json.loads('{"a": [1, 2.5, null, true, "x"]}')


def test_the_last_of_many_names_is_in_it_twice():
    """Each name is looked at once: pairwise, this would take hours."""
    with pytest.raises(ValueError, match="'199999' is in it twice"):
        strict_json.loads("{" + "".join(f'"{i}": 0, ' for i in range(200_000)) + '"199999": 1}')


def test_inputs_that_are_damaged(tmp_path):
    for name, write in {"x.npy": lambda f: np.save(f, np.eye(3)), "x.npz": lambda f: np.savez(f, a=np.eye(3))}.items():
        for damaged in damage.every_kind(damage.bytes_of(write), np.random.default_rng(1), 100):
            (tmp_path / name).write_bytes(damaged)
            damage.tried(lambda name=name: read_arrays("--inputs", tmp_path / name), len(damaged))


def test_objects_are_refused_for_what_they_are(tmp_path):
    """They would have to be unpickled, which runs whatever the file says."""
    np.savez(tmp_path / "objects.npz", a=np.array([{}, 1], object))
    with pytest.raises(ValueError, match="objects of Python's; allowed: numbers"):
        array_files.read(tmp_path / "objects.npz")
