"""Training in lockstep: correct pairs stay together, planted mistakes part, gauges are found; and the command."""

import json
import os

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import jax_bn
import torch_bn
from parity import trajectory
from parity.__main__ import main
from parity.cli import train as trajectory_command
from parity.sides.optimizers import MOMENTS, OPTIMIZERS
from parity.training import gauges
from parity.training.trajectory import REFEREES, Trajectory, Verdict
from parity.wings import blenet
from parity.wings.blenet import BLENET_GAUGES


@pytest.fixture(autouse=True)
def programs():
    """As whoever uses them has them: float32's rounding is looked at."""


def images(count=3, size=8, fig_size=12):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(size, 1, fig_size, fig_size)), rng.integers(0, 10, size)) for _ in range(count)]


def features(count=3, size=8):
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(size, 5)), rng.integers(0, 3, size)) for _ in range(count)]


class TorchMLP(torch.nn.Module):
    """A gauge (the first bias), a dropout, and a bias that is none."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.hidden = torch.nn.Linear(5, 7)
        self.norm = torch_bn.BatchNorm(num_features=7, num_dims=2, momentum=1 - momentum)
        self.drop = torch.nn.Dropout(0.5)
        self.out = torch.nn.Linear(7, 3)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.norm(self.hidden(x)))))


class FlaxMLP(nn.Module):
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(7, name="hidden")(x)
        x = jax_bn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(3, name="out")(x)


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(5, 7, rngs=rngs)
        self.norm = jax_bn.nnx.BatchNorm(7, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.norm(self.hidden(x))))


def mlp():
    torch.manual_seed(0)
    return TorchMLP()


def lockstep(flax_module=None, **options):
    options = {"steps": 6, "dtype": "float64", "lr": 0.01, **options}
    return trajectory.lockstep(mlp(), flax_module or FlaxMLP(), features(), **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_of_the_table(optimizer):
    """Parameters, statistics and the optimiser's buffers; float64, where every mistake in the table would show."""
    found = lockstep(optimizer=optimizer)
    assert found.ok, found.verdict
    expected = {"loss", "parameters", "statistics", *(f"optimizer {name}" for name in OPTIMIZERS[optimizer].state)}
    assert set(found.distances) == expected
    assert found.gauges == ["hidden.bias"]
    assert found.distances["parameters"][REFEREES][-1] < 1e-9


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_float32_against_its_referees(optimizer):
    found = lockstep(optimizer=optimizer, dtype="float32")
    assert found.ok, found.verdict
    assert 1e-9 < found.distances["parameters"]["Flax - Flax64"][-1] < 1e-3
    assert set(found.losses) == {"PyTorch", "Flax", "PyTorch64", "Flax64"}
    assert found.losses["PyTorch"][-1] < found.losses["PyTorch"][0]


def test_nnx():
    found = lockstep(NnxMLP(nnx.Rngs(0)), optimizer="momentum")
    assert found.ok, found.verdict


def test_blenet_and_its_gauges():
    torch.manual_seed(0)
    found = trajectory.lockstep(
        torch_bn.BLeNet(fig_size=12), jax_bn.BLeNet(fig_size=12), images(), steps=3, dtype="float64"
    )
    assert found.ok, found.verdict
    assert found.gauges == sorted(BLENET_GAUGES)


def test_the_statistic_that_follows_a_gauge_is_found():
    batch = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in features()[0]]
    seen = []

    def find(make, inputs, target, original=gauges.find):
        seen.append(original(make, inputs, target))
        return seen[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectory, "find", find)
        lockstep(steps=1)
    ((bias, statistic, rate),) = seen[0].followers
    assert (bias, statistic) == ("hidden.bias", "norm.moving_mean")
    assert rate == pytest.approx(0.1)
    assert len(batch) == 2


def shifted(**options):
    """Adam with one mistake on Flax's side."""
    return trajectory.PairedOptimizer(OPTIMIZERS["adam"].torch, lambda lr: optax.adam(lr, **options), MOMENTS)


@pytest.mark.parametrize(
    ("options", "kind", "step"),
    [
        ({"optimizer": shifted(eps=1e-7)}, "parameters", 1),
        ({"optimizer": shifted(b2=0.99)}, "optimizer exp_avg_sq", 1),
        ({"flax_module": FlaxMLP(momentum=0.99)}, "statistics", 1),
    ],
    ids=["eps", "beta", "momentum"],
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_planted_mistakes_part(options, kind, step, dtype):
    """In float32 too: it is the referees that part."""
    found = lockstep(**options, dtype=dtype, steps=2)
    assert not found.ok
    assert found.first_over.step == step
    assert found.first_over.between == REFEREES
    assert kind in {k for k, b in found.bounds.items() if found.distances[k][REFEREES][0] > b[REFEREES][0]}
    assert "apart at step 1" in found.verdict


def test_a_side_that_rounds_carelessly_parts():
    """The referees agree, and one side is more than four times as far from its own as the other and as rounding."""
    found = Trajectory("sgd", 0.1, "float32")
    verdict = Verdict(found)
    for far in (3e-7, 1e-5):
        losses = dict.fromkeys(["PyTorch", "Flax", "PyTorch64", "Flax64"], 1.0)
        near = {pair: {"parameters": 1e-16 if "64'" in pair[0] else 1e-7} for pair in verdict.pairs}
        near["PyTorch64", "Flax64"] = {"parameters": 1e-15}
        near["Flax", "Flax64"] = {"parameters": far}
        verdict.add(losses, near)
    step, kind, between, distance, bound = found.first_over
    assert (step, kind, between, distance) == (2, "parameters", "Flax - Flax64", 1e-5)
    assert bound == pytest.approx(4 * np.finfo(np.float32).eps)


def test_files_and_table(tmp_path, monkeypatch):
    found = lockstep(steps=2)
    found.to_json(tmp_path / "a.json")
    found.plot(tmp_path / "a.png")
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["ok"]
    assert read["steps"] == 2
    assert len(read["distances"]["parameters"][REFEREES]) == 2
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert found.table().row_count == 3 * len(found.distances)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found.dtype = "other"
    monkeypatch.setattr(os, "fsync", lambda _: os.write(-1, b""))  # as a full disk: OSError
    for write, name in ((found.to_json, "a.json"), (found.plot, "a.png")):
        with pytest.raises(OSError, match="Bad file descriptor"):
            write(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps is 0; allowed: an integer >= 1"),
        ({"lr": 0.0}, "lr is 0.0; allowed: > 0"),
        ({"dtype": "float16"}, "dtype is 'float16'; allowed: 'float32', 'float64'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; allowed: sgd"),
    ],
    ids=str,
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words.replace("'", ".")):
        lockstep(**options)


def test_no_batches_and_other_parameters():
    with pytest.raises(ValueError, match="batches is empty"):
        trajectory.lockstep(mlp(), FlaxMLP(), [])
    with pytest.raises(ValueError, match="no counterpart"):
        trajectory.lockstep(torch.nn.Linear(5, 3, bias=False), nn.Dense(3), features())


def test_modules_are_left_as_they_are():
    module = mlp()
    before = {n: v.clone() for n, v in module.state_dict().items()}
    trajectory.lockstep(module, FlaxMLP(), features(), steps=1)
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
    assert module.drop.p == 0.5


def test_command(tmp_path, capsys):
    """The whole program on BLeNet, two steps."""
    args = ["train", "--steps", "2", "--batch-size", "16", "--optimizer", "sgd", "--dtype", "float64"]
    assert main([*args, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "together for 2 steps of sgd in float64" in out
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"trajectory.json", "trajectory.png"}


def test_command_with_modules_of_ones_own_that_part(capsys, monkeypatch):
    rng = np.random.default_rng(0)
    given = [(rng.normal(size=(8, 5)), rng.integers(0, 3, 8))]
    monkeypatch.setattr(trajectory_command, "batches", lambda *args: given)
    names = ["--torch", f"{__name__}:TorchMLP", "--flax", f"{__name__}:wrong_flax"]
    assert main(["train", "--steps", "1", "--dtype", "float64", *names]) == 1
    assert "apart at step 1" in capsys.readouterr().out


def wrong_flax():
    return FlaxMLP(momentum=0.5)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--steps", "0"], "--steps is 0; allowed: an integer >= 1"),
        (["--optimizer", "lion"], "--optimizer is lion; allowed: sgd, momentum"),
        (["--torch", "a:b"], "--torch and --flax is a:b and None; allowed: both or neither"),
        (["--dtype", "half"], "--dtype is half; allowed: float32 or float64"),
    ],
    ids=str,
)
def test_command_refuses(args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", *args])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_batches_are_those_of_training():
    first, *_ = list(blenet.batches(64, 2, seed=3))
    assert first[0].shape == (64, 1, 28, 28)
    assert first[0].dtype == np.float64
    again, *_ = list(blenet.batches(64, 1, seed=3))
    assert np.array_equal(first[0], again[0])
