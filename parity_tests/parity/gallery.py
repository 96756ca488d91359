"""The gallery of mistakes, docs/gallery.md: made from the table, the fixes, the porting guide and the planted mistakes.

    python -m parity_tests.parity.gallery --write docs/gallery.md

Each code is a heading, so that a card of the report can lead there.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from bn_common.files import write_whole
from parity.diagnosis.mistakes import TABLE, Mistake

DOCS = Path(__file__).parents[2] / "docs"
PROGRAM = "python -m parity_tests.parity.gallery --write docs/gallery.md"


class Group(NamedTuple):
    """Mistakes that are recognised alike: those of the table from `first` to the next group's."""

    first: str
    title: str
    recognised: str


GROUPS = (
    Group(
        "no-partner",
        "Norms and parameters",
        "A norm's output and its moving statistics are fitted on each side alone: over which axes, with which "
        "epsilon, scale and offset does the input give this output? The two nearest answers are compared, and "
        "what they differ in is named.",
    ),
    Group(
        "kernel-transposed",
        "Convolutions and linear layers",
        "Each side's product is computed anew from its input and weights, with the kernel turned, flipped and "
        "exchanged, and with other strides, dilations and paddings, until it gives the output.",
    ),
    Group(
        "activation",
        "Between two layers",
        "What one layer gives and the next one takes is known. What lies between is looked for among "
        "activations, pools, flattens, joins, resizings and the parts of an attention, on each side alone.",
    ),
    Group(
        "input-layout",
        "The input",
        "The first layer's input on one side is compared with that of the other, turned and scaled.",
    ),
    Group(
        "label-offset",
        "The loss",
        "The loss and its gradient with respect to the output are compared, before any of it has gone through "
        "the network.",
    ),
    Group(
        "gradient-clipping",
        "The optimiser",
        "Both optimisers are given the same parameters and the same gradients, made for the purpose, and "
        "their steps are fitted; needs `steps=` and `optimizers=`.",
    ),
    Group(
        "initialisation",
        "New networks",
        "`parity.check_initialisation` makes some dozen networks on each side, and compares of every tensor how its "
        "numbers are distributed.",
    ),
)

REPORTS = {
    "per-device-statistics": ("google/flax", "issues/319", "the examples take statistics of each device's share"),
    "norm-offset": ("linkedin/Liger-Kernel", "issues/74", "Gemma's RMS norm has an offset of 1, Llama's has not"),
    "epsilon": ("huggingface/candle", "pull/271", "1e-5 for 1e-6 in a port of Llama"),
    "momentum-inverted": ("pytorch/vision", "issues/8250", "MaxViT has TensorFlow's 0.99 in PyTorch's convention"),
    "momentum": ("scverse/scvi-tools", "pull/2309", "Flax's batch norm is given PyTorch's numbers"),
    "unbiased-variance": (
        "rwth-i6/returnn",
        "issues/1539",
        "running variance biased in one back end, unbiased in another",
    ),
    "tied-weights": ("google/torchax", "issues/68", "two weights after loading where the model has one"),
    "kernel-flipped": ("google/flax", "issues/2577", "a transposed convolution needs a flipped kernel"),
    "padding": ("google/flax", "issues/963", "a ResNet predicts otherwise: SAME for explicit padding"),
    "matmul-precision": ("jax-ml/jax", "issues/7010", "low precision on TPUs noticed late in two ports"),
    "activation": ("goodfire-ai/spd", "issues/624", "exact GELU in PyTorch, tanh in JAX"),
    "pool-count-padding": ("google/flax", "issues/2401", "the average counts the padding"),
    "dropout-active": ("pytorch/pytorch", "issues/26338", "`F.dropout` does not look at `eval()`"),
    "resize": ("sayakpaul/cmmd-pytorch", "issues/4", "JAX antialiases by default, PyTorch does not"),
    "attention-heads": ("huggingface/transformers", "issues/25199", "rotary pairs: halves of a head, or neighbours"),
    "softmax-axis": ("pytorch/pytorch", "issues/1763", "which axis softmax takes if none is given"),
    "position-ids": ("huggingface/trl", "issues/469", "GPT-2 with padding in front counts the padding"),
    "adam-epsilon": ("google-deepmind/optax", "issues/532", "the same in RMSprop: epsilon inside or outside the root"),
    "weight-decay-coupling": ("google-deepmind/optax", "issues/417", "PyTorch's Adam with weight decay is not AdamW"),
    "momentum-dampening": ("pytorch/pytorch", "pull/152833", "the first step leaves the dampening out"),
}
"""Code -> repository, thread and what it is about: public reports that were read."""


def in_the_numbers() -> dict[str, str]:
    """Code -> what the porting guide says of it."""
    guide = (DOCS / "porting.md").read_text()
    entry = re.compile(r"^(?:- )?((?:`[a-z-]+`(?:, )?)+)([^:`\n]*): (.*?)(?=^- |\n\n|\Z)", re.MULTILINE | re.DOTALL)
    found = {}
    for codes, which, text in entry.findall(guide):
        for code in re.findall(r"`([a-z-]+)`", codes):
            found.setdefault(code, " ".join(f"{f'{which.strip()}: ' if which.strip() else ''}{text}".split()))
    return found


def evidences() -> dict[str, str]:
    """Code -> what the report said of one that was planted."""
    page = (DOCS / "parity_mistakes.md").read_text()
    return dict(re.findall(r"^\| `([a-z-]+)` \| .*? \| ((?:[^|\n]|\\\|)+) \|$", page, re.MULTILINE))


def entry(mistake: Mistake, numbers: str, evidence: str) -> str:
    """What is told of one."""
    (torch_wrong, torch_right), (flax_wrong, flax_right) = mistake.fix
    convention = f"\n\nA known convention: {mistake.convention}." if mistake.convention else ""
    report = ""
    if mistake.code in REPORTS:
        repository, thread, about = REPORTS[mistake.code]
        number = thread.partition("/")[2]
        report = f"\n\nReported: [{repository}#{number}](https://github.com/{repository}/{thread}), {about}."
    sentence = mistake.sentence[0].upper() + mistake.sentence[1:]
    return f"""### `{mistake.code}`

{sentence}. It shows first in: {mistake.phase}.{convention}

In the numbers: {numbers}

The report says: *{evidence.replace("*", chr(92) + "*").replace("[", chr(92) + "[")}*

| | wrong | right |
|---|---|---|
| PyTorch | `{torch_wrong}` | `{torch_right}` |
| Flax | `{flax_wrong}` | `{flax_right}` |{report}
"""


def text() -> str:
    """The whole page."""
    numbers, said = in_the_numbers(), evidences()
    parts = [
        f"""# Gallery of mistakes

Made by `{PROGRAM}`. For each mistake that `parity.check` knows: what it is, what it looks like in the numbers, what the
report says of one that was planted, both frameworks' code, and a public report where one is known. How often each was
planted, and found: [the table](parity_mistakes.md). What is no code of its own is `unexplained`; what cannot be told
apart stands [there](parity_mistakes.md#what-cannot-be-told-apart), too.
"""
    ]
    groups = {group.first: group for group in GROUPS}
    for mistake in TABLE:
        if group := groups.get(mistake.code):
            parts.append(f"## {group.title}\n\n{group.recognised}\n")
        parts.append(entry(mistake, numbers[mistake.code], said[mistake.code]))
    return "\n".join(parts)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.parity.gallery", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page to this file instead of printing it")
    options = parser.parse_args()
    if options.write is None:
        print(text(), end="")
    else:
        write_whole(options.write, text().encode())


if __name__ == "__main__":
    main()
