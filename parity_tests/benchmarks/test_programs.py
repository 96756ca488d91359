"""The two benchmarks from outside, with whichever peers are installed."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import batch_norm, exactness, torch_peers
from benchmarks.harness import installed
from benchmarks.peers import MODES, Peer, Result, check, definition
from benchmarks.worker import draw
from truth.hard_inputs import CONSTANT, HARD_INPUTS

ROOT = Path(__file__).parents[2]


def run(program, *args):
    command = [sys.executable, "-W", "error", "-m", f"benchmarks.{program}", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.thorough
def test_a_quick_run(tmp_path):
    """Every peer in every mode, ratios to a reference that is in the run; JAX's is not ours."""
    done = run(
        "batch_norm", "--quick", "--shapes", "8,3", "--json", tmp_path / "times.json", "--write", tmp_path / "a.md"
    )
    assert done.returncode == 0, done.stderr
    assert "8 x 3" in done.stdout
    report = json.loads((tmp_path / "times.json").read_text())
    assert report["machine"]["cores"] >= 1
    rows = {(row["framework"], row["name"], row["mode"]): row for row in report["rows"]}
    names = {(framework, name) for framework, name, _ in rows}
    assert {("jax", "jax_bn"), ("jax", "flax.linen"), ("torch", "torch_bn"), ("torch", "torch native")} <= names
    assert set(rows) == {(*peer, mode) for peer in names for mode in MODES}
    for (framework, _, mode), row in rows.items():
        assert row["shape"] == [8, 3]
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["ratio"] > 0
        assert row["ratio_to"] != "jax_bn"
        assert rows[framework, row["ratio_to"], mode]["ratio"] == 1
    for text in (done.stdout, (tmp_path / "a.md").read_text()):
        assert all(name in text for name in ("jax_bn", "torch native", "8 x 3", f"jax {jax.__version__}"))


@pytest.mark.parametrize(
    ("program", "args"),
    [
        ("batch_norm", ["--shapes", "8"]),
        ("batch_norm", ["--shapes", "8,x"]),
        ("batch_norm", ["--shapes", "1,3"]),
        ("batch_norm", ["--json", "no/such/folder/file"]),
        ("batch_norm", ["--write", "no/such/folder/file"]),
        ("batch_norm", ["--rounds", "3"]),
        ("exactness", ["--write", "no/such/folder/file"]),
        ("exactness", ["--write", "."]),
        ("exactness", ["--seed", "-1"]),
        ("exactness", ["--seed", "x"]),
    ],
    ids=str,
)
def test_bad_options(program, args, capsys):
    """Exit status 2 and one line, before anything is measured."""
    module = {"batch_norm": batch_norm, "exactness": exactness}[program]
    with pytest.raises(SystemExit) as stop:
        module.main(args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith(f"python -m benchmarks.{program}: error: ")
    assert args[-1] in err or args[-2] in err
    assert "allowed: " in err or args[-1] == "x", err


def test_what_is_not_installed_is_left_out():
    """With a line that says so and how to get it."""
    here, missing = installed({"a": Peer(draw, "json"), "b": Peer(draw, "no_such_module")})
    assert list(here) == ["a"]
    assert missing == ["b is left out: no_such_module is not installed (pip install '.[bench]')"]


def test_another_function_is_refused():
    """A peer is only measured if it computes batch norm: each output is looked at."""
    start, x, dy = draw((16, 3, 2, 2))
    truth, layer = definition(start, x, dy), torch_peers.PEERS["torch_bn"].make(start)
    calls = torch_peers.calls(layer, x, dy)
    prediction = torch_peers.read_eval(layer, calls["eval"]())
    result = torch_peers.read_step(layer, calls["forward+backward"]())
    check("torch_bn", start, truth, layer, result, prediction)
    for what in Result._fields:
        wrong = result._replace(**{what: getattr(result, what) * 1.01})
        with pytest.raises(ArithmeticError, match=f"{what} is off"):
            check("torch_bn", start, truth, layer, wrong, prediction)
    with pytest.raises(ArithmeticError, match="y in prediction is off"):
        check("torch_bn", start, truth, layer, result, prediction * np.float32(1.01))


@pytest.mark.parametrize("name", HARD_INPUTS)
def test_hard_inputs(name):
    """float32, repeatable, another for another seed, and what they are called."""
    a, b, c = HARD_INPUTS[name](3), HARD_INPUTS[name](3), HARD_INPUTS[name](4)
    assert all(v.dtype == np.float32 for v in a)
    assert a.x.shape == a.dy.shape
    assert a.gamma.shape == a.beta.shape == a.x.shape[1:2]
    assert all(np.array_equal(v, w, equal_nan=True) for v, w in zip(a, b, strict=True))
    assert not np.array_equal(a.dy, c.dy)
    flat = np.moveaxis(a.x, 1, 0).reshape(a.x.shape[1], -1)
    assert (flat.max(1) == flat.min(1)).all() == (name in CONSTANT)


def test_exactness_of_ours():
    """The program's own measure of the wing in PyTorch: exact at a constant channel, clean beside a NaN."""
    modules = {"torch_bn": torch_peers, "torch native": torch_peers}
    errors = {
        name: exactness.measure(name, HARD_INPUTS[name](0), modules) for name in ("constant", "NaN in one channel")
    }
    assert errors["constant"]["y"]["torch_bn"] == 0
    assert errors["constant"]["y"]["torch native"] > 1000
    assert errors["NaN in one channel"]["y"]["torch_bn"] <= 8


COMPACT = {0: "0", 1e-5: "<0.001", 0.123: "0.12", 1: "1.0", 9.96: "10", 41.2: "41", 99.7: "1.0e2", 1234: "1.2e3"}


@pytest.mark.parametrize(("value", "text"), [*COMPACT.items(), (2.5e12, "2.5e12"), (float("inf"), "NaN")])
def test_compact(value, text):
    assert exactness.compact(value) == text
