"""The table of planted mistakes: each is planted in either wing, alone and deep, and `parity.check` is asked.

    python -m parity_tests.parity.planted_table
    python -m parity_tests.parity.planted_table --write docs/parity_mistakes.md

    python -m parity_tests.parity.planted_table --only norm-offset --write docs/parity_mistakes.md

Prints Markdown. With --write the README's numbers of mistakes are put right as well. With --only, the rows of these
codes are put into the page, and the others stay as they are.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
import torch
from rich.progress import track

import parity
from bn_common.files import write_whole
from parity.diagnosis.mistakes import TABLE
from parity_tests.parity.planted import CASES, Case
from parity_tests.parity.planted.networks import two_mistakes, unexplained
from parity_tests.parity.zoo import ZOO, randomise

README = Path(__file__).parents[2] / "README.md"
COLUMNS = [(wing, depth) for wing in ("torch", "flax") for depth in ("alone", "deep")]

ALIKE = """\
What the numbers are the same for, no instrument can tell apart from the numbers alone. Of two such explanations the
more usual one is named; where there is no difference at all, nothing is.

| these two | are the same numbers where |
|---|---|
| `momentum-inverted` and no mistake | the momentum is 0.5 |
| `statistics-frozen` and a momentum of 1 (in PyTorch: 0) | always; named `statistics-frozen` |
| `unbiased-variance` and `epsilon` of the moving variance | m is so large that 1/(m-1) is below the rounding |
| `initial-variance` and a moving variance of another origin | it is neither 0 nor 1 on either side; `unexplained` |
| `initial-variance` and no mistake | it was carried over (no `variables` given): both start at PyTorch's |
| `epsilon` and `epsilon-outside-sqrt` | all channels have one variance: one number, two unknown |
| `per-device-statistics` and `wrong-reduction-axes` (per image) | a device holds one image; named `wrong-reduction-axes` |
| `wrong-reduction-axes` per row, per pixel, per image | the images have one row, one column, or one pixel |
| `affine-missing`, `affine-swapped` and no mistake | gamma is 1 and beta 0, gamma equals beta: as in a fresh layer |
| `norm-offset` and `affine-missing` | the scale is 0, as in a fresh layer of that kind; named `affine-missing` |
| `bias-missing` and no mistake | the bias is 0; it is named all the same if only one side has the parameter |
| a bias before a batch norm, in training | the output never shows it (a gauge); the layer itself and moving_mean do |
| `kernel-transposed`, `-flipped`, `-hw-swapped`, `-layout` | the kernel has that symmetry; 1x1 kernels cannot be flipped |
| `flatten-order` and no mistake | the image in front of the flatten has one pixel or one channel |
| `padding` SAME and explicit | the stride is 1, or the size odd: the same padding, and no mistake |
| `pool-kind`, `stride` of a pool | the window or the image is one pixel, or constant |
| `activation` and no mistake | the inputs lie where the two functions agree (ReLU and ReLU6 below 6, leaky above 0) |
| `norm-after-activation` and no mistake | the activation is the identity on all that it is given |
| `input-scale` and a kernel that was scaled | only one side's input is not known: the input itself is compared |
| `input-layout` and no mistake | images that are symmetric, square with as many channels as rows and constant |
| `matmul-precision` and weights rounded in the conversion | the inputs are short numbers themselves |
| dampening d from the first step on, and `learning-rate` (1-d) | always; named `learning-rate`. PyTorch's own dampening leaves out the first step, and shows |
| `weight-decay-coupling` and no mistake | plain SGD: the same step |
| `gradient-clipping` of updates and of gradients | plain SGD: named as of gradients, to norm / learning rate |
| `loss-reduction` and `learning-rate` | plain SGD, without a look at the loss; here the loss is compared first |
| `loss-reduction` under Adam | the step forgets the factor, but for epsilon; here the loss is compared first |
| `bias-correction` and a schedule of the learning rate | the schedule is the correction; in one run of few steps |
"""  # noqa: E501


class Outcome(NamedTuple):
    """What became of one case."""

    case: Case
    caught: bool
    codes: list[str]
    evidence: str

    @property
    def named(self) -> bool:
        """Named first."""
        return self.codes[:1] == [self.case.code]


def check(made: Any) -> Any:
    return made.check(made.torch_module, made.flax_module, *made.inputs, **made.options)


def outcome(case: Case) -> Outcome:
    try:
        report = check(case.make())
    except Exception as error:  # a row of the table too
        return Outcome(case, False, [], f"{type(error).__name__}: {error}".splitlines()[0])
    evidence = report.diagnoses[0].evidence if report.diagnoses else ""
    return Outcome(case, not report.ok, [d.code for d in report.diagnoses], evidence)


def table(outcomes: list[Outcome]) -> str:
    """A row a code, a column for each wing and depth: how many were named first, of how many."""
    lines = [
        "| code | the mistake | PyTorch, alone | PyTorch, deep | Flax, alone | Flax, deep | what the numbers say |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for code, sentence in ((m.code, m.sentence) for m in TABLE):
        of_code = [o for o in outcomes if o.case.code == code]
        if not of_code:
            continue
        cells = []
        for wing, depth in COLUMNS:
            here = [o for o in of_code if o.case.wing == wing and (o.case.depth == "alone") == (depth == "alone")]
            cells.append(f"{sum(o.named for o in here)}/{len(here)}")
        example = next((o.evidence for o in of_code if o.named), "not named").replace("|", "\\|")
        lines.append(f"| `{code}` | {sentence} | {' | '.join(cells)} | {example} |")
    return "\n".join(lines)


def failures(outcomes: Iterable[Outcome]) -> str:
    """The cases that were not named first."""
    missed = [o for o in outcomes if not o.named]
    if not missed:
        return "All were caught and named first."
    rows = [f"- `{o.case.name}`: {', '.join(o.codes) or 'nothing named'}. {o.evidence}" for o in missed]
    return f"{len(missed)} were not named first:\n\n" + "\n".join(rows)


def pairs_text() -> str:
    """Correct pairs, two mistakes, and what fits nothing."""
    silent, checked = 0, 0
    for pair in ZOO:
        for mode in pair.modes:
            torch.manual_seed(0)
            inputs = pair.inputs(np.random.default_rng(0), 4)
            report = parity.check(randomise(pair.torch()), pair.flax(), *inputs, train=mode == "train", **pair.options)
            checked += 1
            silent += bool(report.ok and not report.diagnoses)
    both = [(two.name, two.expected, {d.code: d.layer for d in check(two.make()).diagnoses}) for two in two_mistakes()]
    alone = [[d.code for d in check(make()).diagnoses] == ["unexplained"] for _, make, _ in unexplained()]
    rows = "\n".join(
        f"| {' and '.join(f'`{code}` at `{layer}`' for code, layer in expected.items())} | "
        f"{'both' if expected == named else ', '.join(named) or 'none'} |"
        for _, expected, named in both
    )
    return f"""## Correct pairs, two mistakes, and none

Of {checked} correct pairs and modes (`parity_tests/parity/zoo`: ResNet, VGG, perceptron, ConvNeXt, transformers, BLeNet and
others, in linen and NNX), `parity.check` is silent about {silent}. Of {len(alone)} differences that are no known mistake,
{sum(alone)} are called `unexplained`, and nothing else. Two mistakes in one network:

| planted | named |
|---|---|
{rows}
"""  # noqa: E501


def text(cases: list[Case], others: bool) -> str:
    """The whole page; the pairs too, if `others`."""
    outcomes = [outcome(case) for case in track(cases, "mistakes", transient=True, disable=not sys.stderr.isatty())]
    caught, named = sum(o.caught for o in outcomes), sum(o.named for o in outcomes)
    versions = f"jax {jax.__version__}, flax {flax.__version__}, torch {torch.__version__}"
    return f"""# Porting mistakes that `parity.check` knows

Made by `python -m parity_tests.parity.planted_table --write docs/parity_mistakes.md`, with {versions}.

{len(outcomes)} mistakes are planted by `parity_tests/parity/planted`, in the PyTorch wing or in the Flax wing, in a single layer
(alone) or inside a network (deep: three blocks of convolution, batch norm, activation and pool with three linear layers;
a ResNet; a transformer), in several ways each. {caught} of them are caught, {named} are named first. A cell says how many
were named first, of how many. How either side writes it, and what to write instead: [the porting guide](porting.md).

{table(outcomes)}

{failures(outcomes)}

A difference that is none of these is reported as `unexplained`, with the first layer that differs.

{pairs_text() if others else ""}
## What cannot be told apart

{ALIKE}"""  # noqa: E501


def patched(page: str, part: str) -> str:
    """The page with the rows of a part of it.

    Raises:
      ValueError: not all of the part was named first; then only the whole page is right.
    """
    if "All were caught and named first." not in page or "All were caught and named first." not in part:
        raise ValueError("not all are named first; allowed: --write without --only")
    row = re.compile(r"^\| `([a-z-]+)` \| .*\n", re.MULTILINE)
    rows = {
        m[1]: m[0]
        for text in (page.partition("All were")[0], part.partition("All were")[0])
        for m in row.finditer(text)
    }
    start, end = page.index("|---|---:|"), page.index("\nAll were")
    start = page.index("\n", start) + 1
    page = page[:start] + "".join(rows[m.code] for m in TABLE if m.code in rows) + page[end:]
    page = re.sub(r"^\d+ mistakes are planted", f"{len(CASES)} mistakes are planted", page, flags=re.MULTILINE)
    return re.sub(r"\d+ of them are caught, \d+ are", f"{len(CASES)} of them are caught, {len(CASES)} are", page)


def counted(readme: str) -> str:
    """The README, with the numbers of planted mistakes and of their kinds."""
    readme = re.sub(r"all \d+ mistakes", f"all {len(CASES)} mistakes", readme)
    return re.sub(r"\[\d+ of them\]", f"[{len(TABLE)} of them]", readme)


def main(args: list[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.parity.planted_table", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the page to this file")
    parser.add_argument("--only", default="", metavar="CODES", help="of these codes, separated by commas")
    options = parser.parse_args(args)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        # Most pairs share one of their two sides: it is compiled once.
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        only = options.only.split(",") if options.only else [m.code for m in TABLE]
        page = text([case for case in CASES if case.code in only], others=not options.only)
    print(page, end="")
    if options.write is not None:
        page = patched(options.write.read_text(), page) if options.only else page
        write_whole(options.write, page.encode())
        write_whole(README, counted(README.read_text()).encode())


if __name__ == "__main__":
    main()
