"""Held-out tasks: how often, how well and in how many turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hero.rollout import Episode
from hero.types import Trajectory


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """Means over tasks and trials."""

    success: float
    score: float
    """Mean reward."""
    turns: float
    per_task: dict[str, dict[str, float]]
    """success, score and turns of each task, means over its trials."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    tasks: Sequence[str],
    *,
    play: Callable[..., list[Trajectory]],
    trials: int,
    temperature: float,
    seed: int,
) -> tuple[Evaluation, list[Trajectory]]:
    """Play each task `trials` times; `play` is `rollout` with its environments, sampler and
    caps."""
    episodes = [
        Episode(id=f"{task}-t{trial}", group_id=task, task_id=task)
        for trial in range(trials)
        for task in tasks
    ]
    trajectories = play(episodes, seed=seed, temperature=temperature)
    return summarise(trajectories), trajectories


def summarise(trajectories: Sequence[Trajectory]) -> Evaluation:
    """Means over tasks of the means over each task's trials."""
    if not trajectories:
        raise ValueError("There is no trajectory to summarise.")
    by_task: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        by_task.setdefault(trajectory.task_id, []).append(trajectory)
    per_task = {
        task: {
            "success": _mean([float(t.success) for t in group]),
            "score": _mean([t.reward for t in group]),
            "turns": _mean([float(len(t.turns)) for t in group]),
        }
        for task, group in by_task.items()
    }
    means = {
        key: _mean([task[key] for task in per_task.values()])
        for key in ("success", "score", "turns")
    }
    return Evaluation(per_task=per_task, **means)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
