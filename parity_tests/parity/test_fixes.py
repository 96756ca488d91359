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
from parity.diagnosis.mistakes import TABLE

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


@pytest.mark.parametrize("code", FIXES)
def test_the_code_exists(code):
    """It is Python, two different lines a side, and the libraries have these functions with these arguments."""
    for (wrong, right), names in ((FIXES[code].torch, TORCH), (FIXES[code].flax, FLAX)):
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
