"""The plot of a session: for each case time on the left, extra memory on the right.

Needs matplotlib. Bars are ours (red), other implementations (blue) and, in the panel of times, the
head's products alone (grey). What is not ours is labelled with how many times ours it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.baselines import OURS
from benchmarks.measure import Result, speedup
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
    shown = [
        {name: result for name, result in results.items() if not result.skipped}
        for _, results in entries
    ]
    heights = [BAR_INCHES * len(results) + CASE_INCHES for results in shown]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    axes = figure.subplots(
        len(entries), 2, squeeze=False, gridspec_kw={"height_ratios": heights}, sharey="row"
    )
    for (time, space), (case, _), results in zip(axes, entries, shown, strict=True):
        bars(
            time,
            {name: 1e3 * result.median for name, result in results.items()},
            {name: speedup(results, "hero", name) for name in results if "hero" in results},
            results,
        )
        sizes = {
            name: result.extra_bytes / 2**20
            for name, result in results.items()
            if result.extra_bytes is not None
        }
        own = sizes.get("hero")
        bars(space, sizes, {name: size / own for name, size in sizes.items() if own}, results)
        time.set_title(title(case), fontsize=10, loc="left", fontweight="bold")
    axes[-1, 0].set_xlabel("forward and backward, ms (less is better)", fontsize=9)
    axes[-1, 1].set_xlabel("extra peak memory, MiB (less is better)", fontsize=9)
    figure.savefig(path, dpi=150)


def bars(
    axis: Axes,
    values: Mapping[str, float],
    ratios: Mapping[str, float],
    results: Mapping[str, Result],
) -> None:
    """One panel, with a place for every result, so that both panels of a case line up.

    Args:
        axis: where to draw.
        values: lengths by name; what is missing gets no bar.
        ratios: to "hero", by name.
        results: all that have a place, for their order and titles.
    """
    names = list(results)
    colours = [OWN if n in OURS else YARDSTICK if n in YARDSTICKS else OTHER for n in names]
    drawn = axis.barh(range(len(names)), [values.get(n, 0.0) for n in names], color=colours)
    labels = []
    for name in names:
        label = f"{values[name]:,.0f}" if values.get(name, 0.0) >= 10 else ""
        if name in values and not label:
            label = f"{values[name]:.2g}"
        if label and name in ratios and name not in (*OURS, *YARDSTICKS):
            label += f"  ({ratios[name]:.2g}x)"
        labels.append(label)
    axis.bar_label(drawn, labels=labels, padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), [results[n].title for n in names], fontsize=8)
    axis.margins(x=0.22)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
