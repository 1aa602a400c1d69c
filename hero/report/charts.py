"""Line charts as inline SVG: all that the report needs of plotting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 24
MAX_MARKS = 40
"""Points get a mark (and its hover text) up to this many; beyond it marks would hide the line."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """Metrics drawn over the number of updates with one vertical axis."""

    title: str
    lines: dict[str, str]
    """Metric and label."""
    percent: bool = False
    """The values are shares: the axis is 0 to 100 %."""


def draw(
    chart: Chart, metrics: Sequence[dict[str, Any]], best: float | None = None
) -> Markup | None:
    """A `<figure>` with the chart; None if the run has no finite value of any of its metrics.

    Args:
        chart: what to draw.
        metrics: lines of metrics.jsonl; a step that occurs twice counts as logged last.
        best: the update whose weights were kept; gets an upright line.
    """
    series = [(label, _points(metrics, name)) for name, label in chart.lines.items()]
    series = [(label, points) for label, points in series if points]
    if not series:
        return None
    steps = [step for _, points in series for step, _ in points]
    values = [value for _, points in series for _, value in points]
    first, last = min(steps), max(steps)
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if chart.percent else _ticks(min(*values, 0.0), max(values))
    low, high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def show(value: float) -> str:
        return f"{value:.0%}" if chart.percent else f"{value:.3g}"

    parts = []
    for tick in ticks:
        parts.append(
            Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y(tick), WIDTH - RIGHT)
            + Markup('<text x="{}" y="{:.1f}" class="tick end">{}</text>').format(
                LEFT - 6, y(tick) + 3.5, show(tick)
            )
        )
    for step, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "middle"),):
        parts.append(
            Markup('<text x="{:.1f}" y="{}" class="tick {}">update {:g}</text>').format(
                x(step), HEIGHT - 6, anchor, step
            )
        )
    if best is not None and first <= best <= last:
        parts.append(
            Markup('<path class="best" d="M{:.1f} {}V{}"><title>best update, {:g}</title></path>')
            .format(x(best), TOP, HEIGHT - BOTTOM, best)
        )  # fmt: skip
    for number, (label, points) in enumerate(series, start=1):
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
        parts.append(Markup('<path class="line s{}" d="M{}"/>').format(number, path))
        for step, value in points if len(points) <= MAX_MARKS else points[-1:]:
            parts.append(
                Markup('<circle class="mark s{}" cx="{:.1f}" cy="{:.1f}" r="2.2">').format(
                    number, x(step), y(value)
                )
                + Markup("<title>{}, update {:g}: {}</title></circle>").format(
                    label, step, show(value)
                )
            )

    spoken = "; ".join(
        f"{label} from {show(points[0][1])} to {show(points[-1][1])}" for label, points in series
    )
    legend = Markup("").join(
        Markup('<span class="key s{}">{} <b>{}</b></span>').format(
            number, label, show(points[-1][1])
        )
        for number, (label, points) in enumerate(series, start=1)
    )
    return Markup(
        '<figure class="chart"><figcaption>{}<span class="keys">{}</span></figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}: {}">{}</svg></figure>'
    ).format(chart.title, legend, WIDTH, HEIGHT, chart.title, spoken, Markup("").join(parts))


def _points(metrics: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """(step, value) in order of steps; null values are left out."""
    values = {line["step"]: line[name] for line in metrics if line.get(name) is not None}
    return sorted((float(step), float(value)) for step, value in values.items())


def _ticks(low: float, high: float, intervals: int = 4) -> list[float]:
    """Round numbers at even distances that enclose [low, high]."""
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-30):  # flat, or as good as flat in floating point
        high = low + max(1.0, size)
    raw = (high - low) / intervals
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(
        m * magnitude for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * magnitude >= raw * (1 - 1e-9)
    )
    start, end = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [number * step for number in range(start, end + 1)]
