"""Two evaluations of the same tasks: differences, and what chance allows to say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FIGURES = (
    # key in an evaluation, label, scale, decimals
    ("success", "success %", 100.0, 1),
    ("score", "score", 1.0, 3),
    ("turns", "average turns", 1.0, 1),
    ("turns_of_successes", "turns of successes", 1.0, 1),
    ("tokens", "tokens", 1.0, 0),
    ("invalid", "invalid turns %", 100.0, 1),
    ("duplicate", "repeated turns %", 100.0, 1),
    ("error", "broken episodes %", 100.0, 1),
)
MAIN = FIGURES[:3]
"""Those of the final table of a run."""
FEWEST = 6
"""Tasks that must differ: below this even a sign test that all of them pass says nothing at 5 %."""
POWER = (1.96 + 0.8416) ** 2
"""Of a difference in standard deviations: told from noise at 5 % in four of five attempts."""
ROUNDING = 1e-9
"""Differences below this are none: means of equal figures differ by their rounding."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the table."""

    label: str
    before: float
    after: float
    gains: tuple[float, ...] = ()
    """Difference of each task; empty if there are no figures for each task."""
    digits: int
    """Decimals to show."""

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the difference; None without figures for each task."""
        return bootstrap_interval(self.gains) if self.gains else None

    @property
    def is_told(self) -> bool:
        """Whether the difference can be told from noise."""
        low, high = self.interval or (0.0, 0.0)
        return (low > 0 or high < 0) and self.differing >= FEWEST

    @property
    def differing(self) -> int:
        """Tasks that differ."""
        return sum(abs(gain) > ROUNDING for gain in self.gains)

    @property
    def needed(self) -> int | None:
        """Tasks that would tell a difference of this size from noise in four of five attempts.

        ((1.96 + 0.84) s / d)², with the standard deviation s of the tasks' differences and their
        mean d. None for no difference.
        """
        if len(self.gains) < 2 or abs(self.difference) < ROUNDING:
            return None
        spread = float(np.std(self.gains, ddof=1)) / self.difference
        return max(FEWEST, math.ceil(POWER * spread**2))

    @property
    def words(self) -> str:
        """Whether the difference can be told from noise, and how many tasks would tell it."""
        if not self.gains:
            return "no figures for each task"
        if self.is_told:
            return "yes"
        if self.needed is None:
            return "no difference"
        if self.needed <= len(self.gains):
            return f"no: {self.differing} tasks differ"
        return f"no; about {self.needed} tasks would"


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any],
    figures: Sequence[tuple[str, str, float, int]] = MAIN,
) -> list[Comparison]:  # fmt: skip
    """Rows of the table from two evaluations, as in `summary.json`.

    The interval is a percentile bootstrap over tasks of the paired difference: tasks differ far
    more than an agent differs on one task, so pairing is what makes it narrow enough to tell
    something. It does not contain the spread over training seeds. A figure that only some tasks
    have is of the tasks that have it in both.

    Raises:
        ValueError: the two evaluations were not made on the same tasks.
    """
    tasks_before, tasks_after = before.get("per_task") or {}, after.get("per_task") or {}
    if set(tasks_before) != set(tasks_after):
        odd = sorted(set(tasks_before) ^ set(tasks_after))
        raise ValueError(
            f"Both must be evaluated on the same tasks, got {len(tasks_before)} and "
            f"{len(tasks_after)}; only one of them has {', '.join(odd[:5])}."
        )
    rows = []
    for key, label, scale, digits in figures:
        if before.get(key) is None or after.get(key) is None:
            continue
        pairs = [
            (scale * row[key], scale * tasks_after[task][key])
            for task, row in sorted(tasks_before.items())
            if key in row and key in tasks_after[task]
        ]
        if tasks_before and not pairs:
            continue
        rows.append(
            Comparison(
                label=label,
                before=_mean([one for one, _ in pairs]) if pairs else scale * before[key],
                after=_mean([other for _, other in pairs]) if pairs else scale * after[key],
                gains=tuple(other - one for one, other in pairs),
                digits=digits,
            )
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def bootstrap_interval(values: Sequence[float], samples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean under resampling of `values`; the same at every call."""
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(data), size=(samples, len(data)))
    low, high = np.quantile(data[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
