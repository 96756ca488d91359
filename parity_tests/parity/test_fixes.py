"""What is to be written instead of a mistake: code that exists in both frameworks."""

import ast
import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import jax_bn
import jax_bn.nnx
import torch_bn
from parity.diagnosis.fixes import FIXES
from parity.diagnosis.kind_fixes import BETWEEN, BY_KIND, fix_of
from parity.diagnosis.mistakes import TABLE
from parity.records.kinds import KINDS
from parity.report import Report
from parity.report.findings import Diagnosis, Divergence, LayerRow, Place

TORCH = {"torch": torch, "nn": nn, "F": nn.functional, "torch_bn": torch_bn}
FLAX = {"nnx": nnx, "jax": jax, "jnp": jnp, "optax": optax, "jax_bn": jax_bn}


def test_every_mistake_has_one():
    assert {*FIXES} == {mistake.code for mistake in TABLE}
    assert all(mistake.fix is FIXES[mistake.code] for mistake in TABLE)


def resolved(node, names):
    """What a dotted name of a library is; None for the user's own."""
    parts = ast.unparse(node).split(".")
    if parts[0] not in names or not all(part.isidentifier() for part in parts):
        return None
    found = names[parts[0]]
    for part in parts[1:]:
        found = getattr(found, part)
    return found


KINDS_OF = [(code, "") for code in FIXES] + [(code, kind) for code, fixes in BY_KIND.items() for kind in fixes]
CLASSES = {
    "batch_norm": "BatchNorm",
    "group_norm": "GroupNorm",
    "rms_norm": "RMSNorm",
    "layer_norm": "LayerNorm",
    "conv": "Conv",
    "linear": "Linear",
    "embedding": "Embed",
    BETWEEN: "pool",
}


def test_a_line_is_of_the_kind_of_layer():
    """Whatever a line calls is of that kind, or of none."""
    assert {kind for _, kind in KINDS_OF} <= {"", BETWEEN, *KINDS}
    for code, kind in KINDS_OF:
        if kind:
            assert fix_of(code, kind) != FIXES[code]
            text = " ".join(line for side in fix_of(code, kind) for line in side)
            others = [name for of, name in CLASSES.items() if of not in (kind, BETWEEN) and f".{name}" in text]
            assert others == [], (code, kind)
    assert fix_of("epsilon", "conv") == fix_of("epsilon") == FIXES["epsilon"]
    assert fix_of("unexplained", "batch_norm") is None


@pytest.mark.parametrize("html", [False, True])
def test_a_card_has_the_lines_of_its_layer(html, tmp_path):
    row = LayerRow("forward", "1", "BatchNorm_0", "batch_norm", "output", 1e-3, 1e-10)
    pool = Diagnosis("padding", "2", "", "", places=(Place("2", "Conv_1", "MaxPool2d", "3"),))
    found = [Diagnosis("epsilon", "1", "", "BatchNorm_0"), pool]
    report = Report(Divergence("forward", "1", "BatchNorm_0", 1e-3, 1e-10, "output"), found, [row])
    text = str(report)
    if html:
        report.to_html(tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text()
    assert "nn.BatchNorm2d(c, eps=1e-3)" in text
    assert "nn.MaxPool2d(3, 2, padding=1)" in text
    assert "LayerNorm" not in text
    assert "nn.Conv2d" not in text


def test_a_code_of_several_norms_has_lines_for_each():
    """Where the lines name one kind of norm, and the mistake may be in another: that has its own."""
    named = {code for code, fix in FIXES.items() if any(".LayerNorm(" in line for side in fix for line in side)}
    assert named == {"no-partner", "affine-missing", "epsilon"}
    for code in named:
        assert ".BatchNorm" in str(fix_of(code, "batch_norm"))


@pytest.mark.parametrize(("code", "kind"), KINDS_OF)
def test_the_code_exists(code, kind):
    """It is Python, two different lines a side, and the libraries have these functions with these arguments."""
    fix = fix_of(code, kind)
    for (wrong, right), names in ((fix.torch, TORCH), (fix.flax, FLAX)):
        assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(right))
        for line in (wrong, right):
            assert len(line) <= 76
            assert line.isprintable()
            for node in ast.walk(ast.parse(line)):
                if isinstance(node, ast.Attribute):
                    resolved(node, names)
                if isinstance(node, ast.Call) and (called := resolved(node.func, names)) is not None:
                    try:
                        signature = inspect.signature(called)
                    except ValueError:
                        continue  # written in C
                    signature.bind(*node.args, **{k.arg: k.value for k in node.keywords})
