"""The final table: held-out tasks before and after training, with what chance allows for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the final table."""

    label: str
    before: float
    after: float
    interval: tuple[float, float] | None
    """95 % interval of after minus before; None if the summary has no figures for each task."""
    digits: int
    """Decimals to show."""

    @property
    def difference(self) -> float:
        return self.after - self.before


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Comparison]:
    """Rows of the final table from the two evaluations in `summary.json`.

    The interval is a percentile bootstrap over tasks of the paired difference: tasks differ far
    more than an agent differs on one task, so pairing is what makes it narrow enough to tell
    something. It does not contain the spread over training seeds.

    Raises:
        ValueError: the two evaluations were not made on the same tasks.
    """
    tasks_before, tasks_after = before.get("per_task") or {}, after.get("per_task") or {}
    if set(tasks_before) != set(tasks_after):
        odd = sorted(set(tasks_before) ^ set(tasks_after))
        raise ValueError(
            f"Before and after must be evaluated on the same tasks, got {len(tasks_before)} and "
            f"{len(tasks_after)}; only one of them has {', '.join(odd[:5])}."
        )
    rows = []
    for key, label, scale, digits in (
        ("success", "success %", 100.0, 1),
        ("score", "score", 1.0, 3),
        ("turns", "average turns", 1.0, 1),
    ):
        if before.get(key) is None or after.get(key) is None:
            continue
        gains = [
            scale * (tasks_after[task][key] - tasks_before[task][key])
            for task in sorted(tasks_before)
        ]
        rows.append(
            Comparison(
                label=label,
                before=scale * before[key],
                after=scale * after[key],
                interval=bootstrap_interval(gains) if gains else None,
                digits=digits,
            )
        )
    return rows


def bootstrap_interval(values: Sequence[float], samples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean under resampling of `values`; the same at every call."""
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(data), size=(samples, len(data)))
    low, high = np.quantile(data[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
