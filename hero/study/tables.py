"""What the rows of a study say: tables with intervals, and what cannot be told apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hero.files import write_atomic
from hero.study.claims import claims_table
from hero.study.page import write_page
from hero.study.plan import BASE, StudyConfig, chosen_rates
from hero.study.plots import plot
from hero.study.statistics import Row, interval, line, values, verdict

ROWS, FIT = "rows.jsonl", "fit.json"


def load_rows(study: StudyConfig, folder: Path) -> list[Row]:
    """The rows on test tasks that are there, finished study or not, arm by arm.

    Those of a learning rate that was not chosen in the end are left out.

    Raises:
        ValueError: there is none.
    """
    kept = folder / ROWS
    paths = [*(folder / "rows").glob("*/*/test-*.json"), *(folder / "rows").glob("*/base.json")]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    if not texts and kept.is_file():  # all that was kept of a study
        texts = kept.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(text) for text in texts]
    order = [BASE, *study.arms]
    rates = chosen_rates(study, folder)
    rows = [
        row for row in rows
        if row["start"] in study.starts
        and (row["arm"] == BASE or row["learning_rate"] == rates.get((row["start"], row["arm"])))
    ]  # fmt: skip
    if not rows:
        raise ValueError(f"{folder} holds no finished run: hero study has to run first.")
    return sorted(rows, key=lambda row: (row["start"], order.index(row["arm"]), row["seed"]))


def success_table(study: StudyConfig, rows: Sequence[Row], start: str) -> list[str]:
    """Markdown: success at each budget with its interval, the range over seeds, mean turns."""
    lines = [
        "| arm | lr | seeds | " + " | ".join(f"{mark:,} turns" for mark in study.marks) + " |",
        "|---|---|---|" + "---|" * len(study.marks),
    ]
    for arm in arms_at(rows, start):
        own = [row for row in rows if row["start"] == start and row["arm"] == arm]
        rate = f"{own[0]['learning_rate']:g}" if "learning_rate" in own[0] else ""
        cells = [_cell(rows, start, arm, mark) for mark in range(len(study.marks))]
        if arm == BASE:
            cells[1:] = [""] * (len(study.marks) - 1)
        lines.append(f"| {arm} | {rate} | {len(own)} | " + " | ".join(cells) + " |")
    return lines


def _cell(rows: Sequence[Row], start: str, arm: str, mark: int) -> str:
    found = values(rows, start, arm, mark)
    low, high = interval(found)
    by_seed = found.mean(1)
    spread = f"; seeds {by_seed.min():.1%} to {by_seed.max():.1%}" if len(by_seed) > 1 else ""
    turns = values(rows, start, arm, mark, "turns").mean()
    return f"**{found.mean():.1%}** ({low:.1%} to {high:.1%}{spread}), {turns:.1f} turns"


def differences(study: StudyConfig, rows: Sequence[Row], start: str, first: str) -> list[str]:
    """Markdown: `first` minus every other arm at each budget, and in words what that shows."""
    lines = [f"| {first} minus | " + " | ".join(f"{mark:,} turns" for mark in study.marks) + " |"]
    lines.append("|---|" + "---|" * len(study.marks))
    alike: list[list[str]] = [[] for _ in study.marks]
    for arm in arms_at(rows, start):
        if arm == first:
            continue
        cells = []
        for mark in range(len(study.marks)):
            own, other = (values(rows, start, a, mark) for a in (first, arm))
            low, high = interval(own, other)
            cells.append(
                f"{100 * (own.mean() - other.mean()):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
                f": {verdict(low, high)}"
            )
            alike[mark] += [arm] if verdict(low, high) == "not told apart" else []
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines.append("")
    for mark, names in zip(study.marks, alike, strict=True):
        told = f"cannot be told from {', '.join(names)}" if names else "differs from every arm"
        lines.append(f"Within {mark:,} turns these data show: {first} {told}.")
    return lines


def cost_table(rows: Sequence[Row], start: str) -> list[str]:
    """Markdown: what the last budget cost beside environment turns; CPU seconds without judging."""
    names = {"turns": "turns used", "updates": "updates", "generated_tokens": "generated tokens",
             "reflection_tokens": "of them reflection", "cpu_seconds": "CPU seconds"}  # fmt: skip
    lines = ["| arm | " + " | ".join(names.values()) + " |", "|---|" + "---|" * len(names)]
    for arm in arms_at(rows, start):
        last = [r["marks"][-1] for r in rows if r["start"] == start and r["arm"] == arm]
        if arm != BASE:
            means = [[m[name] for m in last if name in m] for name in names]
            shown = [f"{np.mean(found):,.0f}" if found else "not measured" for found in means]
            lines.append(f"| {arm} | " + " | ".join(shown) + " |")
    return lines


def gap_points(folder: Path, study: StudyConfig, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each arm that distils, at each start: the gap before training and the gain at the end."""
    points = []
    paths = sorted((folder / "gaps").glob("*/*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not found and (folder / FIT).is_file():
        found = json.loads((folder / FIT).read_text(encoding="utf-8"))["points"]
    for point in found:
        own = values(rows, point["start"], point["arm"], len(study.marks) - 1)
        base = values(rows, point["start"], BASE, 0)
        if "gap" in point and own.size and base.size:
            points.append(point | {"gain": float(own.mean() - base.mean())})
    return points


def gap_table(points: Sequence[dict[str, Any]], fit: dict[str, float]) -> Iterator[str]:
    """Markdown: does the gap before training predict the gain (arXiv 2605.30070)?"""
    yield "| start | arm | trained | student right | teacher right | gap | gain at the end |"
    yield "|---|---|---|---|---|---|---|"
    for p in sorted(points, key=lambda point: -point["gap"]):
        yield (
            f"| {p['start']} | {p['arm']} | {p['share']:.0%} | {p['student_right']:.0%} "
            f"| {p['teacher_right']:.0%} | {p['gap']:+.3f} | {100 * p['gain']:+.1f} |"
        )
    yield ""
    yield (
        f"Least squares over these {len(points)} points: gain = {100 * fit['intercept']:.1f} + "
        f"{100 * fit['slope']:.0f} x gap points; the residuals' standard deviation is "
        f"{100 * fit['spread']:.1f} points, r = {fit['r']:.2f}."
    )


def arms_at(rows: Sequence[Row], start: str) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows if row["start"] == start))


def report_lines(study: StudyConfig, rows: Sequence[Row]) -> Iterator[str]:
    """The report in Markdown."""
    yield (
        f"Success on {study.test_tasks} held-out tasks with the last weights, at equal environment "
        "turns. Intervals: 95 % bootstrap over seeds and tasks, differences paired by task; one "
        "seed leaves the spread over seeds out. Learning rates were chosen on dev tasks, among "
        f"{', '.join(f'{rate:g}' for rate in study.learning_rates)}."
    )
    yield from ("", "## The claims", "", *claims_table(study, rows))
    first = next(iter(study.arms))
    for start in study.starts:
        arms = arms_at(rows, start)
        if not arms:
            continue
        yield from ("", f"## Start `{start}`", "", *success_table(study, rows, start))
        for basis in dict.fromkeys((first, *study.compared)):
            if basis in arms:
                yield from ("", *differences(study, rows, start, basis))
        yield from ("", *cost_table(rows, start))


def write_report(study: StudyConfig, folder: Path) -> list[Path]:
    """report.md, report.html and, if matplotlib is there, report.png in the folder; their paths.

    `rows.jsonl` beside them holds all rows without the training curves.
    """
    rows = load_rows(study, folder)
    kept = ({key: value for key, value in row.items() if key != "training"} for row in rows)
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in kept)
    write_atomic(folder / ROWS, text)
    lines = list(report_lines(study, rows))
    points = gap_points(folder, study, rows)
    if len({point["gap"] for point in points}) > 2:
        found = line([p["gap"] for p in points], [p["gain"] for p in points])
        fit = dict(zip(("intercept", "slope", "spread", "r"), found, strict=True))
        write_atomic(folder / FIT, json.dumps(fit | {"points": points}, indent=1))
        lines += ["", "## The gap before training and the gain", "", *gap_table(points, fit)]
    text = "\n".join(lines) + "\n"
    paths = [folder / "report.md", folder / "report.html"]
    write_atomic(paths[0], text)
    image = plot(study, rows, folder / "report.png")
    write_page(text, image, paths[1])
    return paths + ([image] if image else [])
