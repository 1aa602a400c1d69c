"""Held-out tasks before and after training, and what the teacher knows before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hero.envs.base import HasDiagnosis
from hero.renderer import Renderer
from hero.rollout import Assignment
from hero.sampler import Sampler, Sampling
from hero.teacher import TeacherWeights
from hero.types import Diagnosis, Sample, Trajectory

# ---- how often, how well and in how many turns ---------------------------------------------------


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


def trials(tasks: Sequence[str], number: int) -> list[Assignment]:
    """Each task `number` times."""
    return [
        Assignment(id=f"{task}-t{trial}", group_id=task, task_id=task)
        for trial in range(number)
        for task in tasks
    ]


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
    return sum(values) / len(values) if values else 0.0


# ---- the final table: before and after, with what chance allows for ------------------------------


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


# ---- does the teacher know better? ---------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Probe:
    """Shares in 0..1; `turns` is how many turns were probed.

    Teacher lift is the share of right actions when the hinted teacher answers a turn again, minus
    the same share of the student without a hint, both in the restored state. Without lift there is
    nothing to distil.
    """

    turns: int
    student_right: float
    teacher_right: float
    diagnosis_agreement: float
    """Share of turns on which reflector and environment agree whether there is a fault."""

    @property
    def lift(self) -> float:
        return self.teacher_right - self.student_right

    def __str__(self) -> str:
        return (
            f"Teacher probe on {self.turns} turns: right actions {self.student_right:.0%} without "
            f"hindsight, {self.teacher_right:.0%} with it. The reflector finds fault where the "
            f"environment does on {self.diagnosis_agreement:.0%} of turns."
        )

    def metrics(self) -> dict[str, float]:
        return {
            "probe/turns": self.turns,
            "probe/student_right": self.student_right,
            "probe/teacher_right": self.teacher_right,
            "probe/teacher_lift": self.lift,
            "probe/diagnosis_agreement": self.diagnosis_agreement,
        }


def probe_teacher(
    env: HasDiagnosis,
    trajectories: Sequence[Trajectory],
    diagnoses: Sequence[Sequence[Diagnosis]],
    samples: Sequence[Sample],
    *,
    sampler: Sampler,
    weights: TeacherWeights,
    renderer: Renderer,
    max_turn_tokens: int,
    seed: int,
    max_turns: int = 128,
) -> Probe:
    """Let teacher and student answer the distilled turns again and have the environment judge.

    Args:
        env: judges by its own diagnosis: an action is right if it draws no hint.
        trajectories: finished episodes.
        diagnoses: the reflector's, for the agreement; may be empty lists.
        samples: annotated turns of these trajectories; at most `max_turns` of them are probed.
        sampler: samples from the policy.
        weights: the teacher's, applied for its answers.
        renderer: decodes answers.
        max_turn_tokens: cap of an answer.
        seed: of the sampling.
    """
    chosen = [sample for sample in samples if sample.distill_weight][:max_turns]
    sampling = Sampling(max_tokens=max_turn_tokens, seed=seed)
    plain = sampler.generate([sample.prompt_ids for sample in chosen], sampling)
    with weights.applied():
        hinted = sampler.generate([sample.teacher_prompt_ids for sample in chosen], sampling)

    def right(sample: Sample, answer: list[int]) -> float:
        trajectory, k = trajectories[sample.trajectory], sample.turn
        other = replace(trajectory.turns[k], action_text=renderer.decode(answer))
        # Nothing follows: later turns belong to the action that was really taken.
        judged = env.diagnose(replace(trajectory, turns=[*trajectory.turns[:k], other]))
        return float(not judged[k].hint)

    agreed = [
        float(bool(own.hint) == bool(theirs.hint))
        for trajectory, row in zip(trajectories, diagnoses, strict=True)
        for own, theirs in zip(row, env.diagnose(trajectory), strict=False)
    ]
    return Probe(
        turns=len(chosen),
        student_right=_mean([right(s, c.ids) for s, c in zip(chosen, plain, strict=True)]),
        teacher_right=_mean([right(s, c.ids) for s, c in zip(chosen, hinted, strict=True)]),
        diagnosis_agreement=_mean(agreed),
    )
