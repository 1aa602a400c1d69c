"""Curves of a study, if matplotlib is there (the extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hero.study.plan import BASE, StudyConfig
from hero.study.statistics import Row, values

AXES = {
    "turns": "environment turns", "updates": "updates", "generated_tokens": "generated tokens",
    "cpu_seconds": "CPU seconds",
}  # fmt: skip


def plot(study: StudyConfig, rows: Sequence[Row], path: Path) -> Path | None:
    """Success and turns an episode against what they cost, a row a start; None without matplotlib.

    The band is the range over seeds; an arm has one colour everywhere, controls are dotted.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    starts = [start for start in study.starts if any(r["start"] == start for r in rows)]
    size = (3.4 * (len(AXES) + 1) + 1.5, 3 * len(starts))
    colour = pyplot.colormaps["tab20"]
    styles = {
        arm: {"color": colour(number % colour.N), "label": arm, "marker": ".",
              "linestyle": ":" if arm in study.controls else "-"}
        for number, arm in enumerate(study.arms)
    }  # fmt: skip
    figure, grid = pyplot.subplots(len(starts), len(AXES) + 1, figsize=size, squeeze=False)
    for axes, start in zip(grid, starts, strict=True):
        for arm in study.arms:
            if any(r["start"] == start and r["arm"] == arm for r in rows):
                for axis, name in zip(axes, AXES, strict=False):
                    _curve(axis, study, rows, start, arm, name, "success", styles[arm])
                _curve(axes[-1], study, rows, start, arm, "turns", "turns", styles[arm])
        for axis, label in zip(axes, AXES.values(), strict=False):
            axis.set(title=f"start {start}", xlabel=label, ylabel="success", ylim=(0, 1))
            if not axis.lines:
                axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
        axes[-1].set(title=f"start {start}", xlabel=AXES["turns"], ylabel="turns an episode")
        axes[-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.02, 1.05))
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path


def _curve(
    axis: Any, study: StudyConfig, rows: Sequence[Row], start: str, arm: str, cost: str, what: str,
    style: dict[str, Any],
) -> None:  # fmt: skip
    """Means over seeds from the untrained start on; costs that were not measured leave it out."""
    own = [r["marks"] for r in rows if r["start"] == start and r["arm"] == arm]
    if not all(cost in mark for marks in own for mark in marks):
        return
    at = [float(np.mean([marks[m][cost] for marks in own])) for m in range(len(study.marks))]
    found = [values(rows, start, arm, m, what).mean(1) for m in range(len(study.marks))]
    base = values(rows, start, BASE, 0, what)
    begin = ([0.0], [float(base.mean())]) if base.size else ([], [])
    means = [float(of_seeds.mean()) for of_seeds in found]
    axis.plot(begin[0] + at, begin[1] + means, **style)
    low, high = [f.min() for f in found], [f.max() for f in found]
    axis.fill_between(at, low, high, alpha=0.1, color=style["color"])
