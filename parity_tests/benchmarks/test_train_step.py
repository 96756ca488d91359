"""The benchmark of the training step from outside and from inside; nothing here depends on a time."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import train_step
from benchmarks.step import peers, scaling
from benchmarks.step.network import Affine, Norm, channels_last, draw_weights, load_data
from benchmarks.step.report import plot
from benchmarks.step.rounds import Measured, Plan, compare, interval_of_median, measure, paired_ratio, started
from benchmarks.step.worker import Setting

QUICK_NAMES = {
    *("jax_bn", "torch_bn", "torch_native", "flax.linen", "flax.nnx", "haiku", "equinox", "keras-jax", "keras-torch")
}
FIELDS = {
    *("name", "mode", "batch_size", "fig_size", "threads", "median_ms", "min_ms", "max_ms", "ratio", "rounds"),
    *("compile_s", "peak_memory_mib"),
}


@pytest.fixture
def tiny(monkeypatch):
    """A run of seconds: two rounds of two steps, in all modes, at batch 8."""
    monkeypatch.setattr(train_step, "QUICK", Plan(rounds=2, seconds=0.0))
    monkeypatch.setattr(train_step, "QUICK_CELLS", (("train", 8), ("predict", 8)))
    monkeypatch.setattr(train_step, "QUICK_SIZES", scaling.Sizes((4,), ()))
    monkeypatch.setattr(scaling, "NAMES", ("jax_bn", "torch_native"))


@pytest.mark.thorough  # eight processes, each with its framework; two of them are in the next test
def test_a_quick_run(tiny, tmp_path, capsys):
    """Checked, measured, printed and written: rows with all their fields, the plots, the page."""
    args = ["--quick", "--peers", "torch_bn", "--threads", "1", "--scaling"]
    files = ["--json", tmp_path / "step.json", "--write", tmp_path / "page.md", "--plot", tmp_path / "bars.svg"]
    train_step.main([*args, *map(str, files)])
    assert {p.name for p in tmp_path.iterdir()} == {"step.json", "step.png", "page.md", "page.png", "bars.svg"}
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["machine"]["threads"] == 1
    assert {"CPU", "cores", "jax", "torch", "busy"} <= set(found["machine"])
    names = ["torch_bn", "torch_native"]
    cells = [(row["mode"], row["name"]) for row in found["rows"]]
    assert cells == [(mode, name) for mode in ("train", "predict") for name in names]
    for row in found["rows"] + found["scaling"]:
        assert set(row) == FIELDS
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["compile_s"] > 0
        assert row["peak_memory_mib"] > 10
        assert row["rounds"] == 2
        assert row["name"] != "torch_native" or row["ratio"] == 1
    assert [(row["name"], row["batch_size"]) for row in found["scaling"]] == [("jax_bn", 4), ("torch_native", 4)]
    what = ["torch_bn / torch_native", "jax_bn scan / jax_bn", "jax_bn with its input / jax_bn"]
    assert [row["what"] for row in found["comparisons"]] == [f"time, {pair}" for pair in what]
    assert all(row["low"] <= row["value"] <= row["high"] for row in found["comparisons"])
    page = (tmp_path / "page.md").read_text()
    assert "--quick --scaling --threads 1 --peers torch_bn --write docs/page.md" in page
    assert str(tmp_path) not in page
    for text in (page, capsys.readouterr().out):
        assert all(name in text for name in (*names, "Training step, batch 8, 1 thread", what[2]))
    assert (tmp_path / "bars.svg").read_text().startswith("<?xml")


def test_another_network_is_refused(monkeypatch, tmp_path, tiny, capsys):
    """A peer that is BLeNet but for Keras's epsilon ends the run, is named, and nothing is written."""
    monkeypatch.setitem(
        peers.PEERS, "flax.linen", peers.Peer("parity_tests.benchmarks.planted_step:other_epsilon", "torch", "torch")
    )
    with pytest.raises(SystemExit) as stop:
        train_step.main(["--quick", "--peers", "flax.linen", "--threads", "1", "--json", str(tmp_path / "a.json")])
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert "flax.linen does not train the same network: the loss of step 1 is" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_losses_are_compared():
    """The first to float32's rounding, the fifth to what Adam makes of it; a NaN is not the same."""
    reference = [2.3, 2.2, 2.1, 2.0, 1.9]
    peers.check_losses("a", [2.300001, 2.2, 2.1, 2.0, 1.90001], reference)
    with pytest.raises(ArithmeticError, match="a does not train the same network: the loss of step 1 is"):
        peers.check_losses("a", [2.3001, 2.2, 2.1, 2.0, 1.9], reference)
    for last in (1.901, float("nan")):
        with pytest.raises(ArithmeticError, match="loss of step 5"):
            peers.check_losses("a", [*reference[:4], last], reference)
    for logits in (np.array([1.0, 2.001]), np.array([1.0, np.nan]), np.array([1.0])):
        with pytest.raises(ArithmeticError, match="a does not predict"):
            peers.check_logits("a", logits, np.array([1.0, 2.0]))


@pytest.mark.parametrize(
    "args",
    [
        ["--threads", "0"],
        ["--threads", "4096"],
        ["--peers", "torch"],
        ["--json", "no/such/folder/file"],
        ["--json", "same.png"],
        ["--write", "."],
        ["--plot", "bars.txt"],
        ["--rounds", "3"],
    ],
    ids=str,
)
def test_bad_options(args, capsys):
    """Exit status 2 and one line, before anything is measured."""
    with pytest.raises(SystemExit) as stop:
        train_step.main(args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith("python -m benchmarks.train_step: error: ")
    assert "allowed: " in err
    assert args[1] in err or args[0] in err


def test_what_is_not_there_is_left_out(monkeypatch):
    """With a line that says so: a library, and the compiler that torch.compile needs."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    here, missing = peers.available(peers.PEERS | {"x": peers.Peer("x:make", "no_such_module", "jax")})
    assert not any(peer.compiles for peer in here.values())
    assert "x is left out: no_such_module is not installed (pip install '.[bench]')" in missing
    assert "torch_bn compiled is left out: torch.compile needs a C++ compiler, no-such-compiler" in missing


def test_quick_is_the_nine():
    """Names that others rely on; those that are no more than a variant are measured in a full run."""
    assert {name for name, peer in peers.PEERS.items() if peer.is_quick} == QUICK_NAMES


def test_a_process_that_ends_is_named():
    """And not waited for."""
    broken = {"b": peers.Peer("parity_tests.benchmarks.planted_step:ends", "torch", "torch")}
    console = Console(quiet=True)
    with started(broken, 1) as workers, pytest.raises(EOFError, match="the process of b has ended"):
        measure(workers, Setting("train", 8), Plan(1, 0.0), train_step.Calibration(), console)


def test_comparisons():
    """With the fastest peer of each framework, by its median; what was not measured is left out."""
    times = {"jax_bn": 6.0, "jax_bn scan": 7.0, "torch_native": 10.0, "torch_native fused Adam": 8.0, "haiku": 16.0}
    times |= {"flax.linen": 20.0, "keras-torch": 30.0}
    measured = Measured({n: [t, 2 * t] for n, t in times.items()}, [{"name": "jax_bn", "compile_s": 7.0}])
    found = {row["what"]: row for row in compare(Setting("train", 256), measured, peers.PEERS)}
    assert {what: (row["value"], row["met"]) for what, row in found.items()} == {
        "time, jax_bn / torch_native": (0.6, True),
        "time, jax_bn / torch_native fused Adam": (0.75, False),
        "time, jax_bn / haiku": (0.375, True),
        "seconds of the first step, jax_bn": (7.0, False),
    }
    (row,) = compare(Setting("predict", 1), measured, peers.PEERS)
    assert (row["what"], row["bound"], row["batch_size"]) == ("time, jax_bn / torch_native fused Adam", 1.0, 1)


def test_plot():
    """Of either kind, a part for each table."""
    row = {"name": "a", "mode": "train", "batch_size": 8, "threads": 1, "median_ms": 2.0, "min_ms": 1.0, "max_ms": 9.0}
    assert plot([row, row | {"mode": "predict"}], Path("a.png")).startswith(b"\x89PNG")
    assert b"</svg>" in plot([row], Path("a.svg"))


def test_ratios_are_paired():
    """A slow round is slow for both sides."""
    assert paired_ratio([1.0, 20.0, 3.0], [2.0, 40.0, 6.0]) == 0.5


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (25, 8), (61, 23)])
def test_interval_of_the_median(n, rank):
    """The ranks of the tables of order statistics."""
    values = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert interval_of_median(values.tolist()) == (rank, n + 1 - rank)


def test_weights_and_batches():
    """Weights in the other layout are the same linear maps; batches are standardised, labels theirs."""
    weights = draw_weights(56)
    assert weights.linear3.weight.shape == (120, 16 * 144)
    there = channels_last(weights)
    image = np.random.default_rng(0).normal(size=(16, 12, 12))
    y = image.transpose(1, 2, 0).reshape(-1) @ there.linear3.weight
    np.testing.assert_allclose(y, weights.linear3.weight @ image.reshape(-1), 1e-5, 1e-5)
    assert there.conv2.weight[1, 2, 3, 4] == weights.conv2.weight[4, 3, 1, 2]
    assert sum(isinstance(layer, Affine | Norm) for layer in weights) == 9
    data = load_data(64, 56)
    assert data.images.shape[1:] == (56, 56)
    x, labels = data.batches()[0]
    assert x.shape == (64, 56, 56)
    assert x.dtype == np.float32
    assert abs(x.mean()) < 0.3
    assert 0.7 < x.std() < 1.3
    assert labels.tolist() == data.labels[data.indices[0]].tolist()
