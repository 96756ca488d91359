"""How far the runs are apart after every step, whether that is too far, and how it is shown."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from bn_common.files import write_whole
from parity.comparison import bounds as compare
from parity.records.distance import relative_error
from parity.records.side import Snapshot

# A step rounds in some hundred places, a nudge in two: at the weights and at the inputs.
NUDGES = 30
# A tensor much smaller than the largest of its kind is measured against this part of that one.
SMALL_TENSOR = 1e-3


class Over(NamedTuple):
    """Where a bound was passed first.

    Attributes:
      step: from 1.
      kind: "loss", "parameters", "statistics" or a buffer of the optimiser.
      between: which two runs.
      distance, bound: relative.
    """

    step: int
    kind: str
    between: str
    distance: float
    bound: float


@dataclass
class Trajectory:
    """Both sides' training, step by step.

    Attributes:
      optimizer, lr, dtype: as given.
      gauges: PyTorch's names of the parameters that have a true gradient of 0, and are compared as `Fixed` says.
      notes: what could not be looked at.
      losses: run -> loss of every step, before it. "PyTorch64" and "Flax64" are the referees.
      distances: kind -> pair of runs -> distance after every step.
      bounds: kind -> pair of runs -> bound at every step, for those that are judged.
      first_over: where a bound was passed first; None: nowhere.
    """

    optimizer: str
    lr: float
    dtype: str
    gauges: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    distances: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    bounds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    first_over: Over | None = None

    @property
    def ok(self) -> bool:
        """Whether both sides stayed together."""
        return self.first_over is None

    @property
    def steps(self) -> int:
        """How many there were."""
        return len(next(iter(self.losses.values()), []))

    @property
    def verdict(self) -> str:
        """In one sentence."""
        if self.first_over is None:
            return f"together for {self.steps} steps of {self.optimizer} in {self.dtype}"
        step, kind, between, distance, bound = self.first_over
        return f"apart at step {step}: {kind}, {between}: {distance:.2g} where rounding allows {bound:.2g}"

    def table(self) -> Table:
        """For the terminal: a row for each thing compared, after the last step."""
        table = Table(title=f"{self.optimizer}, lr {self.lr:g}, {self.dtype}, {self.steps} steps")
        for column in ("what", "between", "distance", "bound", ""):
            table.add_column(column, justify="right" if column in ("distance", "bound") else "left")
        for kind, pairs in self.distances.items():
            for between, values in pairs.items():
                bounds = self.bounds.get(kind, {}).get(between)
                is_over = bounds is not None and any(v > b for v, b in zip(values, bounds, strict=True))
                mark = "" if bounds is None else "[red]apart[/red]" if is_over else "[green]ok[/green]"
                table.add_row(kind, between, f"{values[-1]:.2e}", "" if bounds is None else f"{bounds[-1]:.2e}", mark)
        return table

    def to_json(self, path: str | Path) -> None:
        """Everything, for other programs, in a file that is written whole or not at all."""
        about = {
            "ok": self.ok,
            "verdict": self.verdict,
            "optimizer": self.optimizer,
            "lr": self.lr,
            "dtype": self.dtype,
        }
        over = None if self.first_over is None else self.first_over._asdict()
        curves = {"losses": self.losses, "distances": self.distances, "bounds": self.bounds}
        whole = {**about, "steps": self.steps, "gauges": self.gauges, "notes": self.notes, "first_over": over, **curves}
        write_whole(Path(path), (json.dumps(_finite(whole), indent=1) + "\n").encode())

    def plot(self, path: str | Path) -> None:
        """A picture: the losses, and a chart of the distances (logarithmic) for every kind of thing compared.

        A run with a dash is nudged by one unit in the last place at every step.
        """
        from matplotlib.figure import Figure

        kinds, per_row = list(self.distances), 3
        rows = -(-(len(kinds) + 1) // per_row)
        figure = Figure(figsize=(4.6 * per_row, 3.4 * rows + 0.8), layout="constrained")
        axes = figure.subplots(rows, per_row, squeeze=False).ravel()
        steps = np.arange(1, self.steps + 1)
        for name, values in self.losses.items():
            axes[0].plot(steps, values, label=name, linestyle="--" if "64" in name else "-")
        axes[0].set(title="loss", xlabel="step")
        axes[0].legend(fontsize=7)
        for ax, kind in zip(axes[1:], kinds, strict=False):
            for i, (between, values) in enumerate(self.distances[kind].items()):
                shown = np.where(np.asarray(values) > 0, values, np.nan)
                ax.plot(steps, shown, label=between, color=f"C{i}")
                if between in self.bounds.get(kind, {}):
                    ax.plot(steps, self.bounds[kind][between], color=f"C{i}", linestyle=":", label=f"{between}: bound")
            ax.set(title=f"distance: {kind}", xlabel="step", yscale="log")
        for ax in axes[len(kinds) + 1 :]:
            ax.set_axis_off()
        # All charts of distances have the same curves.
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120, format=Path(path).suffix[1:] or "png")
        write_whole(Path(path), picture.getvalue())


REFEREES = "PyTorch64 - Flax64"
SIDES = {"PyTorch - PyTorch64": "Flax - Flax64", "Flax - Flax64": "PyTorch - PyTorch64"}
NOISE_64 = ("PyTorch64' - PyTorch64", "Flax64' - Flax64")
NOISE = ("PyTorch' - PyTorch", "Flax' - Flax")


class Verdict:
    """Judges step by step, and writes what it sees into the trajectory."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        names = [REFEREES, *NOISE_64]
        if trajectory.dtype == "float32":
            names += ["PyTorch - Flax", *SIDES, *NOISE]
        self.pairs: list[tuple[str, str]] = [(a, b) for name in names for a, b in (name.split(" - "),)]
        self.largest: dict[tuple[str, str], float] = {}

    def add(self, losses: Mapping[str, float], found: Mapping[tuple[str, str], dict[str, float]]) -> None:
        """A step: the losses of all runs, and the distances of each pair by kind."""
        for name, value in losses.items():
            if not name.endswith("'"):
                self.trajectory.losses.setdefault(name, []).append(value)
        for kind in found[self.pairs[0]]:
            here = {f"{a} - {b}": found[a, b][kind] for a, b in self.pairs}
            for between, value in here.items():
                self.trajectory.distances.setdefault(kind, {}).setdefault(between, []).append(value)
            for between, bound in self._bounds(kind, here).items():
                self.trajectory.bounds.setdefault(kind, {}).setdefault(between, []).append(bound)
                if self.trajectory.first_over is None and not here[between] <= bound:
                    step = len(self.trajectory.distances[kind][between])
                    self.trajectory.first_over = Over(step, kind, between, here[between], bound)

    def _bounds(self, kind: str, here: Mapping[str, float]) -> dict[str, float]:
        """The referees against rounding; each side against the other's distance, and against rounding."""

        def largest(name: str, value: float) -> float:
            # Noise that passes through 0 would let nothing be right for a step.
            self.largest[kind, name] = max(value, self.largest.get((kind, name), 0.0))
            return self.largest[kind, name]

        noise = largest("64", max(here[name] for name in NOISE_64))
        bounds = {REFEREES: NUDGES * max(noise, float(np.finfo(np.float64).eps))}
        if self.trajectory.dtype == "float32":
            noise = largest("32", max(*(here[name] for name in NOISE), float(np.finfo(np.float32).eps)))
            for side, other in SIDES.items():
                bounds[side] = compare.FARTHEST_FROM_REFEREE * max(largest(other, here[other]), noise)
        return bounds


def distances(a: Snapshot, b: Snapshot, losses: Mapping[str, float], pair: tuple[str, str]) -> dict[str, float]:
    """How far two runs are apart: their loss, and each kind of array by its worst tensor; relative to the second."""
    found = {"loss": relative_error(losses[pair[0]], losses[pair[1]])}
    for kind in a:
        if a[kind]:
            found[kind] = _worst(a[kind], b[kind])
    return found


def _worst(a: Mapping[str, NDArray], b: Mapping[str, NDArray]) -> float:
    if a.keys() != b.keys():
        return float("inf")
    sizes = {name: float(np.abs(v).max(initial=0.0)) for name, v in b.items()}
    floor = SMALL_TENSOR * max(sizes.values(), default=0.0)
    return max(relative_error(a[name], b[name], max(sizes[name], floor)) for name in a)


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: they become text."""
    if isinstance(value, Mapping):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value if not isinstance(value, float) or np.isfinite(value) else str(value)
