"""What is counted in compiled programs, on small ones that are known; nothing here needs an accelerator's compiler."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from benchmarks.accelerators import __main__ as accelerators
from benchmarks.accelerators import programs
from benchmarks.accelerators.hlo import Figures, figures, parse, size
from jax_bn.mesh import AXIS

# A loop, a branch, a fusion that reads one row of eight, and one that reads all.
PROGRAM = """HloModule small, entry_computation_layout={(f32[8,4]{1,0})->f32[4]{0}}

%row (p.0: f32[8,4], p.1: s32[]) -> f32[4] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,4]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,4}
  ROOT %flat = f32[4]{0} bitcast(%cut)
}

%all (p.2: f32[8,4]) -> f32[4] {
  %p.2 = f32[8,4]{1,0} parameter(0)
  %wide = f64[8,4]{1,0} convert(%p.2)
  %none = f64[] constant(0)
  %sum = f64[4]{0} reduce(%wide, %none), dimensions={0}, to_apply=%add
  ROOT %narrow = f32[4]{0} convert(%sum)
}

%branch (p.3: f32[8,4]) -> f32[4] {
  %p.3 = f32[8,4]{1,0} parameter(0)
  ROOT %seldom = f32[4]{0} fusion(%p.3), kind=kLoop, calls=%all
}

%other (p.4: f32[8,4]) -> f32[4] {
  %p.4 = f32[8,4]{1,0} parameter(0)
  ROOT %nothing = f32[4]{0} constant({0, 0, 0, 0})
}

ENTRY %main (x: f32[8,4], i: s32[], b: pred[]) -> (f32[4], f32[4]) {
  %x = f32[8,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = pred[] parameter(2)
  %one = f32[4]{0} fusion(f32[8,4]{1,0} %x, s32[] %i), kind=kLoop, calls=%row, backend_config={"estimated_cycles":"7"}
  %two = f32[4]{0} fusion(%x), kind=kInput, calls=%all, backend_config={"estimated_cycles":"11"}
  %both = f32[4]{0} all-reduce(%two), replica_groups={{0,1}}, to_apply=%add
  %chosen = f32[4]{0} conditional(%b, %x, %x), true_computation=%branch, false_computation=%other
  ROOT %out = (f32[4]{0}, f32[4]{0}) tuple(%one, /*index=1*/%both)
}
"""


def test_figures_of_a_program_that_is_known():
    """The row: 16 + 4 (its index) + 16; the sum: 128 + 16; the all-reduce: 16 + 16. The branch is not counted."""
    row, whole, together = 16 + 4 + 16, 128 + 16, 16 + 16
    assert figures(PROGRAM) == Figures(
        traffic=row + whole + together, fusions=2, collectives=1, sent=16, float64=2, cycles=7 + 11
    )


def test_figures_of_a_program_of_xla():
    """A matrix product, compiled here: two matrices are read and one is written, nothing beside."""
    compiled = jax.jit(lambda a, b: a @ b).lower(jnp.zeros((64, 32)), jnp.zeros((32, 16))).compile()
    found = figures(compiled.as_text())
    assert found.traffic == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert (found.collectives, found.float64, found.cycles) == (0, 0, None)


def test_sizes():
    assert size("bf16[3,5]{1,0:T(8,128)}") == 30
    assert size("(f32[2]{0}, pred[7]{0}, f8e4m3fn[4]{0}, s4[6]{0}, c64[1]{0}, u32[])") == 8 + 7 + 4 + 3 + 8 + 4
    assert size("token[]") == 0


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY; allowed: an HLO module"):
        parse("module @jit_f {\n}\n")


@pytest.mark.parametrize("norm", ["jax_bn", "flax"])
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("step", ["train", "eval"])
def test_blenets_steps_are_compiled(norm, count, step, monkeypatch):
    """On devices that are here; a training step over several has nine operations over devices, prediction one."""
    mesh = Mesh(np.asarray(jax.devices()[:count]), (AXIS,), axis_types=(AxisType.Auto,))
    monkeypatch.setattr(programs, "devices", lambda *_: mesh)
    monkeypatch.setattr(programs, "PLATFORMS", {"H100": "cpu"})
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax and Flax rely on them
        lowered = programs.lowered(programs.Program("BLeNet", step, "float32", "H100", count, norm))
    text = lowered.as_text()
    assert (text.count("stablehlo.all_reduce") > 0) == (count > 1)
    if norm == "jax_bn" and count > 1:
        # Four layers, forward and backward, and the gradients with the metrics; XLA puts those together.
        found = figures(lowered.compile().as_text())
        assert found.collectives <= 9


def test_a_small_resnet_is_what_it_says():
    """Its shapes: stages of 3, 4, 6 and 3 blocks, 25.6 million parameters."""
    model = programs.ResNet50(programs.partial(programs.jax_bn.BatchNorm), jnp.float32)
    variables = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 64, 64, 3)), True), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 25_557_032
    assert sum("Block" in name for name in variables["params"]) == 16


def row(norm="jax_bn", **figures):
    base = {"network": "BLeNet", "step": "train", "dtype": "float32", "card": "v5e", "devices": 4, "norm": norm}
    counted = {
        "traffic": 1000,
        "cycles": 100,
        "fusions": 1,
        "collectives": 9,
        "sent": 4000,
        "float64": 0,
        "seconds": 1.0,
    }
    return base | counted | {"flops": 1e9, "bytes": 2e6, "temp": 1000} | figures


def test_bounds_and_what_is_worse():
    rows = [row(traffic=1060), row("flax")]
    assert accelerators.bounds(rows) == [
        "BLeNet train float32 v5e 4: traffic 1.060 of Flax's, bound 1.05: missed",
        "BLeNet train float32 v5e 4: cycles 1.000 of Flax's, bound 1.05: met",
    ]
    assert not accelerators.compare(rows, rows)
    assert not accelerators.compare([row(traffic=1050)], [row()])
    assert "traffic 1,051 bytes, before 1,000" in accelerators.compare([row(traffic=1051)], [row()])[0]
    assert "10 operations over devices, before 9" in accelerators.compare([row(collectives=10)], [row()])[0]
    assert "it crashed" in accelerators.compare([{**row(), "failed": "it crashed"}], [row()])[0]
    assert not accelerators.compare([row("flax", traffic=5000)], [row("flax")])


def test_the_page(monkeypatch, tmp_path, capsys):
    """A row for each program, one that was not compiled too; what is worse than before ends it with status 1."""
    monkeypatch.setattr(accelerators, "PLUGINS", {"v5e": "json", "H100": "json"})
    failed = {"failed": "not compiled in 600 s"}
    done = {key: value for key, value in row().items() if key not in accelerators.KEY}
    monkeypatch.setattr(accelerators, "_in_a_process", lambda row: failed if row["norm"] == "flax" else done)
    monkeypatch.setattr(accelerators.importlib.metadata, "version", lambda name: "1.0")
    page, kept = tmp_path / "page.md", tmp_path / "a.json"
    accelerators.main(["--only", "BLeNet train", "--write", str(page), "--json", str(kept)])
    text = page.read_text()
    assert "--only 'BLeNet train' --write docs/accelerators.md" in text
    assert text.count("| jax_bn |") == 4
    assert text.count("not compiled in 600 s") == 4
    assert str(tmp_path) not in text
    capsys.readouterr()
    before = json.loads(kept.read_text())
    before["rows"][0]["collectives"] = 8
    kept.write_text(json.dumps(before))
    with pytest.raises(SystemExit) as stop:
        accelerators.main(["--only", "BLeNet train", "--against", str(kept)])
    assert stop.value.code == 1
    assert "9 operations over devices, before 8" in capsys.readouterr().err


def test_a_compiler_that_crashes_is_one_row(monkeypatch):
    """What it said last stands in the row."""
    monkeypatch.setattr(accelerators.sys, "executable", "/bin/false")
    assert accelerators._in_a_process(row())["failed"].startswith("status 1")


@pytest.mark.parametrize(
    "args", [["--only", "no such"], ["--against", "no/such"], ["--write", "no/such/file"]], ids=str
)
def test_bad_options(args, monkeypatch, capsys):
    monkeypatch.setattr(accelerators, "PLUGINS", {"v5e": "json", "H100": "json"})
    with pytest.raises(SystemExit) as stop:
        accelerators.main(args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "allowed: " in err


def test_without_the_compilers(monkeypatch, capsys):
    monkeypatch.setattr(accelerators, "PLUGINS", {"v5e": "no_such_plugin"})
    with pytest.raises(SystemExit) as stop:
        accelerators.main([])
    assert stop.value.code == 2
    assert "make accelerators" in capsys.readouterr().err
