"""The plot of a session: for each case time on the left, extra memory on the right.

Needs matplotlib. Bars are ours (red), other implementations (blue) and, in the panel of times, the
head's products alone (grey).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.baselines import OURS
from benchmarks.measure import Result
from benchmarks.shapes import Case
from benchmarks.yardsticks import YARDSTICKS

matplotlib.use("Agg")

OWN, OTHER, YARDSTICK = "#c0392b", "#5b7fa6", "#c8c8c8"
BAR_INCHES, CASE_INCHES = 0.27, 0.75
"""Height of a bar, and of what stands around the bars of a case."""


def draw(
    entries: Sequence[tuple[Case, Mapping[str, Result]]], title: Callable[[Case], str], path: Path
) -> None:
    """Write the image.

    Args:
        entries: cases with their results.
        title: words for a case.
        path: of the image; its ending decides on the format.
    """
    shown = [{n: r for n, r in results.items() if not r.skipped} for _, results in entries]
    heights = [BAR_INCHES * len(results) + CASE_INCHES for results in shown]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    axes = figure.subplots(
        len(entries), 2, squeeze=False, gridspec_kw={"height_ratios": heights}, sharey="row"
    )
    for panels, (case, _), results in zip(axes, entries, shown, strict=True):
        colours = [OWN if n in OURS else YARDSTICK if n in YARDSTICKS else OTHER for n in results]
        times = [1e3 * result.median for result in results.values()]
        sizes = [(result.extra_bytes or 0) / 2**20 for result in results.values()]
        for axis, values in zip(panels, (times, sizes), strict=True):
            drawn = axis.barh(list(results), values, color=colours)
            labels = [f"{x:,.0f}" if x >= 10 else f"{x:.2g}" if x else "" for x in values]
            axis.bar_label(drawn, labels, padding=3, fontsize=8)
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
        panels[0].invert_yaxis()
        panels[0].set_title(title(case), fontsize=10, loc="left", fontweight="bold")
    axes[-1, 0].set_xlabel("forward and backward, ms (less is better)", fontsize=9)
    axes[-1, 1].set_xlabel("extra peak memory, MiB (less is better)", fontsize=9)
    figure.savefig(path, dpi=150)
