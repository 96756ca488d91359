"""Charts as SVG that takes its colours from the page around it, so that they are read in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from parity.report.html.elements import Markup, joined, tag
from parity.report.rows import weight

WIDTH, HEIGHT = 960, 280
LEFT, RIGHT, TOP = 64, 24, 16
NARROW, LINE, DOWN_TOP = 358, 18, 40
"""Of the chart for a narrow page: its width, a line for each layer, and where the first one is."""
DASHES = "none", "7 4", "2 3", "9 3 2 3"
SERIES = 4
"""As many colours as the page has; more curves take them again with another dash."""
LEAST_POINTS = 3
"""Fewer are no chart: the table says it better."""
MOST_POINTS = 240
"""More could not be told apart: of neighbours the worst is drawn."""
LEAST_APART = 20
"""Between two names below a chart."""
MOST_LETTERS = 22
"""Of a layer's name beside a chart."""


class Point(NamedTuple):
    """A value in a chart of errors: `label` names its layer, `title` is told under the mouse, `mark` its shape."""

    label: str
    title: str
    error: float
    bound: float
    local_error: float | None
    mark: str


def worst_of_each(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Of so many neighbours that at most these are left, the one that matters most."""
    each = -(-len(points) // most)
    neighbours = [points[i : i + each] for i in range(0, len(points), each)]
    return [max(some, key=lambda p: weight(p.mark, p.error, p.bound)) for some in neighbours]


def error_chart(points: Sequence[Point], title: str) -> Markup:
    """Errors over the layers on a logarithmic axis, with the bound; 0 lies on the floor, inf and NaN on the ceiling.

    It is drawn twice: with the layers from left to right, and for a narrow page from above to below; one is shown.

    Args:
      points: in order; equal labels that follow one another share one tick.
      title: what it shows, for who does not see it.
    """
    return joined(_across(points, title), _down(points, title))


def _across(points: Sequence[Point], title: str) -> Markup:
    scale = _Log(_values(points))
    step = (WIDTH - LEFT - RIGHT) / len(points)
    xs = [LEFT + (i + 0.5) * step for i in range(len(points))]
    body = scale.axis()
    bounds = [f"M{x - step / 2:.1f} {scale(p.bound):.1f}h{step:.1f}" for x, p in zip(xs, points, strict=True)]
    body.append(tag("path", class_="bound", d="".join(bounds)))
    label = f"{WIDTH - RIGHT}", f"{min(scale(p.bound) for p in points[-1 - len(points) // 3 :]) - 7:.1f}"
    body.append(tag("text", "bound", class_="bound", x=label[0], y=label[1], text_anchor="end"))
    for x, p in zip(xs, points, strict=True):
        shapes = [_symbol("alone", x, scale(p.local_error), 11)] if p.local_error is not None else []
        shapes.append(_symbol(p.mark, x, scale(p.error), 20 if p.mark == "differs first" else 12))
        body.append(tag("g", tag("title", p.title), *shapes, class_=p.mark.replace(" ", "-")))
    ticks, bottom = _layer_ticks(points, xs, scale.floor + 10)
    return _svg(body + ticks, WIDTH, bottom, title, "across")


def _down(points: Sequence[Point], title: str) -> Markup:
    """A line for each layer, its name in front."""
    left = 14 + 7.3 * min(max(len(p.label) for p in points), MOST_LETTERS)
    scale = _Log(_values(points), (left + 8, NARROW - 12), room=42)
    body, y, last = list[Markup](), float(DOWN_TOP) - LINE, ""
    for i, p in enumerate(points):
        if i == 0 or p.label != last:
            y, last = y + LINE, p.label
            first = any(q.mark == "differs first" and q.label == p.label for q in points[i : i + 8])
            name = tag("text", _end_of(p.label), x=f"{left - 6:.1f}", y=f"{y + 4:.1f}", text_anchor="end")
            body.append(tag("g", name, class_="first-name") if first else name)
        at = scale(p.bound)
        body.append(tag("path", class_="bound", d=f"M{at:.1f} {y - LINE / 2:.1f}v{LINE}"))
        shapes = [_symbol("alone", scale(p.local_error), y, 10)] if p.local_error is not None else []
        shapes.append(_symbol(p.mark, scale(p.error), y, 17 if p.mark == "differs first" else 11))
        body.append(tag("g", *shapes, class_=p.mark.replace(" ", "-")))
    bottom = y + LINE
    at = min(max(scale(points[0].bound), left + 24), NARROW - 24)
    body.append(tag("text", "bound", class_="bound", x=f"{at:.1f}", y=DOWN_TOP - 14, text_anchor="middle"))
    chart = _svg([*scale.axis_down(DOWN_TOP - 10, bottom), *body], NARROW, bottom + 8, title, "down")
    return tag("div", chart, class_="tall", tabindex=0, role="region", aria_label=f"{title}, layers down the page")


def _values(points: Sequence[Point]) -> list[float]:
    return [v for p in points for v in (p.error, p.bound, p.local_error) if v is not None]


def _symbol(name: str, x: float, y: float, size: float) -> Markup:
    at = {"x": f"{x - size / 2:.1f}", "y": f"{y - size / 2:.1f}"}
    return tag("use", href=f"#m-{name.replace(' ', '-')}", **at, width=size, height=size)


def line_chart(curves: Mapping[str, Sequence[float]], title: str, *, logarithmic: bool = False) -> Markup:
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
        body.append(tag("text", str(i + 1), x=f"{_at_step(i, steps):.1f}", y=scale.floor + 20, text_anchor="middle"))
    body.append(tag("text", "step", x=right, y=scale.floor + 40, text_anchor="end"))
    x = float(LEFT)
    for i, (name, curve) in enumerate(curves.items()):
        look = {"class_": f"s{i % SERIES}", "stroke_dasharray": DASHES[(i // SERIES + i) % len(DASHES)]}
        path = _path([(_at_step(j, steps), scale, float(v)) for j, v in enumerate(curve)])
        body.append(tag("path", **look, d=path))
        body.append(tag("path", **look, d=f"M{x:.1f} {scale.floor + 36}h28"))
        body.append(tag("text", name, x=f"{x + 34:.1f}", y=scale.floor + 40))
        x += 56 + 7.5 * len(name)
    return _svg(body, WIDTH, scale.floor + 52, title, "curves")


def _svg(body: Sequence[Markup], width: float, height: float, title: str, kind: str) -> Markup:
    box = {"viewBox": f"0 0 {width:.0f} {height:.0f}", "role": "img", "aria_label": title}
    return tag("div", tag("svg", *body, **box), class_=f"chart {kind}")


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
    """A logarithmic axis over the finite, positive values, with room at its ends for 0 and for inf.

    Args:
      values: all that are drawn.
      ends: where the smallest lies, and the largest.
      room: for each of these.
    """

    floor = HEIGHT

    def __init__(self, values: Sequence[float], ends: tuple[float, float] = (HEIGHT, TOP), room: int = 28) -> None:
        logs = [math.log10(v) for v in values if math.isfinite(v) and v > 0] or [-16.0]
        self.low, self.high = math.floor(min(logs)) - 1, math.ceil(max(logs)) + 1
        self.zero, self.inf = any(v == 0 for v in values), any(not math.isfinite(v) for v in values)
        self.ends, self.room, self.sign = ends, room, 1 if ends[1] > ends[0] else -1

    def __call__(self, value: float) -> float:
        low, high = self.ends
        if not math.isfinite(value):
            return high - 8 * self.sign
        if value <= 0:
            return low + 6 * self.sign
        first = low + (self.room if self.zero else 0) * self.sign
        last = high - (self.room + 6 if self.inf else 8) * self.sign
        return first + (math.log10(value) - self.low) / (self.high - self.low) * (last - first)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """(value, its name)."""
        every = max(1, math.ceil((self.high - self.low) / most))
        found = [(10.0**e, f"1e{e}") for e in range(self.low, self.high + 1, every)]
        return found + ([(0.0, "0")] if self.zero else []) + ([(math.inf, "inf")] if self.inf else [])

    def axis(self) -> list[Markup]:
        return [_gridline(self(value), name) for value, name in self.ticks(8)]

    def axis_down(self, top: float, bottom: float) -> list[Markup]:
        """Of a chart whose layers run down: the values stand above it."""
        lines = list[Markup]()
        for value, name in self.ticks(3):
            x = f"{self(value):.1f}"
            lines.append(tag("path", class_="grid", d=f"M{x} {top}V{bottom}"))
            lines.append(tag("text", name, x=x, y=12, text_anchor="middle"))
        return lines


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

    def axis(self) -> list[Markup]:
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [_gridline(self(i * step), f"{i * step:.6g}") for i in range(first, last + 1)]


def _gridline(y: float, label: str) -> Markup:
    line = tag("path", class_="grid", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}")
    return joined(line, tag("text", label, x=LEFT - 8, y=f"{y + 4:.1f}", text_anchor="end"))


def _end_of(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"…{name[1 - MOST_LETTERS :]}"


def _layer_ticks(points: Sequence[Point], xs: Sequence[float], top: float) -> tuple[list[Markup], float]:
    """A slanted name below the first point of each layer; where they would overlap, only some; and where they end.

    That of the first difference is among them.
    """
    starts = [i for i, p in enumerate(points) if i == 0 or points[i - 1].label != p.label]
    first = next((i for i, p in enumerate(points) if p.mark == "differs first"), None)
    shown: list[int] = []
    for i in starts if first is None else [first, *starts]:
        if all(abs(xs[i] - xs[j]) >= LEAST_APART for j in shown[:1] + shown[-1:]):
            shown.append(i)
    texts = []
    for i in shown:
        turned = f"rotate(-45 {xs[i]:.1f} {top:.1f})"
        at = {"x": f"{xs[i]:.1f}", "y": f"{top + 4:.1f}", "transform": turned, "text_anchor": "end"}
        name = tag("text", _end_of(points[i].label), **at)
        texts.append(tag("g", name, class_="first-name") if i == first else name)
    longest = max((min(len(points[i].label), MOST_LETTERS) for i in shown), default=0)
    return texts, top + 16 + 5.4 * longest
