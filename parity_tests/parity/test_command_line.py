"""`python -m parity` from outside: what each command prints and writes, and its exit status."""

import importlib
import json
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from parity import __main__ as program
from parity.cli import named_objects
from parity.report import Diagnosis, Divergence, LayerRow, Report

ROOT = Path(__file__).parents[2]
NETS = """
import random

import flax.linen
import flax.nnx
import numpy
import torch

class Torch(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

class Flax(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(3)(x)

class Relu(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.relu(flax.linen.Dense(3)(x))

class Wants(flax.nnx.Module):
    def __init__(self, rngs):
        self.layer = flax.nnx.Linear(4, 3, rngs=rngs)

flax_module, number, losses, optimizers = Flax(), 3, (abs, abs), (torch.optim.SGD, "of optax")

class Drawn(flax.nnx.Linear):
    def __init__(self):
        super().__init__(4, 3, rngs=flax.nnx.Rngs(random.randrange(9**9) + numpy.random.randint(9**9)))

def ends():
    raise SystemExit(0)

class Ends(torch.nn.Module):
    def forward(self, x):
        raise SystemExit(0)

def breaks():
    raise RuntimeError("the factory broke")

class Refuses(torch.nn.Module):
    def forward(self, x):
        raise ValueError("x is bad; allowed: nothing")
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A folder with a module of networks, from which the program is run."""
    (tmp_path / "nets_of_a_test.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("nets_of_a_test", None)


def run(*args):
    """Exit status of the program, run within this process."""
    try:
        return program.main([str(part) for part in args])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def checked(monkeypatch):
    """`parity.check` stands in for itself: gives `checked.report`, keeps what it was given."""
    seen = types.SimpleNamespace(report=Report(), calls=[])

    def check(*args, **options):
        seen.calls.append((args, options))
        return seen.report

    monkeypatch.setattr(sys.modules["parity.check"], "check", check)
    return seen


def different():
    row = LayerRow("forward", "", "Dense_0", "linear", "output", float("inf"), 1e-10)
    return Report(Divergence("forward", "", "Dense_0", float("inf"), 1e-10), [Diagnosis("padding", "", "SAME")], [row])


def test_check(nets, checked, capsys):
    """Status 0 and 1, the report on standard output and in both files."""
    given = "check", "nets_of_a_test:Torch", "nets_of_a_test.py:flax_module", "--shape", "2,4"
    assert run(*given) == 0
    assert capsys.readouterr().out == "ok: 0 layers, 0 quantities agree\n"
    checked.report = different()
    assert run(*given, "3,4", "--eval", "--json", "r.json", "--html", "r.html", "--map", "a.0=A/B", "b=C") == 1
    assert capsys.readouterr().out == f"{checked.report}\n"
    assert json.loads(Path("r.json").read_text()) == checked.report.to_dict()
    assert Path("r.html").read_text().startswith("<!doctype html>")
    assert run(*given, "--depth", "1") == 1
    assert capsys.readouterr().out == f"{checked.report.table(depth=1)}\n" != f"{different()}\n"
    (first, options), (second, more) = checked.calls[:2]
    assert [type(part).__name__ for part in first[:2]] == ["Torch", "Flax"]
    assert first[2].shape == (2, 4)
    assert first[2].dtype == np.float32
    absent = {"loss": None, "steps": 0, "optimizers": None}
    assert options == {"train": True, "variables": None, "layer_map": None, **absent}
    assert [a.shape for a in second[2:]] == [(2, 4), (3, 4)]
    assert more == {"train": False, "variables": None, "layer_map": {"a.0": "A/B", "b": "C"}, **absent}


def test_loss_and_steps(nets, checked):
    """Pairs of objects, PyTorch's and JAX's."""
    options = ["--loss", "nets_of_a_test:losses", "--steps", "3", "--optimizers", "nets_of_a_test.py:optimizers"]
    assert run("check", "nets_of_a_test:Torch", "nets_of_a_test:Flax", "--shape", "2,4", *options) == 0
    ((_, given),) = checked.calls
    assert given["loss"] == (abs, abs)
    assert given["steps"] == 3
    assert given["optimizers"][1] == "of optax"


def test_inputs_and_variables(nets, checked):
    """Arrays in the order of the file; the same numbers for the same seed."""
    x, y = np.arange(8.0), np.arange(4)
    np.savez("xy.npz", second=y, first=x)
    np.save("x.npy", x)
    np.savez("variables.npz", **{"params/Dense_0/kernel": np.ones((4, 3))})
    given = "check", "nets_of_a_test:Torch", "nets_of_a_test:Flax"
    run(*given, "--inputs", "xy.npz", "--variables", "variables.npz")
    run(*given, "--inputs", "x.npy")
    for seed in (1, 1, 2):
        run(*given, "--shape", "5", "--seed", seed)
    arrays = [args[2:] for args, _ in checked.calls]
    np.testing.assert_array_equal(arrays[0][0], y)
    np.testing.assert_array_equal(arrays[0][1], x)
    np.testing.assert_array_equal(arrays[1][0], x)
    np.testing.assert_array_equal(arrays[2][0], arrays[3][0])
    assert not np.array_equal(arrays[3][0], arrays[4][0])
    assert checked.calls[0][1]["variables"]["params"]["Dense_0"]["kernel"].shape == (4, 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "command is ''; allowed: check, convert, trace, train, dump, compare, initialisation, or --help"),
        ("chekc", "command is 'chekc'; allowed: check, convert, trace, train, dump, compare, initialisation, or"),
        ("initialisation {t} {f}", "--inputs is not given; allowed: --inputs FILE or --shape SIZES"),
        ("initialisation {t} {f} --shape 3,4 --seeds 7", "--seeds is 7; allowed: an integer >= 8"),
        ("check {t} {f}", "--inputs is not given; allowed: --inputs FILE or --shape SIZES"),
        ("check {t} {f} --shape 3,x", "--shape is 3,x; allowed: positive integers with commas between"),
        ("check {t} {f} --shape 3,0", "--shape is 3,0; allowed: positive"),
        ("check {t} {f} --shape 3 --seed -1", "--seed is -1; allowed: an integer >= 0"),
        ("check {t} {f} --inputs no.npz", "--inputs is no.npz; allowed: a .npz or .npy file"),
        ("check {t} {f} --inputs bad.npz", "--inputs is bad.npz, which can't be read ("),
        ("check {t} {f} --inputs bad.npz --shape 3", "--inputs is bad.npz with --shape 3; allowed: one of the two"),
        ("check {t} {f} --shape 3 --json no/r.json", "--json is no/r.json; allowed: a file in a folder that is there"),
        ("check {t} {f} --shape 3 --html .", "--html is .; allowed: a file in a folder that is there"),
        ("check {t} {f} --shape 3 --map a", "--map is a; allowed: PyTorch's name=Flax's path"),
        ("check {t} {f} --shape 3 --variables no", "--variables is no; allowed: a file that is there"),
        ("check {t} {f} --shape 3 --variables bad.txt", "--variables: the suffix of bad.txt is .txt; allowed: "),
        ("check nets_of_a_test {t} --shape 3", "torch is 'nets_of_a_test'; allowed: package.module:name or file.py:"),
        ("check no.such:net {f} --shape 3", "torch is 'no.such:net', and there is no module no; allowed: package"),
        ("check no.py:net {f} --shape 3", "torch is 'no.py:net'; allowed: package.module:name or file.py:name of"),
        ("check nets_of_a_test:no {f} --shape 3", "torch is 'nets_of_a_test:no'; allowed: package.module:name"),
        ("check {f} {f} --shape 3", "torch is 'nets_of_a_test:Flax', which gives Flax; allowed: a torch.nn.Module"),
        ("check {t} nets_of_a_test:number --shape 3", "flax is 'nets_of_a_test:number', which gives int; allowed: "),
        ("check {t} {f} --shape 3 --evla", "Unrecognized options"),
        ("check {t} {f} --shape 3 --loss x", "--loss is 'x'; allowed: package.module:name"),
        ("check {t} {f} --shape 3 --loss {t}", "--loss is 'nets_of_a_test:Torch', which gives type; allowed: a pair"),
        ("check {t} {f} --shape 3 --depth 0", "--depth is 0; allowed: an integer >= 1"),
        ("check {t} {f} --shape 3 --steps -1", "--steps is -1; allowed: an integer >= 0"),
        ("check {t} {f} --shape 3 --steps 1", "--steps and --optimizers is 1 and None; allowed: both or neither"),
        ("check {t} nets_of_a_test:Wants --shape 3", "Wants by a function without arguments: lambda: Wants(...)"),
        ("check nets_of_a_test:breaks {f} --shape 3", "fails: RuntimeError: the factory broke (nets_of"),
        ("check {t} bad.py:net --shape 3", "flax is 'bad.py:net', which can't be imported: SyntaxError: "),
        ("dump {t} --out a --shape 2,5", "cannot be multiplied (2x5 and 4x3); allowed: what the module can take"),
        ("trace {t}", "Missing from python -m parity trace"),
        ("dump {t} --shape 3", "Missing from python -m parity dump: --out"),
        ("dump {t} --out a", "--inputs is not given"),
        ("dump {t} --out no/a --shape 3", "--out is no/a; allowed: a name in a folder that is there"),
        ("dump {t} --out a --shape 3 --weights no", "--weights is no; allowed: the name of a dump, or a file"),
        ("dump {t} --out a --shape 3 --loss x", "--loss is 'x'; allowed: package.module:name"),
        ("dump {t} --out a --shape 3 --steps -1", "--steps is -1; allowed: an integer >= 0"),
        ("dump {t} --out a --shape 3 --steps 1", "--optimizer is None; allowed: a name, where --steps > 0"),
        ("dump {t} --out a --shape 3 --optimizer x", "--optimizer is 'x'; allowed: package.module:name"),
        ("dump nets_of_a_test:Refuses --out a --shape 3", "x is bad; allowed: nothing"),
        ("check nets_of_a_test:ends {f} --shape 3", "torch is 'nets_of_a_test:ends', which fails: SystemExit: 0 (nets"),
        ("check {t} exits.py:net --shape 3", "flax is 'exits.py:net', which can't be imported: SystemExit: 3 (exits"),
        ("dump nets_of_a_test:Ends --out a --shape 3", "a module ends the program: SystemExit: 0 (nets_of_a_test.py,"),
        ("check {t} lacks.py:net --shape 3", "flax 'lacks.py:net' needs PyTorch, which is not installed; allowed: pip"),
        ("check {t} {f} --shape 3 --html {long}", "a: File name too long; allowed: a file that can be written"),
        ("compare a b --json {long}", "a: File name too long; allowed: a file that can be written"),
        ("dump {t} --out {long} --shape 3", "a: File name too long; allowed: a file that can be written"),
        ("compare a b", "a is no dump ("),
    ],
)  # fmt: skip
def test_refused(nets, checked, capsys, monkeypatch, args, message):
    """Status 2 and one line that says what was given and what is allowed; nothing is run or written."""
    Path("bad.npz").write_bytes(b"PK")
    Path("bad.txt").write_bytes(b"")
    Path("bad.py").write_text("def (")
    Path("exits.py").write_text("raise SystemExit(3)")
    Path("lacks.py").write_text("import sys; sys.modules['torch'] = None; import torch")
    monkeypatch.setitem(sys.modules, "torch", torch)  # which is put back
    before = sorted(nets.iterdir())
    names = args.format(long=254 * "a", t="nets_of_a_test:Torch", f="nets_of_a_test:Flax").split()
    assert run(*names) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("python -m parity")
    assert err.count("\n") == 1
    assert not out
    assert not checked.calls
    assert [path for path in sorted(nets.iterdir()) if path.name != "__pycache__"] == before


def test_the_bridges_own_mistakes_keep_their_traceback(nets, checked, monkeypatch, capsys):
    """Status 2 all the same: 1 would say that two sides differ."""
    monkeypatch.setattr("parity.sides.module.framework_of", lambda module: {}["none"])
    assert run("check", "nets_of_a_test:Torch", "nets_of_a_test:Flax", "--shape", "2,4") == 2
    assert "Traceback" in capsys.readouterr().err


def test_check_of_inputs_that_do_not_fit(nets, capsys):
    """The report, in which the user's own code is named; convert is told from check by its name alone."""
    for command in "check", "trace":
        assert run(command, "nets_of_a_test:Torch", "nets_of_a_test:Flax", "--shape", "2,5") == 2
        out, err = capsys.readouterr()
        assert "PyTorch, on its own, could not run: RuntimeError: mat1 and mat2 shapes" in out
        assert "inf" not in out
        assert not err
    pair = "--torch-module", "nets_of_a_test:Torch", "--flax-module", "nets_of_a_test:Flax"
    assert run("convert", "no.pt", "a.npz", *pair) == 2
    assert capsys.readouterr().err.startswith("python -m parity convert: error: no.pt does not exist")


def test_commands_of_their_own(monkeypatch):
    """train, and check without a pair, go where they live; their status is the program's."""
    seen = []
    for place, status in (("parity.cli.train", 1), ("parity.wings.matrix", None)):
        fake = types.SimpleNamespace(main=lambda args, place=place, status=status: seen.append((place, args)) or status)
        monkeypatch.setitem(sys.modules, place, fake)
    assert run("train", "--steps", 3) == 1
    assert run("check") == 0
    assert run("check", "--json", "r.json") == 0
    places = ("parity.cli.train", "parity.wings.matrix", "parity.wings.matrix")
    assert seen == list(zip(places, (["--steps", "3"], [], ["--json", "r.json"]), strict=True))


def test_convert(nets, monkeypatch):
    seen = []
    fake = types.SimpleNamespace(convert=lambda *args, **options: seen.append((args, options)) or 2)
    monkeypatch.setitem(sys.modules, "parity.cli.convert", fake)
    pair = "--torch-module", "nets_of_a_test:Torch", "--flax-module", "nets_of_a_test:Flax"
    assert run("convert", "a.pt", "b.npz", *pair, "--inputs", "x.npy", "--map", "a=A/B") == 2
    ((args, options),) = seen
    assert args == (Path("a.pt"), Path("b.npz"))
    assert options == {
        "torch_module": pair[1],
        "flax_module": pair[3],
        "inputs": (Path("x.npy"),),
        "layer_map": ("a=A/B",),
    }


@pytest.mark.parametrize("command", ["check", "convert", "trace", "dump", "compare"])
def test_help(command, capsys):
    assert run(command, "--help") == 0
    assert f"python -m parity {command}" in capsys.readouterr().out


def test_help_of_all(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(f"python -m parity {command}" in out for command in program.COMMANDS)


def test_the_same_command_gives_the_same_numbers(nets, checked):
    """Whatever drew before: weights come from --seed, PyTorch's, numpy's and Python's."""
    seen = []
    for seed in (0, 0, 1):
        torch.rand(3), np.random.rand(3)  # noqa: NPY002
        pair = "nets_of_a_test:Torch", "nets_of_a_test:Drawn"
        assert run("check", *pair, "--shape", "2,4", "--seed", seed) == 0
        first, second = checked.calls[-1][0][:2]
        seen.append([first.weight.detach().numpy(), np.asarray(second.kernel[...])])
    for one, same, other in zip(*seen, strict=True):
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)


def test_interrupted(nets, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["parity.check"], "check", interrupted)
    assert run("check", "nets_of_a_test:Torch", "nets_of_a_test:Flax", "--shape", "2,4") == 130
    assert capsys.readouterr() == ("", "python -m parity check: interrupted\n")


def test_long_errors_are_told_in_short():
    """JAX's go on for paragraphs, and advise what there is not here."""
    error = ValueError(
        "the first\nline (https://docs.example/errors#one)\n\nTo avoid this, pass allow=True. " + 99 * "x"
    )
    assert named_objects.told(error) == "ValueError: the first line"
    assert len(named_objects.told(ValueError(999 * "x"))) < 420


ABSENT = """
import runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
sys.argv = ["parity/__main__.py", *sys.argv[2:]]
runpy.run_module("parity", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("absent", "args", "said"),
    [
        ("torch", "check", "check needs PyTorch, which is not installed; allowed: pip install torch"),
        ("torch", "check a:b c:d --shape 3", "check needs PyTorch, which is not installed; allowed: pip install torch"),
        (
            "jax,flax",
            "trace a:b c:d",
            "trace needs JAX and Flax, which are not installed; allowed: pip install jax flax",
        ),
        ("torch", "train", "train needs PyTorch, which is not installed; allowed: pip install torch"),
        ("torch", "convert a b", "convert needs PyTorch, which is not installed; allowed: pip install torch"),
        (
            "flax",
            "dump nets_of_a_test.py:Flax --out a --shape 2,4",
            "module 'nets_of_a_test.py:Flax' needs Flax, which",
        ),
    ],
)
def test_without_a_framework(nets, absent, args, said):
    """One line that says what to install, and status 2."""
    command = [sys.executable, "-c", ABSENT, absent, *args.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert done.stderr.startswith(f"python -m parity {args.split()[0]}: error: {said}")
    assert done.stderr.count("\n") == 1


def test_functions_without_a_framework():
    """The same words from Python; help needs neither."""
    code = """
import sys
sys.modules["torch"] = None
import parity
from parity.__main__ import main
for use in (lambda: parity.check(1, 2, 3), lambda: parity.to_flax, lambda: parity.lockstep, lambda: parity.weights):
    try:
        use()
    except ModuleNotFoundError as error:
        print(error)
for command in ("train", "check", "convert"):
    try:
        main([command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
"""
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    for name in ("check", "to_flax", "lockstep", "weights"):
        assert f"parity.{name} needs PyTorch, which is not installed; allowed: pip install torch\n" in done.stdout


def test_console_scripts(monkeypatch, capsys):
    """Both are declared, run the programs, and are called by their own names."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"parity", "blenet-train"}
    for script, place in scripts.items():
        module, _, function = place.partition(":")
        run_it = getattr(importlib.import_module(module), function)
        for args, code in ((["--help"], 0), (["--no-such-option"], 2)):
            monkeypatch.setattr(sys, "argv", [f"/bin/{script}", *args])
            try:
                given = run_it()
            except SystemExit as stop:
                given = stop.code
            assert given == code
            out, err = capsys.readouterr()
            assert f"{script} " in out if code == 0 else err.startswith(f"{script}: error: ")
            assert "python -m parity" not in out
            assert "train_jax.py" not in out


def test_from_a_shell(nets):
    """Nothing but the text, and neither framework for a mistake on the command line."""
    code = (
        "import runpy, sys; sys.modules.update(torch=None, jax=None, flax=None)\n"
        "sys.argv = ['parity', 'compare', 'a', 'b', 'c']; runpy.run_module('parity', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert done.stderr == ("python -m parity compare: error: Unrecognized options: c; allowed: what --help lists\n")


def test_trace_dump_and_compare(nets, capsys):
    """The real thing, on one linear layer."""
    importlib.import_module("nets_of_a_test")
    pair = "nets_of_a_test:Torch", "nets_of_a_test:Flax"
    assert run("trace", *pair, "--shape", "2,4") == 0
    out = capsys.readouterr().out
    assert "weight gradient" in out
    assert "alone" in out
    assert run("trace", pair[0], "nets_of_a_test:Relu", "--shape", "2,4") == 1
    assert "differs first in forward" in capsys.readouterr().out
    assert run("check", pair[0], "nets_of_a_test:Relu", "--shape", "2,4") == 1
    few = capsys.readouterr().out
    assert run("check", pair[0], "nets_of_a_test:Relu", "--shape", "2,4", "--rows", "all") == 1
    every = capsys.readouterr().out
    assert "not shown: " in few
    assert "not shown: " not in every
    assert few.count("\n") < every.count("\n")
    assert run("dump", pair[0], "--out", "a", "--shape", "2,4") == 0
    assert capsys.readouterr().out == "written: a.safetensors and a.json\n"
    assert run("dump", pair[1], "--out", "b", "--shape", "2,4", "--weights", "a") == 0
    assert run("compare", "b", "a", "--html", "r.html") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("ok: ")


TWO = """\
import torch
from flax import linen, nnx

def Torch():
    layer = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(layer.bias)
    torch.nn.init.xavier_uniform_(layer.weight)
    return layer

class Nnx(nnx.Linear):
    def __init__(self, rngs):
        super().__init__(4, 3, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)

default = linen.Dense(3)
"""


@pytest.mark.parametrize(("flax", "seeds", "status"), [("Nnx", 8, 0), ("default", 64, 1), ("nothing", 8, 2)])
def test_initialisation(flax, seeds, status, tmp_path, monkeypatch, capsys):
    """Classes and functions are handed on as they are; the status is that of check."""
    monkeypatch.chdir(tmp_path)
    Path("nets_that_begin.py").write_text(TWO)
    pair = "nets_that_begin.py:Torch", f"nets_that_begin.py:{flax}"
    assert run("initialisation", *pair, "--shape", "2,4", "--seeds", seeds, "--json", "r.json") == status
    if status == 1:
        assert "in Flax normal, cut off or not" in capsys.readouterr().out
        assert json.loads(Path("r.json").read_text())["diagnoses"][0]["code"] == "initialisation"
