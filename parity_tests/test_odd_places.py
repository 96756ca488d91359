"""Programs in odd places: no home, a locale of ASCII, a narrow and dumb terminal, a path with an umlaut."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ODD = {"LC_ALL": "C", "TERM": "dumb", "COLUMNS": "20", "NO_COLOR": "1", "TZ": "Pacific/Chatham"}
CHECK = """
import numpy as np
import parity
import torch
from flax import nnx

torch.manual_seed(0)
layers = torch.nn.Linear(3, 2), nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
report = parity.check(*layers, np.ones((2, 3), np.float32), train=False, depth=1)
assert not report.ok
report.to_html("report.html")
print(report)
"""


TRAIN = ["{root}/train_jax.py", "--help"], "--epochs"
PARITY = ["-m", "parity", "check", "--help"], "--depth"


@pytest.mark.parametrize("home", [None, "/nonexistent", "/proc"], ids=["no home", "none there", "unwritable"])
@pytest.mark.parametrize(("args", "said"), [TRAIN, PARITY], ids=["train", "parity"])
def test_help(tmp_path, args, said, home):
    check(tmp_path, args, said, home)


def test_a_comparison(tmp_path):
    check(tmp_path, ["-c", CHECK], "differs first", None)


def check(tmp_path, args, said, home):
    folder = tmp_path / "Prüf stand"
    folder.mkdir()
    (folder / "code").symlink_to(ROOT)
    environment = {"PATH": os.environ["PATH"], **ODD, "PYTHONPATH": str(folder / "code")}
    environment |= {} if home is None else {"HOME": home}
    command = [sys.executable, *(part.format(root=folder / "code") if part[0] == "{" else part for part in args)]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert said in done.stdout.decode()
    assert b"\x1b" not in done.stdout
    assert done.stderr == b""
