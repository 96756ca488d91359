"""Which file of `parity` imports which: one way only, and the frameworks in their own folders only.

Read from the syntax, so imports inside functions count; those for types alone (`if TYPE_CHECKING`) do not.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From below to above; a file imports from lower rows and from its own part. What stands in one row knows nothing of
# each other.
ROWS = [
    {"records"},
    {"pairing", "sides"},
    {"comparison"},
    {"diagnosis", "training"},
    {"report"},
    {"judge", "evidence"},
    {"conventions"},
    {"check", "initialisation", "offline", "trajectory", "weights"},
    {"wings", "testing"},
    {"cli"},
    {"__init__"},
    {"__main__"},
]
HEIGHT = {part: height for height, row in enumerate(ROWS) for part in row}
FRAMEWORKS = {"torch", "jax", "flax", "optax"}
SIDES_FREE = {"pairing", "comparison", "diagnosis", "training", "report", "judge"}  # they know neither framework's side
OWN_WINGS = {"jax_bn", "torch_bn", "image_data"}
MOST_LINES = 400

# What is not yet so: "file imports module". A line that is needed no more fails the test.
EXCEPTIONS = """
"""


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts == ("parity", "__init__") or parts[-1] != "__init__" else parts[:-1])


FILES = {module_name(path): path for path in sorted((ROOT / "parity").rglob("*.py"))}


def imports(tree):
    """The modules that a file imports, wherever in it; not those for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "not TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not read here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module
        else:
            yield from imports(node)


GRAPH = {name: sorted(set(imports(ast.parse(path.read_text())))) for name, path in FILES.items()}


def part(module):
    return module.split(".")[1] if "." in module else "__init__"


def refused(module, imported):
    """Whether this file may not import that."""
    top, mine = imported.split(".")[0], part(module)
    if top in FRAMEWORKS:
        return mine not in ("sides", "wings")
    if top in OWN_WINGS:
        return mine != "wings"
    if top == "parity" and mine != part(imported):
        return HEIGHT[part(imported)] >= HEIGHT[mine] or (mine in SIDES_FREE and part(imported) == "sides")
    return False


def test_every_file_is_in_a_row():
    assert {part(module) for module in FILES} == set(HEIGHT)


def test_imports_run_one_way():
    """From above to below, but for the exceptions; and each of these is still needed."""
    found = {
        f"{module} imports {name if name in FILES else name.split('.')[0]}"
        for module, names in GRAPH.items()
        for name in names
        if refused(module, name)
    }
    assert found == set(filter(None, EXCEPTIONS.splitlines()))


def circles():
    """Every circle of imports, once."""
    found, done = [], set()

    def visit(module, path):
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for name in GRAPH[module]:
                if name in GRAPH:
                    visit(name, [*path, module])
            done.add(module)

    for module in GRAPH:
        visit(module, [])
    return found


def test_no_circle():
    assert not circles()


WRITERS = {"write_text", "write_bytes", "savefig", "savez", "savetxt", "save_file", "tofile"}
# Where a file that is not whole cannot be seen: a picture into memory, a folder that gets its name later, the lock and
# the part of a download, and what `write_whole` itself does. `write_idx` is for making samples and tests.
WRITES_ITSELF = {
    "bn_common/files.py": {"open"},
    "bn_common/streams.py": {"open"},
    "bn_common/shown.py": {"savefig"},
    "benchmarks/harness.py": {"savefig"},
    "benchmarks/step/report.py": {"savefig"},
    "image_data/download.py": {"open"},
    "image_data/idx.py": {"write_bytes"},
    "parity/sides/weight_files.py": {"savez", "write_text"},
    "parity/training/trajectory.py": {"savefig"},
}


def writers(tree):
    """Names of the calls that write a file where it is to be."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            modes = [v.value for v in ast.walk(node) if isinstance(v, ast.Constant) and isinstance(v.value, str)]
            to_write = any(mode[:1] in ("w", "a", "x") and mode[1:] in ("", "b", "t", "+", "b+") for mode in modes)
            if name in WRITERS or (name == "open" and to_write):
                yield name


def test_files_are_written_whole():
    """By `bn_common.files`, or said here."""
    found = {}
    for part in ("bn_common", "jax_bn", "torch_bn", "image_data", "parity", "benchmarks"):
        for path in (ROOT / part).rglob("*.py"):
            if names := set(writers(ast.parse(path.read_text()))):
                found[path.relative_to(ROOT).as_posix()] = names
    assert found == WRITES_ITSELF


def test_files_are_short():
    long = {
        str(p.relative_to(ROOT)) for d in ("parity", "truth") for p in (ROOT / d).rglob("*.py") if lines(p) > MOST_LINES
    }
    assert not long


def lines(path):
    return len(path.read_text().splitlines())


def test_what_this_test_sees(monkeypatch):
    """An import upwards inside a function, a framework above the sides, a circle."""
    code = "def f():\n    from parity.report import Report\n    import torch.nn\n"
    assert sorted(imports(ast.parse(code))) == ["parity.report", "torch.nn"]
    assert refused("parity.records.kinds", "parity.report")
    assert refused("parity.pairing.rules", "parity.sides.torch")
    assert refused("parity.judge", "torch.nn")
    assert not refused("parity.sides.torch.record", "torch.nn")
    monkeypatch.setitem(GRAPH, "parity.records.recording", ["parity.report"])
    assert circles()
