"""Held-out tasks before and after training, and what the teacher knows before it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from hero.envs.base import HasDiagnosis
from hero.envs.border import EnvironmentFault, diagnose
from hero.episodes import Assignment
from hero.renderer import Renderer
from hero.sampler import Sampler, Sampling
from hero.teacher import TeacherWeights
from hero.types import Diagnosis, Fault, Sample, StopReason, Trajectory

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


def dev_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What is logged of an evaluation; `cut_rate` is the share of episodes that ended at a cap."""
    result = summarise(trajectories)
    turns = sum(len(trajectory.turns) for trajectory in trajectories)
    return {
        "dev/success": result.success,
        "dev/score": result.score,
        "dev/episodes": float(len(trajectories)),
        "dev/turns": result.turns,
        "dev/turn_tokens": sum(t.num_action_tokens for t in trajectories) / max(1, turns),
        "dev/cut_rate": _mean([float(t.stop_reason is not StopReason.DONE) for t in trajectories]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# ---- does the teacher know better? ---------------------------------------------------------------


class TeacherGate(Fault):
    """The hinted teacher does not act better than the student: training would teach nothing."""


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

    def demand(self, lift: float | None) -> None:
        """Raise TeacherGate if the lift is below `lift` (`eval.min_teacher_lift`)."""
        if lift is not None and self.lift < lift:
            raise TeacherGate(
                f"The teacher's lift is {self.lift:+.2f}, below eval.min_teacher_lift={lift}: with "
                "hindsight it does not act clearly better, so there is nothing to distil. Use a "
                "better reflector (--reflection.reflector rules or openai), a stronger model, or "
                "a warm start (hero sft)."
            )

    def metrics(self) -> dict[str, float]:
        return {
            "probe/turns": self.turns,
            "probe/student_right": self.student_right,
            "probe/teacher_right": self.teacher_right,
            "probe/teacher_lift": self.lift,
            "probe/diagnosis_agreement": self.diagnosis_agreement,
        }


def agreement(
    env: object, trajectories: Sequence[Trajectory], diagnoses: Sequence[Sequence[Diagnosis]]
) -> dict[str, float]:
    """How far a reflector agrees with the environment's rules; {} without one of the two.

    `recall` and `precision` are shares of the turns in which the rules, or the reflector, find a
    fault; `same_action` is the share of the common ones with the same correction.
    """
    if not isinstance(env, HasDiagnosis) or not any(diagnoses):
        return {}
    pairs: list[tuple[Diagnosis, Diagnosis]] = []
    for trajectory, row in zip(trajectories, diagnoses, strict=True):
        if row and not trajectory.failed:
            with suppress(EnvironmentFault):  # an episode that cannot be judged is left out
                pairs += zip(row, diagnose(env, trajectory), strict=True)
    hits = [(own, rule) for own, rule in pairs if own.hint and rule.hint]
    corrected = [(a, b) for a, b in hits if a.corrected_action and b.corrected_action]
    found = {
        "recall": (len(hits), sum(bool(rule.hint) for _, rule in pairs)),
        "precision": (len(hits), sum(bool(own.hint) for own, _ in pairs)),
        "same_action": (
            sum(a.corrected_action == b.corrected_action for a, b in corrected), len(corrected)
        ),
    }  # fmt: skip
    return {f"agreement/{name}": part / whole for name, (part, whole) in found.items() if whole}


def consistency(
    first: Sequence[Sequence[Diagnosis]], second: Sequence[Sequence[Diagnosis]]
) -> dict[str, float]:
    """How far two reflections of the same episodes agree; {} if neither finds a fault.

    The share of the turns with a hint in either that have one in both.
    """
    hints = [
        (bool(one.hint), bool(other.hint))
        for row, again in zip(first, second, strict=True)
        for one, other in zip(row, again, strict=True)
    ]
    either = sum(one or other for one, other in hints)
    return {"agreement/consistency": sum(map(all, hints)) / either} if either else {}


def probe_teacher(
    env: HasDiagnosis,
    trajectories: Sequence[Trajectory],
    diagnoses: Sequence[Sequence[Diagnosis]],
    samples: Sequence[Sample],
    *,
    sampler: Sampler,
    teacher_sampler: Sampler | None = None,
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
        samples: annotated turns of these trajectories; those with a hint, or all where there are no
            diagnoses, are probed, at most `max_turns` of them.
        sampler: samples from the policy.
        teacher_sampler: from the teacher, within `weights.applied()`; None if that is `sampler`.
        weights: the teacher's, applied for its answers.
        renderer: decodes answers.
        max_turn_tokens: cap of an answer.
        seed: of the sampling.
    """
    faults: list[EnvironmentFault] = []  # an answer that cannot be judged is left out
    chosen = [
        sample
        for sample in samples
        if sample.distill_weight
        and (not (row := diagnoses[sample.trajectory]) or row[sample.turn].hint)
    ][:max_turns]
    sampling = Sampling(max_tokens=max_turn_tokens, seed=seed)
    plain = sampler.generate([sample.prompt_ids for sample in chosen], sampling)
    with weights.applied():
        hinted = (teacher_sampler or sampler).generate(
            [sample.teacher_prompt_ids for sample in chosen], sampling
        )

    def judge(trajectory: Trajectory) -> list[Diagnosis]:
        try:
            return diagnose(env, trajectory)
        except EnvironmentFault as fault:
            faults.append(fault)
            return []

    def right(sample: Sample, answer: list[int]) -> list[float]:
        trajectory, k = trajectories[sample.trajectory], sample.turn
        other = replace(trajectory.turns[k], action_text=renderer.decode(answer))
        # Nothing follows: later turns belong to the action that was really taken.
        judged = judge(replace(trajectory, turns=[*trajectory.turns[:k], other]))
        return [float(not diagnosis.hint) for diagnosis in judged[k:]]

    agreed = [
        float(bool(own.hint) == bool(theirs.hint))
        for trajectory, row in zip(trajectories, diagnoses, strict=True)
        for own, theirs in zip(row, judge(trajectory) if row else (), strict=False)
    ]
    pairs = [
        both
        for sample, one, other in zip(chosen, plain, hinted, strict=True)
        if len(both := right(sample, one.ids) + right(sample, other.ids)) == 2
    ]
    if faults and not pairs:
        raise faults[0]
    return Probe(
        turns=len(pairs),
        student_right=_mean([student for student, _ in pairs]),
        teacher_right=_mean([teacher for _, teacher in pairs]),
        diagnosis_agreement=_mean(agreed),
    )
