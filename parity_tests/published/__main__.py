"""Is the bridge right on networks that nobody here wrote? Hugging Face's PyTorch classes against its Flax classes.

    make published                                   all pairs, written to docs/published.md
    make published ARGS="--pairs BERT T5"            these anew; the others as runs/published.json has them

Tiny configurations, random weights, nothing is downloaded; each pair in a process of its own. It needs transformers
4.57, the last line with Flax classes, in an environment of its own, which `make published` sets up.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from bn_common.files import write_whole
from parity_tests.published.pairs import PAIRS, SHIMS, Built, Pair, built

PACKAGES = "transformers", "torch", "jax", "flax", "numpy"
MOST_SAID = 300
Row = dict[str, Any]

INTRODUCTION = """\
Hugging Face publishes these networks in PyTorch and in Flax. Each pair is tiny and random, without any download, and
checked in a process of its own.

- **arguments**: what `parity.check(torch_module, flax_module, keywords=...)` is given besides: Flax's module takes some
  inputs that its outer class makes otherwise.
- **weights**: how many of the tensors that `parity.to_flax` carries are those of Hugging Face's own conversion, bit for
  bit, of all that Flax's module has.
- **eval**, **train**: the verdict on the pair as it is published, or the codes of what differs.
- **planted**: the Flax side's configuration has one entry otherwise; which codes `parity.check` gives then, in eval.
- **CPU s**, **GB**: of the first check in eval, with all that is compiled; the most memory of the process.
"""
DIFFERS = """\
`unbiased-variance` of ResNet and RegNet in training is true: PyTorch's batch norm keeps the unbiased variance, Flax's
the biased one, so that these statistics differ by m/(m-1). `train-uses-moving-statistics` of RegNet is true as well:
Flax's `FlaxRegNetXLayer` calls `self.layer(hidden_state)` without `deterministic`, whose default is True, so that the
batch norms in it predict while the network is trained.
"""
FREE = """\
Another `rope_theta` cannot be planted in Flax's LLaMA: it takes no notice of it, its frequencies are those of 10000.
"""


def checked(pair: Built, *, train: bool) -> Row:
    """`parity.check` of one pair: its verdict, or what it raises."""
    import parity

    began = time.process_time()
    options = {} if pair.flax_inputs is None else {"flax_inputs": pair.flax_inputs}
    try:
        report = parity.check(pair.torch_module, pair.flax_module, keywords=pair.keywords, train=train, **options)
        codes = list(dict.fromkeys(d.code for d in report.diagnoses))
        told = {"ok": bool(report.ok), "codes": codes, "said": report.summary, "notes": list(report.notes)}
    except Exception as error:  # it stands in the table
        told = {"ok": False, "codes": [], "said": f"raises {type(error).__name__}: {error}", "notes": []}
    return {**told, "said": told["said"][:MOST_SAID], "cpu_s": round(time.process_time() - began, 1)}


def carried(pair: Built) -> Row:
    """How many tensors of `parity.to_flax` are those of Hugging Face's own conversion, of all in Flax's module."""
    import numpy as np
    from flax.traverse_util import flatten_dict
    from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

    import parity

    def flat(variables: Any) -> Row:
        return flatten_dict(variables if "params" in variables else {"params": variables})

    names = flat(pair.flax_module.params)
    expected = flat(convert_pytorch_state_dict_to_flax(dict(pair.torch_module.state_dict()), pair.flax_module))
    options = {} if pair.flax_inputs is None else {"flax_inputs": pair.flax_inputs}
    try:
        ours = flat(parity.to_flax(pair.torch_module, pair.flax_module, keywords=pair.keywords, **options))
    except Exception as error:  # it stands in the table
        return {"equal": 0, "of": len(names), "said": f"raises {type(error).__name__}: {error}"[:MOST_SAID]}

    def is_same(name: Any) -> bool:
        a, b = np.asarray(ours[name]), np.asarray(expected[name])
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()

    wrong = ["/".join(name) for name in names if not (name in ours and name in expected and is_same(name))]
    return {"equal": len(names) - len(wrong), "of": len(names), "said": ", ".join(wrong)[:MOST_SAID]}


def measured(name: str) -> Row:
    """The row of one pair, in this process."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    warnings.simplefilter("ignore")
    pair = built(name)
    row: Row = {"name": name, "versions": {package: importlib.metadata.version(package) for package in PACKAGES}}
    row["arguments"] = [] if pair.flax_inputs is None else _others(pair)
    row |= {"eval": checked(pair, train=False), "train": checked(pair, train=True), "weights": carried(pair)}
    row["planted"] = checked(built(name, mistaken=True), train=False)
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return {**row, "gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}


def _others(pair: Built) -> list[str]:
    """The names of Flax's inputs that are not PyTorch's."""
    given = pair.flax_inputs or {}
    return [name for name, a in given.items() if name not in pair.keywords or a is not pair.keywords[name]]


def in_a_process(name: str) -> Row:
    """The row of one pair, in a process of its own.

    Raises:
      RuntimeError: it has ended otherwise.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "parity_tests.published", "--one", name]
    made = subprocess.run(command, env={**os.environ, **quiet}, stdout=subprocess.PIPE, text=True)
    if made.returncode:
        raise RuntimeError(f"the process of {name} ended with status {made.returncode}")
    row: Row = json.loads(made.stdout.splitlines()[-1])
    return row


def _cell(found: Row) -> str:
    return "ok" if found["ok"] else ", ".join(f"`{code}`" for code in found["codes"]) or "not ok"


def _planted(pair: Pair, found: Row) -> str:
    entry = _entries(pair.mistake)
    if found["ok"]:
        return f"{entry}: **not found**"
    first = found["codes"][:1] == [pair.code]
    return f"{entry}: {_cell(found)}{'' if first else f' (`{pair.code}` is right)'}"


def _entries(mistake: Any) -> str:
    return ", ".join(f"{k}: {_entries(v)}" if hasattr(v, "items") else f"{k}={v}" for k, v in mistake.items())


def misses(rows: list[Row]) -> list[str]:
    """Everything that is not as it should be, a sentence each."""
    found = []
    for row in rows:
        pair = PAIRS[row["name"]]
        for mode, differs in (("eval", ()), ("train", pair.differs)):
            said = row[mode]
            if (said["codes"] != list(differs)) if differs else not said["ok"]:
                found.append(f"{row['name']}, {mode}: {said['said']}")
        if row["weights"]["equal"] != row["weights"]["of"]:
            found.append(f"{row['name']}, weights: {row['weights']['said']}")
        if row["planted"]["codes"][:1] != [pair.code]:
            found.append(f"{row['name']}, planted: {row['planted']['said']}")
        elif len(row["planted"]["codes"]) > 1:
            others = ", ".join(f"`{code}`" for code in row["planted"]["codes"][1:])
            found.append(f"{row['name']}, planted: {others} is named beside `{pair.code}`, and follows from it")
    return found


def page(rows: list[Row]) -> str:
    """docs/published.md."""
    lines = [
        "| pair | classes | arguments | weights | eval | train | planted: found as | CPU s | GB |",
        "|---|---|---|---:|---|---|---|---:|---:|",
    ]
    for row in rows:
        pair = PAIRS[row["name"]]
        _, torch_class, flax_class = pair.classes
        arguments = f"`flax_inputs`: {', '.join(row['arguments'])}" if row["arguments"] else ""
        equal = f"{row['weights']['equal']} of {row['weights']['of']}"
        cells = [_cell(row["eval"]), _cell(row["train"]), _planted(pair, row["planted"])]
        numbers = f"{row['eval']['cpu_s']:.0f} | {row['gb']:.1f}"
        lines.append(
            f"| {row['name']} | {torch_class}, {flax_class} | {arguments} | {equal} | {' | '.join(cells)} | {numbers} |"
        )
    wrong = misses(rows)
    told = "\n".join(f"- {line}" for line in wrong).replace("|", "\\|") if wrong else "None."
    versions = sorted({", ".join(f"{package} {v}" for package, v in row["versions"].items()) for row in rows})
    newline = "\n"
    return f"""# Networks that nobody here wrote

Made by `make published`, with {"; ".join(versions)}.

{INTRODUCTION}
{newline.join(lines)}

{DIFFERS}
{FREE}
What is put right so that transformers runs with this JAX:

{newline.join(f"- {shim}" for shim in SHIMS)}

What is not as it should be ({len(wrong)}):

{told}
"""


def main(args: list[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.published", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="PAIR", help=", ".join(PAIRS))
    parser.add_argument("--rows", type=Path, help="a JSON file that keeps the rows; those not asked for are from it")
    parser.add_argument("--write", type=Path, help="the page, written where there is a row for every pair")
    parser.add_argument("--one", choices=PAIRS, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.one:
        print(json.dumps(measured(options.one)))
        return
    kept: dict[str, Row] = {}
    if options.rows is not None and options.rows.exists():
        kept = {row["name"]: row for row in json.loads(options.rows.read_text())}
    for name in options.pairs:
        kept[name] = in_a_process(name)
        print(f"{name}: {', '.join(f'{mode} {_cell(kept[name][mode])}' for mode in ('eval', 'train', 'planted'))}")
        rows = [kept[name] for name in PAIRS if name in kept]
        if options.rows is not None:
            write_whole(options.rows, (json.dumps(rows, indent=1) + "\n").encode())
    missing = [name for name in PAIRS if name not in kept]
    if options.write is not None and missing:
        parser.error(f"--write needs a row for every pair, and there is none for {', '.join(missing)}")
    if options.write is not None:
        write_whole(options.write, page(rows).encode())


if __name__ == "__main__":
    main()
