"""Pages of Markdown that are run: what README.md and docs/ show is what a reader gets.

    python -m parity_tests.pages                      all pages; what does not hold is printed, the exit status is 1
    python -m parity_tests.pages --write README.md    the outputs of this page are put right

On a page

- a `python` block is run, all of a page in order, with shared names, in a fresh process and an empty folder; one that
  begins with `# name.py` is also saved there under this name;
- a comment that begins `<!-- python` is a block that the reader does not see: what the page takes for granted;
- a `text` block behind either is the output. A line `...` in it stands for any lines. Numbers may differ by one in the
  last place, or where both are below 1e-6: that is rounding, and another machine rounds otherwise;
- in an `sh` block, and in `code` of the text, each program, make target, module, file, option and extra must exist; an
  `sh` block with a `text` block behind it is run;
- a link to a file, or to a heading of one, must lead somewhere;
- `<!-- not run: why -->` in front of a block leaves it out; `<!-- raises: AssertionError -->`: it must end so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import tomllib
import types
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bn_common.files import write_whole

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"<!-- (not run|raises): (.*) -->")
HIDDEN = "<!-- python"
ANY = "..."
"""A line of an output that stands for any lines."""


class Block(NamedTuple):
    """A fenced block, or a hidden one.

    Attributes:
      kind: its language.
      line: of the page, from 1, on which its text begins.
      text: what is in it.
      run: whether it is run.
      raises: the class of the exception that ends it, "" for none.
    """

    kind: str
    line: int
    text: str
    run: bool = True
    raises: str = ""


def pages() -> list[Path]:
    """All of them, the README first."""
    docs = ROOT / "docs"
    return [ROOT / "README.md", *sorted(p for p in docs.rglob("*.md") if docs / "_build" not in p.parents)]


def blocks(page: str) -> list[Block]:
    """The blocks of a page in their order."""
    found, mark, lines = [], None, page.splitlines()
    i = 0
    while i < len(lines):
        line = lines[i]
        fence = re.match(r"```(\w*)", line)
        if fence or line == HIDDEN:
            end = "```" if fence else "-->"
            last = next(j for j in range(i + 1, len(lines)) if lines[j] == end)
            kind = fence[1] if fence else "python"
            raises = mark[2] if mark and mark[1] == "raises" else ""
            text = "".join(f"{t}\n" for t in lines[i + 1 : last])
            found.append(Block(kind, i + 2, text, not mark or bool(raises), raises))
            i = last
        if line.strip():
            mark = MARK.match(line)
        i += 1
    return found


def with_outputs(found: list[Block]) -> list[tuple[Block, Block | None]]:
    """Each block that is run, and the output that is shown behind it."""
    return [
        (block, after if after and after.kind == "text" else None)
        for block, after in itertools.zip_longest(found, found[1:])
        if block.run and block.kind in ("python", "sh")
    ]


# Running


def outputs(name: str, found: list[Block]) -> list[tuple[Block, str]]:
    """What each `python` block prints, and each `sh` block that shows what it does.

    Raises:
      RuntimeError: one fails; the message ends with its traceback.
    """
    pairs = with_outputs(found)
    python = [block for block, _ in pairs if block.kind == "python"]
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for block in python:
            if saved := re.match(r"# (\w+\.py)\n", block.text):
                Path(folder, saved[1]).write_text(block.text)
        if python:
            task = {"page": name, "blocks": [(block.line, block.text, block.raises) for block in python]}
            made += zip(python, _apart("run", task, folder), strict=True)
        for block, shown in pairs:
            if block.kind == "sh" and shown:
                made.append((block, _shell(block.text, folder)))
    return made


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "COLUMNS": "80", "NO_COLOR": "1", "MPLBACKEND": "agg"}


def _apart(what: str, task: Any, folder: str | Path) -> Any:
    """The answer of another process to a task: of the page's blocks, or of programs' options."""
    done = subprocess.run(
        [sys.executable, "-m", "parity_tests.pages", "--answer", what],
        input=json.dumps(task), capture_output=True, text=True, cwd=folder, env=_environment(), check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def _shell(text: str, folder: str) -> str:
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, cwd=folder, env=_environment(), check=False
    )
    if done.returncode > 1 or "Traceback" in done.stderr:  # 1: something differs, and that is what is shown
        raise RuntimeError(f"{text}{done.stderr}")
    return done.stdout


def run(task: dict[str, Any]) -> list[str]:
    """In the other process: the blocks as parts of one module, whose lines are the page's."""
    module = types.ModuleType("page")
    sys.modules["page"] = module
    printed = []
    for line, text, raises in task["blocks"]:
        code = compile("\n" * (line - 1) + text, str(ROOT / task["page"]), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            _execute(code, module.__dict__, raises)
        printed.append(out.getvalue())
    return printed


def _execute(code: types.CodeType, names: dict[str, Any], raises: str) -> None:
    try:
        exec(code, names)
    except Exception as error:
        if type(error).__name__ != raises:
            raise
    else:
        if raises:
            raise RuntimeError(f"{code.co_filename}: {raises} is not raised")


# Outputs

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def alike(shown: str, real: str) -> bool:
    """Whether an output is what is shown of it; spaces do not count, and what numbers may do stands above."""
    one, other = ([line.split() for line in text.rstrip().splitlines()] for text in (shown, _cut(shown, real)))
    return len(one) == len(other) and all(_alike(" ".join(a), " ".join(b)) for a, b in zip(one, other, strict=True))


def _alike(a: str, b: str) -> bool:
    if _NUMBER.sub("0", a) != _NUMBER.sub("0", b):
        return False
    return all(_near(m, n) for m, n in zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=True))


def _near(a: str, b: str) -> bool:
    if a == b or (a.isdecimal() and b.isdecimal()):
        return a == b
    x, y = float(a), float(b)
    digits, _, exponent = a.partition("e")
    place = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(x - y) <= 1.01 * place or max(x, y) < 1e-6


def _cut(shown: str, real: str) -> str:
    """The output with `...` where what is shown has it: as many lines in front of it and behind it."""
    wanted, lines = shown.splitlines(), real.rstrip().splitlines()
    if ANY not in wanted:
        return real.rstrip()
    before, after = wanted.index(ANY), len(wanted) - wanted.index(ANY) - 1
    return "\n".join([*lines[:before], ANY, *lines[max(before, len(lines) - after) :]])


def refreshed(page: str, name: str) -> str:
    """The page with the outputs that it has now; what is alike stays as it is."""
    found = blocks(page)
    real = dict(outputs(name, found))
    lines = page.splitlines()
    for block, shown in reversed(with_outputs(found)):
        if shown and not alike(shown.text, real[block]):
            new = _cut(shown.text, real[block]).splitlines()
            lines[shown.line - 1 : shown.line - 1 + len(shown.text.splitlines())] = [line.rstrip() for line in new]
    return "".join(f"{line}\n" for line in lines)


# Commands

_OTHERS = {".", "apt", "cd", "git", "python3.11", "tensorboard"}
"""Programs that are not this project's."""
_WRAPPERS = {"srun", "torchrun"}
_STARTS = ("make ", "python ", "pip install ", "parity ", "blenet-train", "torchrun ", "srun ", "PLANTED=")


def commands(page: str) -> Iterator[str]:
    """Those of the `sh` blocks, and those in `code` of the text, without comments."""
    for block in blocks(page):
        if block.kind == "sh":
            yield from (line for line in block.text.replace("\\\n", " ").splitlines() if line.strip())
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", page, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", text):
        if (command := " ".join(code.split())).startswith(_STARTS):
            yield command


class Asked(NamedTuple):
    """A Python program with the options that it is given."""

    program: tuple[str, ...]
    options: tuple[str, ...]


def asked(command: str) -> tuple[list[Asked], list[str]]:
    """The Python programs that a command starts, and what of it does not exist here."""
    programs, wrong = [], []
    for words in _simple(shlex.split(command, comments=True)):
        while words and re.match(r"[A-Z]+=", words[0]):
            words = words[1:]
        if words and words[0] in _WRAPPERS:
            words = ["python", *(words[words.index("-m") :] if words[0] == "torchrun" else words[2:])]
        if not words or words[0] in _OTHERS:
            continue
        name, *rest = words
        if name == "make":
            more, lacking = _make(rest)
            programs += more
            wrong += lacking
        elif name == "pip":
            wrong += _pip(rest)
        elif name == "python":
            programs += [_program(rest)] if rest[:1] not in ([], ["-c"]) else []
        elif name in _project()["scripts"]:
            module = _project()["scripts"][name].partition(":")[0].removesuffix(".__main__")
            programs += [_program(["-m", module, *rest])]
        else:
            wrong.append(f"{name} is no program that is known here")
    return programs, [f"{command}: {what}" for what in wrong]


def _simple(words: list[str]) -> Iterator[list[str]]:
    while "&&" in words or ";" in words:
        i = min(words.index(mark) for mark in ("&&", ";") if mark in words)
        yield words[:i]
        words = words[i + 1 :]
    yield words


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _program(words: list[str]) -> Asked:
    """`["-m", "parity", "check", ...]` or `["train_jax.py", ...]`."""
    n = 2 if words[0] == "-m" else 1
    n += words[:2] == ["-m", "parity"] and len(words) > 2 and words[2].isalpha()
    options = (word.partition("=")[0] for word in words[n:] if re.match(r"--?[a-z]", word))
    return Asked(tuple(words[:n]), tuple(options))


def _make(words: list[str]) -> tuple[list[Asked], list[str]]:
    text = (ROOT / "Makefile").read_text()
    rules = {m[1]: m[2] for m in re.finditer(r"^(\w+):.*\n((?:\t.*\n)*)", text, re.MULTILINE)}
    given = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    wrong = [f"{t} is no target; allowed: {', '.join(rules)}" for t in targets if t not in rules]
    wrong += [f"{name} is no variable of the Makefile" for name in given if not re.search(rf"^{name}\b", text, re.M)]
    if wrong or not given.get("ARGS"):
        return [], wrong
    if not (recipe := re.search(r"/bin/python (.*) \$\(ARGS\)", rules[targets[0]])):
        return [], [f"{targets[0]} takes no ARGS"]
    return [_program([*recipe[1].split(), *shlex.split(given["ARGS"])])], []


def _pip(words: list[str]) -> list[str]:
    extras = {name for word in words for found in re.findall(r"\[([\w,-]+)\]", word) for name in found.split(",")}
    wrong = [f"{name} is no extra" for name in sorted(extras - set(_project()["optional-dependencies"]))]
    files = [file for flag, file in itertools.pairwise(words) if flag == "-c"]
    return wrong + [f"{file} is no file" for file in files if not (ROOT / file).exists()]


def options_missing(programs: Iterable[Asked]) -> list[str]:
    """What the programs do not know, by their own --help; one process asks them all."""
    wanted: dict[tuple[str, ...], set[str]] = {}
    for program, options in programs:
        wanted.setdefault(program, set()).update(options)
    if not wanted:
        return []
    helps = _apart("helps", [list(program) for program in wanted], ROOT)
    wrong = []
    for (program, options), (text, error) in zip(wanted.items(), helps, strict=True):
        if error:
            wrong.append(f"{' '.join(program)}: {error}")
        wrong += [
            f"{' '.join(program)} has no option {option}"
            for option in sorted(options)
            if not error and not re.search(rf"(?<![\w-]){option}(?![\w-])", text)
        ]
    return wrong


def helps(programs: list[list[str]]) -> list[tuple[str, str]]:
    """In the other process: what each program prints for --help, and why there is none."""
    found = []
    for words in programs:
        module = words[0] == "-m"
        name, *sub = words[1:] if module else words
        if name == "pytest":  # its own, and this project's
            words, name, sub = ["-m", "pytest"], "pytest", ["-W", "ignore"]
        sys.argv = [name, *sub, "--help"]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            error = ""
            try:
                if module:
                    runpy.run_module(name, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(str(ROOT / name), run_name="__main__")
            except SystemExit as end:
                error = "" if end.code in (0, None) else f"--help ends with {end.code}"
            except (ImportError, OSError) as failed:
                error = str(failed)
        found.append((out.getvalue(), error))
    return found


# Links


def slugs(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    heads = [re.sub(r"[^\w\- ]", "", head.lower()) for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {head.strip().replace(" ", "-") for head in heads}


def broken_links(path: Path, page: str) -> list[str]:
    """Links within the project that lead nowhere."""
    text = re.sub(r"^```.*?^```$|`[^`]*`", "", page, flags=re.MULTILINE | re.DOTALL)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = urllib.parse.unquote(link).partition("#")
        target = path.parent / file if file else path
        if not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in slugs(target.read_text()):
            wrong.append(f"{link}: no such heading")
    return wrong


# All together


def faults(path: Path, page: str) -> list[str]:
    """What does not hold on a page: outputs, commands, links."""
    name = path.relative_to(ROOT).as_posix()
    found = blocks(page)
    shown = {block: text for block, text in with_outputs(found) if text}
    try:
        real = outputs(name, found)
    except RuntimeError as error:
        return [f"{name}: {error}"]
    wrong = [
        f"{shown[block].line}: the output is\n{_cut(shown[block].text, text)}"
        for block, text in real
        if block in shown and not alike(shown[block].text, text)
    ]
    programs, lacking = [], []
    for command in commands(page):
        more, less = asked(command)
        programs += more
        lacking += less
    wrong += [*lacking, *options_missing(programs), *broken_links(path, page)]
    return [f"{name}: {what}" for what in wrong]


def main(args: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.pages", description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files; all of the project, if none is given")
    parser.add_argument("--write", action="store_true", help="put the outputs right, instead of telling what differs")
    parser.add_argument("--answer", choices=["run", "helps"], help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.answer:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print by themselves
        json.dump({"run": run, "helps": helps}[options.answer](json.load(sys.stdin)), out)
        out.flush()
        os._exit(0)  # threads of a program that was asked for its help hold nothing up
    wrong = []
    for path in (path.resolve() for path in options.pages or pages()):
        page = path.read_text()
        if options.write:
            write_whole(path, refreshed(page, path.relative_to(ROOT).as_posix()).encode())
        else:
            wrong += faults(path, page)
    print("\n".join(wrong), end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
