"""What many accelerators would do with ResNet-50, computed from its compiled programs; and when to synchronise.

    python -m benchmarks.scaling --write docs/scaling.md

Reads the figures of `benchmarks.accelerators`. Nothing is timed: seconds are what the cards' public figures allow.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from benchmarks.accelerators.__main__ import KEY
from benchmarks.harness import measured, rows_markdown, rows_table
from bn_common.command_line import parse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROG = "python -m benchmarks.scaling"
FIGURES = Path(__file__).parents[1] / "docs" / "accelerators.json"
IMAGES = 32
"""For each device, in the compiled steps of ResNet-50."""
PARAMETERS, NORMS = 25_557_032, 53
"""Of ResNet-50."""
FORWARD = 4.09e9
"""Multiply-adds of a forward pass on one image of 224 x 224 (He et al. 2015 count 3.8e9 with the stride elsewhere)."""
SHARE = 0.05
"""Of a step, that synchronised statistics may cost before they are said to stop paying."""

Row = dict[str, Any]


class Card(NamedTuple):
    """Public figures: of NVIDIA's H100 SXM data sheet, and of Google Cloud's page on the v5e.

    Attributes:
      flops: dense bfloat16, a second.
      memory: bytes a second.
      link: bytes a second that one device sends to the others, in one direction.
      hop: seconds that a small message takes to the next device: an ASSUMPTION, of the order that is reported.
    """

    flops: float
    memory: float
    link: float
    hop: float


CARDS = {
    "H100": Card(flops=989e12, memory=3.35e12, link=450e9, hop=2.5e-6),
    "v5e": Card(flops=197e12, memory=819e9, link=200e9, hop=1e-6),
}


class Machine(NamedTuple):
    """So many cards.

    Attributes:
      name: as people call it.
      card: in `CARDS`.
      devices: how many.
      hops: messages that follow each other in a small all-reduce: there and back, along each axis of the network.
    """

    name: str
    card: str
    devices: int
    hops: int


MACHINES = (
    Machine("one H100", "H100", 1, 0),
    Machine("8 x H100, NVLink", "H100", 8, 8),
    Machine("one v5e", "v5e", 1, 0),
    Machine("v5e-256, a torus of 16 x 16", "v5e", 256, 2 * 2 * 8),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to read and write."""

    figures: Path = FIGURES
    """What `python -m benchmarks.accelerators --json` wrote."""
    json: Path | None = None
    """Also write the figures to this file."""
    write: Path | None = None
    """Also write a page to this file, in Markdown, and a figure beside it."""


def main(args: Sequence[str] | None = None) -> None:
    """The program."""
    options = parse(Options, args, prog=PROG, description="ResNet-50 on many accelerators, computed.")
    measured(options, PROG, _check, measure, _markdown, draw)


def _check(options: Options) -> None:
    try:
        rows = json.loads(options.figures.read_bytes())["rows"]
        found = {tuple(row[key] for key in KEY) for row in rows if "failed" not in row}
    except (OSError, ValueError, KeyError, TypeError) as error:
        allowed = "a file that python -m benchmarks.accelerators --json wrote"
        raise ValueError(f"--figures is {options.figures}; allowed: {allowed}") from error
    for card in CARDS:
        for devices in (1, 4):
            wanted = ("ResNet-50", "train", "bfloat16", card, devices, "jax_bn")
            if wanted not in found:
                raise ValueError(f"--figures has no {' '.join(map(str, wanted))}; allowed: figures of all programs")


def measure(options: Options, console: Console) -> dict[str, Any]:
    """Compute all tables, and print them."""
    rows = json.loads(options.figures.read_bytes())["rows"]
    at = {tuple(row[key] for key in KEY): row for row in rows if "failed" not in row}
    found = {"rows": rows, "checks": checks(at), "machines": [step(machine, at) for machine in MACHINES]}
    found["least"] = [least_images(machine, at) for machine in MACHINES if machine.devices > 1]
    console.print(rows_table(CHECKS, found["checks"]))
    console.print(rows_table(STEPS, found["machines"]))
    console.print(rows_table(LEAST, found["least"]))
    return found


def flops(images: int) -> float:
    """Of a training step: a multiplication and an addition, forward, and twice that backward."""
    return 2 * 3 * FORWARD * images


def checks(at: dict[tuple[Any, ...], Row]) -> list[Row]:
    """What the model says of a program beside what stands in it."""
    rows = []
    for card in CARDS:
        one, four = (at["ResNet-50", "train", "bfloat16", card, count, "jax_bn"] for count in (1, 4))
        if one["flops"]:
            rows.append({"what": f"FLOP of a step, {card}", "model": flops(IMAGES), "program": one["flops"]})
        # The gradients and the loss, which XLA puts together as it likes, and one a norm and direction.
        rows.append({"what": f"operations over 4 x {card}", "model": 2 * NORMS + 1, "program": four["collectives"]})
        rows.append({"what": f"bytes of these, {card}", "model": 4.0 * PARAMETERS, "program": four["sent"]})
    return rows


def step(machine: Machine, at: dict[tuple[Any, ...], Row], images: int = IMAGES) -> Row:
    """Seconds of a training step: the larger of arithmetic and memory, then the gradients, then the statistics.

    The gradients go round a ring, 2 (N - 1) / N of their bytes through each link; nothing is taken to overlap, which is
    the worst that can be. Traffic grows with the images, but for the weights, which are counted with it.
    """
    card, program = CARDS[machine.card], at["ResNet-50", "train", "bfloat16", machine.card, 1, "jax_bn"]
    arithmetic, memory = flops(images) / card.flops, program["traffic"] / IMAGES * images / card.memory
    around = 2 * (machine.devices - 1) / machine.devices
    gradients = around * 4 * PARAMETERS / card.link + machine.hops * card.hop
    collectives = at["ResNet-50", "train", "bfloat16", machine.card, 4, "jax_bn"]["collectives"]
    statistics = collectives * machine.hops * card.hop
    seconds = max(arithmetic, memory) + (gradients + statistics if machine.devices > 1 else 0)
    return {
        "machine": machine.name,
        "arithmetic": arithmetic,
        "memory": memory,
        "gradients": gradients if machine.devices > 1 else 0.0,
        "statistics": statistics,
        "seconds": seconds,
        "images": images * machine.devices / seconds,
        "share": statistics / seconds,
    }


def least_images(machine: Machine, at: dict[tuple[Any, ...], Row]) -> Row:
    """From how many images on each device statistics of the whole batch cost at most SHARE of a step."""
    images = next(n for n in (2**k for k in itertools.count()) if step(machine, at, n)["share"] <= SHARE)
    return {"machine": machine.name, "least": images, "share": step(machine, at, images)["share"]}


CHECKS = {
    "": lambda row: row["what"],
    "model": lambda row: f"{row['model']:,.0f}",
    "program": lambda row: f"{row['program']:,.0f}",
    "program / model": lambda row: f"{row['program'] / row['model']:.2f}",
}
STEPS = {
    "": lambda row: row["machine"],
    "arithmetic, ms": lambda row: f"{1e3 * row['arithmetic']:.2f}",
    "memory, ms": lambda row: f"{1e3 * row['memory']:.2f}",
    "gradients, ms": lambda row: f"{1e3 * row['gradients']:.2f}",
    "statistics, ms": lambda row: f"{1e3 * row['statistics']:.2f}",
    "step, ms": lambda row: f"{1e3 * row['seconds']:.2f}",
    "images/s": lambda row: f"{row['images']:,.0f}",
}
LEAST = {
    "": lambda row: row["machine"],
    "images on each device, at least": lambda row: str(row["least"]),
    "statistics' share there": lambda row: f"{row['share']:.1%}",
}


def _markdown(found: dict[str, Any], options: Options) -> str:
    """docs/scaling.md."""
    picture = options.write.with_suffix(".png").name if options.write else ""
    cards = {
        "": lambda row: row[0],
        "bfloat16, TFLOP/s": lambda row: f"{row[1].flops / 1e12:g}",
        "memory, GB/s": lambda row: f"{row[1].memory / 1e9:g}",
        "link, GB/s": lambda row: f"{row[1].link / 1e9:g}",
        "hop, us (assumed)": lambda row: f"{1e6 * row[1].hop:g}",
    }
    return f"""# What many accelerators would do

Made by `{PROG} --write docs/scaling.md` from the compiled programs of [accelerators.md](accelerators.md). **Nothing
here was timed**: these are the seconds that public figures of the cards allow, for ResNet-50 in bfloat16 with {IMAGES}
images of 224 x 224 on each device and this project's batch norm. A real step takes longer; how two of them
compare is what the page is for.

{rows_markdown(cards, list(CARDS.items()))}

A step takes the larger of arithmetic (its FLOP by the card's) and memory (the traffic that stands in the program, by
the card's bandwidth). Over N devices the gradients follow, 2 (N - 1) / N of their bytes through each link, and the
statistics of {NORMS} batch norms, forward and backward: their bytes are nothing, but each is a message there and back
that the next layer waits for. Nothing is taken to overlap, the worst that can be.

## The model beside the programs

{rows_markdown(CHECKS, found["checks"])}

## A step

{rows_markdown(STEPS, found["machines"])}

![Roofline: arithmetic by traffic, a line for each card]({picture})

Every step lies on the sloping part of the roof: memory decides, and what a batch norm reads and writes is what it
costs.

## When synchronised statistics stop paying

From so many images on each device on, statistics of the whole batch cost at most {SHARE:.0%} of a step:

{rows_markdown(LEAST, found["least"])}

With fewer, `--sync-bn local` is faster. With {IMAGES} or more on each device its own statistics are hardly noisier than
those of all; they are needed where a device has a few images only, which is where they cost most: then take them
over a group of devices (`axis_index_groups`, `group=`).
"""


def draw(found: dict[str, Any]) -> Figure:
    """A roofline: what a program does for each byte, and how fast that can go."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(CARDS, ("tab:green", "tab:blue"), strict=True))
    for name, card in CARDS.items():
        ridge = card.flops / card.memory
        axes.plot([1, ridge, 2000], [card.memory, card.flops, card.flops], color=colors[name], label=name)
    known = {row["network"]: row["flops"] for row in found["rows"] if row.get("flops") and row["step"] == "train"}
    shown = {("BLeNet", "float32"), ("ResNet-50", "bfloat16")}
    for row in found["rows"]:
        wanted = row["step"] == "train" and row["devices"] == 1 and (row["network"], row["dtype"]) in shown
        if wanted and "failed" not in row:
            each = known[row["network"]] / row["traffic"]
            card = CARDS[row["card"]]
            marker = "o" if row["norm"] == "jax_bn" else "x"
            axes.plot(each, min(card.flops, each * card.memory), marker, color=colors[row["card"]])
            if row["norm"] == "jax_bn":
                place = (each, min(card.flops, each * card.memory))
                axes.annotate(row["network"], place, textcoords="offset points", xytext=(6, -10), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte of traffic", ylabel="FLOP/s at most")
    axes.set_title("Training steps under the roof (o: this project's batch norm, x: Flax's)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
