"""What the rows of a study say: tables with intervals, and what cannot be told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hero.files import write_atomic
from hero.study.plan import StudyConfig

Row = dict[str, Any]
Array = NDArray[np.float64]
SAMPLES = 4000


def load_rows(folder: Path) -> list[Row]:
    """The rows on test tasks that are there, finished study or not."""
    paths = sorted((folder / "rows").glob("*/*/test-*.json")) + sorted(
        (folder / "rows").glob("*/base.json")
    )
    if not paths:
        raise ValueError(f"{folder} holds no finished run: hero study has to run first.")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def successes(rows: list[Row], start: str, arm: str, mark: int) -> Array:
    """[seeds, tasks] of 0 and 1; the base model counts for every mark."""
    found = [
        row["marks"][mark if arm != "base" else 0]["success"]
        for row in rows
        if row["start"] == start and row["arm"] == arm
    ]
    return np.array([[float(digit) for digit in digits] for digits in found])


def interval(values: Array, other: Array | None = None) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of [seeds, tasks], or of its difference to `other`.

    Seeds and tasks are both drawn anew, the tasks the same for both sides (paired), so the interval
    holds the spread over seeds as well as that over tasks. One seed leaves its spread out.
    """
    random = np.random.default_rng(0)
    means = np.empty(SAMPLES)
    for sample in range(SAMPLES):
        tasks = random.integers(values.shape[1], size=values.shape[1:])
        means[sample] = _drawn(values, tasks, random)
        if other is not None:
            means[sample] -= _drawn(other, tasks, random)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _drawn(values: Array, tasks: NDArray[np.int64], random: np.random.Generator) -> float:
    seeds = random.integers(len(values), size=len(values))
    return float(
        values.mean(0)[tasks].mean() if len(values) == 1 else values[seeds][:, tasks].mean()
    )


def success_table(study: StudyConfig, rows: list[Row], start: str) -> list[str]:
    """Markdown: success at each budget with its interval, the range over seeds, mean turns."""
    lines = [
        "| arm | lr | seeds | " + " | ".join(f"{mark:,} turns" for mark in study.marks) + " |",
        "|---|---|---|" + "---|" * len(study.marks),
    ]
    for arm in _arms(rows, start):
        own = [row for row in rows if row["start"] == start and row["arm"] == arm]
        rate = f"{own[0]['learning_rate']:g}" if "learning_rate" in own[0] else ""
        if arm == "base":
            cells = [_cell(rows, start, arm, 0), *[""] * (len(study.marks) - 1)]
        else:
            cells = [_cell(rows, start, arm, mark) for mark in range(len(study.marks))]
        lines.append(f"| {arm} | {rate} | {len(own)} | " + " | ".join(cells) + " |")
    return lines


def _cell(rows: list[Row], start: str, arm: str, mark: int) -> str:
    values = successes(rows, start, arm, mark)
    low, high = interval(values)
    turns = np.mean([
        row["marks"][mark]["task_turns"]
        for row in rows if row["start"] == start and row["arm"] == arm
    ])  # fmt: skip
    return f"**{values.mean():.1%}** ({low:.1%} to {high:.1%}), {turns:.1f} turns"


def differences(study: StudyConfig, rows: list[Row], start: str, first: str) -> list[str]:
    """Markdown: `first` minus every other arm at each budget, and in words what that shows."""
    lines = [f"| {first} minus | " + " | ".join(f"{mark:,} turns" for mark in study.marks) + " |"]
    lines.append("|---|" + "---|" * len(study.marks))
    for arm in _arms(rows, start):
        if arm == first:
            continue
        cells = []
        for mark in range(len(study.marks)):
            own, other = (successes(rows, start, a, mark) for a in (first, arm))
            low, high = interval(own, other)
            cells.append(
                f"{100 * (own.mean() - other.mean()):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
                f": {verdict(low, high)}"
            )
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def verdict(low: float, high: float) -> str:
    """What an interval of a difference allows to say."""
    if low > 0:
        return "better"
    return "worse" if high < 0 else "not told apart"


def cost_table(rows: list[Row], start: str) -> list[str]:
    """Markdown: what the last budget cost beside environment turns."""
    lines = [
        "| arm | updates | generated tokens | of them reflection | seconds |",
        "|---|---|---|---|---|",
    ]
    for arm in _arms(rows, start):
        last = [r["marks"][-1] for r in rows if r["start"] == start and r["arm"] == arm]
        if arm != "base":
            names = ("updates", "generated_tokens", "reflection_tokens", "seconds")
            lines.append(
                f"| {arm} | "
                + " | ".join(f"{np.mean([m[n] for m in last]):,.0f}" for n in names)
                + " |"
            )
    return lines


def _arms(rows: list[Row], start: str) -> list[str]:
    return list(dict.fromkeys(["base", *(row["arm"] for row in rows if row["start"] == start)]))


def write_report(study: StudyConfig, folder: Path) -> Path:
    """report.md in the folder, and report.png if matplotlib is there; returns the first."""
    rows = load_rows(folder)
    order = ["base", *study.arms]
    rows.sort(key=lambda row: (order.index(row["arm"]), row["seed"]))
    lines = [
        f"Success on {study.test_tasks} held-out tasks with the last weights, at equal environment "
        "turns. Intervals: 95 % bootstrap over seeds and tasks, differences paired by task. "
        "Learning rates were chosen for each arm on dev tasks, among "
        f"{', '.join(map(str, study.learning_rates))}.",
    ]
    for start in study.starts:
        if not any(row["start"] == start for row in rows):
            continue
        lines += ["", f"## Start `{start}`", "", *success_table(study, rows, start)]
        arms = _arms(rows, start)
        first = arms[1] if len(arms) > 1 else "base"
        lines += ["", *differences(study, rows, start, first), "", *cost_table(rows, start)]
    path = folder / "report.md"
    write_atomic(path, "\n".join(lines) + "\n")
    _plot(study, rows, folder / "report.png")
    return path


def _plot(study: StudyConfig, rows: list[Row], path: Path) -> None:
    """Success against environment turns, a panel a start; the spread over seeds as a band."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    starts = [start for start in study.starts if any(r["start"] == start for r in rows)]
    figure, axes = pyplot.subplots(1, len(starts), figsize=(5 * len(starts), 4), squeeze=False)
    for axis, start in zip(axes[0], starts, strict=True):
        base = successes(rows, start, "base", 0)
        for arm in _arms(rows, start)[1:]:
            means = [successes(rows, start, arm, m).mean(1) for m in range(len(study.marks))]
            start_at = base.mean() if base.size else np.nan
            axis.plot([0, *study.marks], [start_at, *(m.mean() for m in means)], label=arm)
            axis.fill_between(
                study.marks, [m.min() for m in means], [m.max() for m in means], alpha=0.12
            )
        axis.set(title=f"start {start}", xlabel="environment turns", ylabel="success", ylim=(0, 1))
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
