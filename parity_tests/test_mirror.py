"""The two wings mirror each other: the same definitions under the same names in the same order, file by file.

What only one wing has is in ALONE, and says itself why: in a line with "JAX only" or "PyTorch only", in its docstring
(of a constant: in its comment; of a field: in its class's docstring; of a file: in the file's).
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = {"jax_bn": "JAX only", "torch_bn": "PyTorch only"}
FILES = {wing: {path.stem for path in (ROOT / wing).glob("*.py")} - {"__init__"} for wing in WINGS}
PAIRS = sorted(FILES["jax_bn"] & FILES["torch_bn"])

FILES_ALONE = {"jax_bn": {"blenet_cpu", "mesh", "nnx", "settings"}, "torch_bn": {"kernels", "native"}}
# Frameworks differ in how they differentiate (transposing, or a function of autograd's), in where state lives
# (collections, or buffers), and in what they leave to their users (devices, layouts, initial values).
ALONE = {
    "jax_bn": {
        "arrays": "product",
        "batch_norm": "BatchStats Options.axis_name Options.groups Options.platform _channels"
        " _on_its_platform _normalize_folded _normalize_batch_jvp",
        "blenet": "kernel_init bias_init average_pool",
        "checkpoint": "on_host like written",
        "channels": "CPU_LANES FIRST_BITS Channels spread_to_add _adds_in_blocks _in_blocks _divisor _unfold"
        " _first_bits _is_split",
        "devices": "is_shared send promote_dtype varying",
        "layers": "feature_shape batch_norm_in_flax",
        "processes": "RELAYS _in_time _relay",
        "export": "PLATFORMS check_installed exported_onnx _no_source_paths",
        "predict": "of_file",
        "precise": "Path precise_statistics_nnx _modes _moves _name _require_any",
        "statistics": "Statistics.minus_shift statistics_of _in_one_pass _in_two_passes",
        "device_data": "Batch",
        "training": "STEPS_IN_FLIGHT Collection Variables TrainState.params TrainState.batch_stats TrainState.opt_state"
        " EvalBatch jit_eval_step compile_step",
    },
    "torch_bn": {
        "arrays": "dtype_name can_be_read",
        "batch_norm": "_NormalizeBatch _NormalizeBatchForward Options.group _normalize_over_group",
        "blenet": "AUTOCAST",
        "checkpoint": "STATE AGREE_EVERY",
        "channels": "MANY_ROWS PIECE largest_of sum_of_products _sum _sum_of_pieces sum_of_squares",
        "devices": "_gather NormalizeOverGroup",
        "export": "folded _fold _without_source_paths",
        "layers": "NATIVE synchronize",
        "predict": "Predictor",
        "statistics": "near_the_mean mean_and_var",
        "training": "TrainState.model TrainState.parallel TrainState.optimizer TrainState.scheduler be_deterministic",
    },
}


def definitions(source: str) -> dict[str, str]:
    """Name -> what is said about it: of all that a file defines, and of its NamedTuples' fields ("Options.axis")."""
    lines, body = source.splitlines(), ast.parse(source).body
    found: dict[str, str] = {}
    for node, behind in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "NamedTuple" for base in node.bases):
            fields = [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)]
            found |= {f"{node.name}.{field}": found[node.name] for field in fields}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(targets[0], ast.Name):
            first = node.lineno - 1
            while lines[first - 1].startswith("#"):
                first -= 1
            is_said = isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant)
            found[targets[0].id] = "\n".join(lines[first : node.lineno - 1]) + (ast.unparse(behind) if is_said else "")
    return found


def alone(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """What only one file defines; of a class that has no twin, not the fields."""
    found = [name for name in mine if name not in theirs]
    return [name for name in found if name.split(".")[0] == name or name.split(".")[0] in theirs]


def common(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    return [name for name in mine if name in theirs]


@pytest.mark.parametrize("file", PAIRS)
def test_the_same_definitions_in_the_same_order(file):
    jax, torch = (definitions((ROOT / wing / f"{file}.py").read_text()) for wing in WINGS)
    assert common(jax, torch) == common(torch, jax)
    for (wing, says), mine, theirs in zip(WINGS.items(), (jax, torch), (torch, jax), strict=True):
        found = alone(mine, theirs)
        assert set(found) == set(ALONE[wing].get(file, "").split()), f"{wing}/{file}.py: what has no twin"
        assert not [name for name in found if says not in mine[name]], f"does not say {says!r}"


def test_the_same_files():
    for (wing, says), other in zip(WINGS.items(), reversed(WINGS), strict=True):
        assert FILES[wing] - FILES[other] == FILES_ALONE[wing]
        for file in FILES_ALONE[wing]:
            assert says in (ast.get_docstring(ast.parse((ROOT / wing / f"{file}.py").read_text())) or ""), file
        assert set(ALONE[wing]) <= set(PAIRS)


def test_what_is_compared():
    """Functions, classes, constants and fields are seen, each with what is said about it."""
    found = definitions(
        "import a\n\n# Steps.\n# JAX only: why\nN = 1\nT: int = 2\n'JAX only'\n\n"
        "class P(NamedTuple):\n    'said'\n    x: int\n    y: int = 1\n\n"
        "class Q(a.Q):\n    z: int\n\ndef f():\n    'doc'\n"
    )
    assert list(found) == ["N", "T", "P", "P.x", "P.y", "Q", "f"]
    assert "JAX only: why" in found["N"]
    assert "JAX only" in found["T"]
    assert (found["P.x"], found["f"]) == ("said", "doc")
    assert alone(found, {"P": "", "P.x": ""}) == ["N", "T", "P.y", "Q", "f"]
    assert common(found, {"f": "", "N": ""}) == ["N", "f"]
