"""Charts as SVG that takes its colours from the page around it, so that they are read in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from parity.report.findings import escaped

WIDTH, HEIGHT = 960, 280
LEFT, RIGHT, TOP = 64, 24, 16
DASHES = "none", "7 4", "2 3", "9 3 2 3"
SERIES = 4
"""As many colours as the page has; more curves take them again with another dash."""


class Point(NamedTuple):
    """A value in a chart of errors: `label` stands below it, `title` where the mouse rests, `mark` says its shape."""

    label: str
    title: str
    error: float
    bound: float
    local_error: float | None
    mark: str


def error_chart(points: Sequence[Point], title: str) -> str:
    """Errors over the layers on a logarithmic axis, with the bound; 0 lies on the floor, inf and NaN on the ceiling.

    Args:
      points: in order; equal labels that follow one another share one tick.
      title: what it shows, for who does not see it.
    """
    values = [v for p in points for v in (p.error, p.bound, p.local_error) if v is not None]
    scale = _Log(values)
    step = (WIDTH - LEFT - RIGHT) / len(points)
    xs = [LEFT + (i + 0.5) * step for i in range(len(points))]
    body = scale.axis()
    bounds = [f"M{x - step / 2:.1f} {scale(p.bound):.1f}h{step:.1f}" for x, p in zip(xs, points, strict=True)]
    body.append(f'<path class="bound" d="{"".join(bounds)}"/>')
    for x, p in zip(xs, points, strict=True):
        shapes = [_local(x, scale(p.local_error))] if p.local_error is not None else []
        shapes.append(_mark(x, scale(p.error), p.mark))
        body.append(f'<g class="{p.mark.replace(" ", "-")}"><title>{escaped(p.title)}</title>{"".join(shapes)}</g>')
    ticks, bottom = _layer_ticks([p.label for p in points], xs, scale.floor + 10)
    return _svg(body + ticks, bottom, title)


def line_chart(curves: Mapping[str, Sequence[float]], title: str, *, logarithmic: bool = False) -> str:
    """Curves over the steps, each with its name at its end; what is not finite is a gap.

    Args:
      curves: name -> a value a step.
      title: what it shows, for who does not see it.
      logarithmic: for distances; a 0 lies on the floor.
    """
    values = [float(v) for curve in curves.values() for v in curve]
    scale = _Log(values) if logarithmic else _Linear(values)
    steps = max((len(curve) for curve in curves.values()), default=1)
    right = WIDTH - RIGHT
    body = scale.axis()
    for i in dict.fromkeys((0, (steps - 1) // 2, steps - 1)):
        x = _at_step(i, steps)
        body.append(f'<text x="{x:.1f}" y="{scale.floor + 20}" text-anchor="middle">{i + 1}</text>')
    body.append(f'<text x="{right}" y="{scale.floor + 40}" text-anchor="end">step</text>')
    x_legend = float(LEFT)
    for i, (name, curve) in enumerate(curves.items()):
        look = f'class="s{i % SERIES}" stroke-dasharray="{DASHES[(i // SERIES + i) % len(DASHES)]}"'
        body.append(f'<path {look} d="{_path([(_at_step(j, steps), scale, float(v)) for j, v in enumerate(curve)])}"/>')
        if len(curve) == 1:
            body.append(
                f'<circle class="dot{i % SERIES}" cx="{_at_step(0, steps):.1f}" cy="{scale(curve[0]):.1f}" r="3"/>'
            )
        body.append(f'<path {look} d="M{x_legend:.1f} {scale.floor + 36}h28"/>')
        body.append(f'<text x="{x_legend + 34:.1f}" y="{scale.floor + 40}">{escaped(name)}</text>')
        x_legend += 56 + 7.5 * len(name)
    return _svg(body, scale.floor + 52, title)


def _svg(body: Sequence[str], height: float, title: str) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escaped(title)}"'
    return f'<div class="chart"><svg {box}>{"".join(body)}</svg></div>'


def _at_step(i: int, steps: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (i / (steps - 1) if steps > 1 else 0.5)


def _path(points: Sequence[tuple[float, _Log | _Linear, float]]) -> str:
    parts, drawing = [], False
    for x, scale, value in points:
        if math.isfinite(value):
            parts.append(f"{'L' if drawing else 'M'}{x:.1f} {scale(value):.1f}")
        drawing = math.isfinite(value)
    return "".join(parts)


class _Log:
    """A logarithmic axis over the finite, positive values, with room for 0 below and for inf above."""

    floor = HEIGHT

    def __init__(self, values: Sequence[float]) -> None:
        logs = [math.log10(v) for v in values if math.isfinite(v) and v > 0] or [-16.0]
        self.low, self.high = math.floor(min(logs)) - 1, math.ceil(max(logs)) + 1
        self.zero, self.inf = any(v == 0 for v in values), any(not math.isfinite(v) for v in values)

    def __call__(self, value: float) -> float:
        if not math.isfinite(value):
            return TOP + 8
        top, bottom = TOP + (34 if self.inf else 8), self.floor - (28 if self.zero else 0)
        if value <= 0:
            return self.floor - 6
        return bottom - (math.log10(value) - self.low) / (self.high - self.low) * (bottom - top)

    def axis(self) -> list[str]:
        every = max(1, math.ceil((self.high - self.low) / 8))
        lines = [_gridline(self(10.0**e), f"1e{e}") for e in range(self.low, self.high + 1, every)]
        lines += [_gridline(self(0), "0")] if self.zero else []
        return lines + ([_gridline(self(math.inf), "inf")] if self.inf else [])


class _Linear:
    """An axis from the smallest to the largest finite value."""

    floor = HEIGHT

    def __init__(self, values: Sequence[float]) -> None:
        finite = [v for v in values if math.isfinite(v)] or [0.0]
        self.low, self.high = min(finite), max(finite)
        if self.low == self.high:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def __call__(self, value: float) -> float:
        return self.floor - 8 - (value - self.low) / (self.high - self.low) * (self.floor - 16 - TOP)

    def axis(self) -> list[str]:
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [_gridline(self(i * step), f"{i * step:.6g}") for i in range(first, last + 1)]


def _gridline(y: float, label: str) -> str:
    line = f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
    return f'{line}<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'


def _mark(x: float, y: float, mark: str) -> str:
    """Dot: agrees; triangle: inherits its error; diamond: differs. So that it is not told by colour alone."""
    if mark == "ok":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if mark == "inherits":
        return f'<path d="M{x - 5:.1f} {y + 4:.1f}l5 -9l5 9z"/>'
    r = 9 if mark == "differs first" else 6
    return f'<path d="M{x - r:.1f} {y:.1f}l{r} {-r}l{r} {r}l{-r} {r}z"/>'


def _local(x: float, y: float) -> str:
    return f'<circle class="alone" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _layer_ticks(labels: Sequence[str], xs: Sequence[float], top: float) -> tuple[list[str], float]:
    """A slanted name below the first point of each layer; where they would overlap, only some; and where they end."""
    starts = [i for i, label in enumerate(labels) if i == 0 or labels[i - 1] != label]
    shown: list[int] = []
    for i in starts:
        if not shown or xs[i] - xs[shown[-1]] >= 20:
            shown.append(i)
    texts = []
    for i in shown:
        label = labels[i] if len(labels[i]) <= 24 else f"…{labels[i][-23:]}"
        place = f'x="{xs[i]:.1f}" y="{top + 4:.1f}" transform="rotate(-45 {xs[i]:.1f} {top:.1f})"'
        texts.append(f'<text {place} text-anchor="end">{escaped(label)}</text>')
    longest = max((min(len(labels[i]), 24) for i in shown), default=0)
    return texts, top + 16 + 5.4 * longest
