"""From rows to means and intervals: both seeds and tasks are drawn anew, tasks paired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hero.study.plan import BASE

Row = dict[str, Any]
Array = NDArray[np.float64]
SAMPLES = 4000


def values(rows: Sequence[Row], start: str, arm: str, mark: int, what: str = "success") -> Array:
    """[seeds, tasks] of success (0 or 1) or of `turns`; `base` counts for every mark."""
    found = []
    for row in rows:
        if row["start"] == start and row["arm"] == arm:
            judged = row["marks"][0 if arm == BASE else mark]
            found.append(judged["success"] if what == "success" else judged["task_turns"])
    return np.array([[float(value) for value in of_tasks] for of_tasks in found])


def interval(own: Array, other: Array | None = None) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of [seeds, tasks], or of its difference to `other`.

    Seeds and tasks are both drawn anew, the tasks the same for both sides (paired), so the interval
    holds the spread over seeds as well as that over tasks. One seed leaves its spread out.
    """
    random = np.random.default_rng(0)
    tasks = random.multinomial(own.shape[1], np.full(own.shape[1], 1 / own.shape[1]), SAMPLES)
    means = _drawn(own, tasks, random)
    if other is not None:
        means = means - _drawn(other, tasks, random)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _drawn(own: Array, tasks: NDArray[np.int64], random: np.random.Generator) -> Array:
    """[samples] means with these counts of each task, and seeds drawn anew."""
    number = len(own)
    seeds = random.multinomial(number, np.full(number, 1 / number), SAMPLES)
    return np.einsum("bs,st,bt->b", seeds, own, tasks, optimize=True) / own.size


def verdict(low: float, high: float) -> str:
    """What an interval of a difference allows to say."""
    if low > 0:
        return "better"
    return "worse" if high < 0 else "not told apart"


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float, float]:
    """Least squares y = a + b x; returns a, b, the residuals' standard deviation and r."""
    x, y = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(np.sqrt(((y - intercept - slope * x) ** 2).sum() / max(1, len(x) - 2)))
    return float(intercept), float(slope), spread, float(np.corrcoef(x, y)[0, 1])
