"""Weights in files of every format: bit-exact, with their convention, whole or not at all; and `convert`."""

import json
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

import torch_bn
from parity import weights
from parity.cli import convert
from parity.sides import weight_files

NAMES = ["w.pt", "w.pth", "w.safetensors", "w.npz", "w", "w.orbax"]
METADATA = {"framework": "torch", "batch_norm": {"conv.1": {"momentum": 0.9, "unbiased_moving_var": False}}}


def arrays(separator):
    rng = np.random.default_rng(0)
    join = separator.join
    return {
        join(("params", "Conv_1", "kernel")): rng.normal(size=(2, 3, 4)).astype(np.float32),
        join(("params", "Conv_0", "kernel")): rng.normal(size=(3, 2)),
        join(("params", "Conv_0", "bias")): rng.normal(size=3).astype(ml_dtypes.bfloat16),
        join(("params", "Dense_0", "bias")): rng.normal(size=2).astype(np.float16),
        join(("batch_stats", "BatchNorm_0", "num_batches_tracked")): np.array(7, np.int32),
        join(("batch_stats", "BatchNorm_0", "var")): np.array([np.nan, np.inf, -0.0], np.float32),
    }


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    given = arrays("/")
    weight_files.save(tmp_path / name, given, METADATA)
    found = weight_files.load(tmp_path / name)
    assert list(found.tensors) == list(given)  # the order of layers travels too
    for key, value in given.items():
        assert found.tensors[key].dtype == value.dtype
        assert found.tensors[key].shape == value.shape
        assert found.tensors[key].tobytes() == value.tobytes()
    assert found.metadata == METADATA
    assert found.framework == "flax"
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing temporary is left


@pytest.mark.parametrize("name", NAMES)
def test_of_either_framework(name, tmp_path):
    """A state_dict and nested variables, as their frameworks have them, without any metadata."""
    state = torch_bn.BLeNet().to(torch.bfloat16).state_dict()
    weight_files.save(tmp_path / name, state)
    found = weight_files.load(tmp_path / name)
    assert found.framework == "torch"
    assert found.metadata == {}
    assert all(torch.equal(weights.as_tensor(found.tensors[n]), v) for n, v in state.items())
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((2, 3))}}}
    weight_files.save(tmp_path / f"flax-{name}", variables)
    assert weight_files.nested(weight_files.load(tmp_path / f"flax-{name}").tensors)["params"]["Dense_0"][
        "kernel"
    ].shape == (2, 3)


def test_files_of_others(tmp_path):
    state = torch.nn.BatchNorm1d(2).state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "trainer.pth")
    safetensors.numpy.save_file({"weight": np.ones(2)}, tmp_path / "plain.safetensors")
    np.savez(tmp_path / "plain.npz", weight=np.ones(2))
    for name in ("plain.pt", "trainer.pth", "plain.safetensors", "plain.npz"):
        found = weight_files.load(tmp_path / name)
        np.testing.assert_array_equal(found.tensors["weight"], np.ones(2))
        assert found.metadata == {}
    # And others read ours.
    weight_files.save(tmp_path / "ours.pt", state, METADATA)
    torch.nn.BatchNorm1d(2).load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    weight_files.save(tmp_path / "ours.safetensors", state, METADATA)
    assert set(safetensors.numpy.load_file(tmp_path / "ours.safetensors")) == set(state)


class Code:
    def __reduce__(self):
        return (print, ("it ran",))


def test_no_code_is_run(tmp_path, capsys):
    torch.save({"weight": Code()}, tmp_path / "bad.pt")
    np.savez(tmp_path / "bad.npz", weight=np.array([Code()], dtype=object))
    for name in ("bad.pt", "bad.npz"):
        with pytest.raises(ValueError, match="can't be read as"):
            weight_files.load(tmp_path / name)
    assert "it ran" not in capsys.readouterr().out


def test_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    torch.save([1], tmp_path / "list.pt")
    for name, words in {
        "nowhere.pt": "does not exist; allowed: .pt",
        "bad.safetensors": "can't be read as .safetensors",
        "list.pt": "holds no state_dict",
        "folder": "folder without a checkpoint",
    }.items():
        with pytest.raises(ValueError, match=words):
            weight_files.load(tmp_path / name)
    (tmp_path / "w.bin").touch()
    for path, words in {
        tmp_path / "w.bin": r"suffix of .* is .bin; allowed: .pt",
        tmp_path / "no" / "w.pt": "does not exist; allowed: an existing folder",
        tmp_path / "folder": "is a folder; allowed",
    }.items():
        with pytest.raises(ValueError, match=words):
            weight_files.save(path, {"a": np.ones(1)})


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.pt", "w.orbax"])
def test_whole_or_not_at_all(name, tmp_path, monkeypatch):
    if name != "w.orbax":
        weight_files.save(tmp_path / name, {"a": np.ones(1)})

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(OSError, match="no space left"):
        weight_files.save(tmp_path / name, {"params/a": np.zeros(1)})
    if name == "w.orbax":
        assert list(tmp_path.iterdir()) == []
    else:
        assert [path.name for path in tmp_path.iterdir()] == [name]
        np.testing.assert_array_equal(weight_files.load(tmp_path / name).tensors["a"], np.ones(1))


def test_no_framework_is_needed(tmp_path):
    """safetensors and npz need neither."""
    weight_files.save(tmp_path / "w.safetensors", {"a": np.ones(1)})
    program = (
        "import sys; sys.modules['torch'] = sys.modules['jax'] = sys.modules['flax'] = None\n"
        "from parity import files, kinds, rules\n"
        f"assert files.load({str(tmp_path / 'w.safetensors')!r}).tensors['a'] == 1\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


MODELS = """
import flax.linen as nn
import torch

def torch_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

def flax_net():
    return nn.Sequential([nn.Conv(4, (3, 3), padding="VALID"), nn.BatchNorm(use_running_average=True)])

def broken():
    raise RuntimeError("out of order")
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "convert_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield {"torch_module": "convert_models:torch_net", "flax_module": "convert_models:flax_net"}
    sys.modules.pop("convert_models", None)


def test_convert_and_back(models, tmp_path, capsys):
    import convert_models

    state = convert_models.torch_net().state_dict()
    torch.save(state, tmp_path / "a.pt")
    assert convert.convert(tmp_path / "a.pt", tmp_path / "b.safetensors", **models) == 0
    said = capsys.readouterr().out
    assert "6 tensors from" in said
    assert "momentum (weight of the old value) is 0.9 in PyTorch and 0.99 in Flax" in said
    found = weight_files.load(tmp_path / "b.safetensors")
    assert found.metadata["framework"] == "flax"
    # They were kept by PyTorch's rules, whatever Flax goes on with.
    assert found.metadata["batch_norm"]["1"]["unbiased_moving_var"] is True
    assert convert.convert(tmp_path / "b.safetensors", tmp_path / "c.npz", **models) == 0
    back = weight_files.load(tmp_path / "c.npz")
    assert back.metadata["batch_norm"] == found.metadata["batch_norm"]
    for name, value in state.items():
        np.testing.assert_array_equal(back.tensors[name], value.numpy())


BAD = {
    "no file": ({"source": "nowhere.pt"}, "does not exist"),
    "no colon": ({"torch_module": "convert_models"}, "--torch-module is 'convert_models'; allowed:"),
    "no module": ({"flax_module": "nowhere:net"}, "there is no module"),
    "no factory": ({"flax_module": "convert_models:nowhere"}, "convert_models has no nowhere"),
    "broken": ({"torch_module": "convert_models:broken"}, "fails: RuntimeError: out of order"),
    "wrong kind": (
        {"torch_module": "convert_models:flax_net"},
        "--torch-module is 'convert_models:flax_net', which gives Sequential; allowed: a torch.nn.Module",
    ),
    "map": ({"layer_map": ("a",)}, "--map is 'a'; allowed"),
    "inputs": ({"inputs": ("nowhere.npy",)}, "--inputs is nowhere.npy"),
    "target": ({"target": "b.bin"}, "suffix of b.bin"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_convert_refuses(change, words, models, tmp_path, capsys):
    import convert_models

    torch.save(convert_models.torch_net().state_dict(), tmp_path / "a.pt")
    options = {"source": "a.pt", "target": "b.npz"} | models | change
    source, target = (convert.Path(options.pop(name)) for name in ("source", "target"))
    assert convert.convert(source, target, **options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "b.npz").exists()


def test_metadata_is_plain_json(tmp_path):
    weight_files.save(tmp_path / "w.orbax", {"params": {"a": np.ones(1)}}, METADATA)
    assert json.loads((tmp_path / "w.orbax" / weight_files.METADATA).read_text())["metadata"] == METADATA
