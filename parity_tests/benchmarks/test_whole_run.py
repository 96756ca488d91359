"""The benchmark of whole runs, with programs that train nothing; nothing here depends on a time."""

import json

import pytest

from benchmarks import whole_run

# What the training programs leave, without the training.
PROGRAM = """
import json, pathlib, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(options["--out"])
out.mkdir()
reached = float(options["--until-accuracy"])
lines = [{"start_time": time.time(), "test_accuracy": accuracy} for accuracy in (0.2, reached)]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.setattr(whole_run, "PROGRAMS", {"jax": ["-c", PROGRAM], "torch": ["-c", PROGRAM]})


def test_runs_in_turns(programs, tmp_path, capsys):
    """JAX's first has nothing compiled; then both in turns; printed and written with all that was found."""
    files = ["--json", str(tmp_path / "runs.json"), "--write", str(tmp_path / "page.md")]
    whole_run.main(["--data", "sample", "--accuracy", "0.85", "--rounds", "2", *files])
    found = json.loads((tmp_path / "runs.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["jax", "jax", "torch", "jax", "torch"]
    assert [row["cache"] for row in found["rows"]] == ["empty", "filled", "", "filled", ""]
    for row in found["rows"]:
        assert (row["epochs"], row["test_accuracy"]) == (2, 0.85)
        assert 0 < row["first_step_s"] <= row["whole_run_s"] + 0.1
        assert row["peak_memory_mib"] > 1
    assert found["met"] == (found["second_start_s"] <= 3)
    page = (tmp_path / "page.md").read_text()
    assert "--accuracy 0.85 --data sample --write docs/whole_run_speed.md" in page
    assert str(tmp_path) not in page
    for text in (page, capsys.readouterr().out):
        assert text.count("train_jax.py") >= 3
        assert "0.8500" in text


def test_a_program_that_fails_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(whole_run, "PROGRAMS", {"jax": ["-c", "raise SystemExit('no such thing')"], "torch": []})
    with pytest.raises(SystemExit) as stop:
        whole_run.main(["--data", "sample", "--json", str(tmp_path / "a.json")])
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert "has ended with status 1: no such thing" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args",
    [["--accuracy", "1"], ["--accuracy", "nan"], ["--rounds", "0"], ["--write", "no/such/file"]],
    ids=str,
)
def test_bad_options(args, capsys):
    """Exit status 2 and one line, before anything runs."""
    with pytest.raises(SystemExit) as stop:
        whole_run.main(args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith("python -m benchmarks.whole_run: error: ")
    assert "allowed: " in err
