"""The page of `hero compare`: the table, and the episodes of each task side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hero.algorithms import MODES
from hero.files import write_atomic
from hero.report.comparison import Comparison
from hero.report.viewer import templates, trajectory_view
from hero.text import in_words

if TYPE_CHECKING:  # it loads torch
    from hero.evaluated import Evaluated

MAX_TASKS = 100


def render(
    one: Evaluated, other: Evaluated, rows: Sequence[Comparison], unlike: Sequence[str], out: Path
) -> None:
    """Write the page, tasks that the two solve unlike first; `unlike` are settings that differ."""
    sides = [_by_task(one.episodes), _by_task(other.episodes)]
    tasks = sorted(sides[0].keys() & sides[1].keys(), key=lambda task: _likeness(task, sides))
    html = templates().get_template("compare.html.j2").render(
        names=(one.name, other.name), worlds=(in_words(one.world), in_words(other.world)),
        rows=rows, unlike=unlike, left_out=len(tasks[MAX_TASKS:]),
        number=len(one.result["per_task"]),
        tasks=[(task, [side[task] for side in sides]) for task in tasks[:MAX_TASKS]],
    )  # fmt: skip
    write_atomic(out, html.encode("utf-8", errors="replace"))


def _by_task(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    views = defaultdict(list)
    for record in records:
        views[record["task_id"]].append(trajectory_view(record, MODES["hero"]))
    return views


def _likeness(task: str, sides: list[dict[str, list[dict[str, Any]]]]) -> float:
    """Minus the difference of the two shares of successes."""
    one, other = (sum(e["success"] for e in side[task]) / len(side[task]) for side in sides)
    return -abs(one - other)
