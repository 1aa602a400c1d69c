"""Held-out tasks before and after training, and what the teacher knows before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import comb
from typing import Any

from hero.envs.base import HasDiagnosis
from hero.envs.border import EnvironmentFault, diagnose
from hero.episodes import Assignment
from hero.renderer import Renderer
from hero.sampling import Sampler, Sampling
from hero.teacher import TeacherWeights
from hero.types import Diagnosis, Fault, Sample, StopReason, Trajectory

# ---- how often, how well and in how many turns ---------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """Means over tasks of the means over each task's trials; shares lie in 0..1."""

    success: float
    """An episode that the environment broke counts as none."""
    score: float
    """Mean reward."""
    turns: float
    turns_of_successes: float | None
    """None if nothing succeeded."""
    tokens: float
    """Sampled in an episode."""
    invalid: float
    """Share of an episode's turns that the environment could not read or did not accept."""
    duplicate: float
    """Share of turns that repeat an earlier action and its answer: nothing came of them."""
    error: float
    """Share of episodes that the environment broke."""
    pass_any: dict[int, float]
    """pass@k: the chance that one of k trials succeeds, from all trials of each task."""
    pass_all: dict[int, float]
    """pass^k: the chance that all of k trials succeed."""
    per_task: dict[str, dict[str, float]]
    """The same figures of each task, means over its trials."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def trials(tasks: Sequence[str], number: int) -> list[Assignment]:
    """Each task `number` times."""
    return [
        Assignment(id=f"{task}-t{trial}", group_id=task, task_id=task)
        for trial in range(number)
        for task in tasks
    ]


def figures(trajectory: Trajectory) -> dict[str, float]:
    """What an evaluation counts of one episode."""
    turns, success = len(trajectory.turns), float(trajectory.success)
    seen = {(turn.action_text, turn.observation) for turn in trajectory.turns}
    invalid = sum(turn.is_error or not turn.parse_ok for turn in trajectory.turns)
    found = {
        "success": success, "score": trajectory.reward, "turns": float(turns),
        "tokens": float(trajectory.num_action_tokens), "invalid": invalid / max(1, turns),
        "duplicate": (turns - len(seen)) / max(1, turns), "error": float(trajectory.failed),
    }  # fmt: skip
    return found | ({"turns_of_successes": found["turns"]} if success else {})


def summarise(trajectories: Sequence[Trajectory]) -> Evaluation:
    """Means over tasks of the means over each task's trials."""
    return summarise_figures([(t.task_id, figures(t)) for t in trajectories])


def summarise_figures(episodes: Sequence[tuple[str, Mapping[str, float]]]) -> Evaluation:
    """The same from task and `figures` of each episode."""
    if not episodes:
        raise ValueError("There is no trajectory to summarise.")
    by_task: dict[str, list[Mapping[str, float]]] = {}
    for task, found in episodes:
        by_task.setdefault(task, []).append(found)
    per_task = {task: _means(group) for task, group in by_task.items()}
    counts = [(len(g), round(sum(f["success"] for f in g))) for g in by_task.values()]
    ks = range(1, min(number for number, _ in counts) + 1)
    return Evaluation(
        **{"turns_of_successes": None, **_means(list(per_task.values()))},  # type: ignore[arg-type]
        pass_any={k: 1 - _mean([_share(n - c, n, k) for n, c in counts]) for k in ks},
        pass_all={k: _mean([_share(c, n, k) for n, c in counts]) for k in ks},
        per_task=per_task,
    )


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each key over the rows that have it."""
    return {key: _mean([row[key] for row in rows if key in row]) for row in rows for key in row}


def _share(of: int, number: int, k: int) -> float:
    """The chance that k draws from `number` trials without putting back are all among `of`."""
    return comb(of, k) / comb(number, k)


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


SHOWN = 600
"""Characters of a prompt that an `Answer` keeps."""


class TeacherGate(Fault):
    """The hinted teacher does not act better than the student: training would teach nothing."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Answer:
    """A turn that student and teacher answered again, as texts."""

    saw: str
    """The end of the prompt."""
    acted: str
    """What was done in the episode."""
    hindsight: str
    student: str
    teacher: str
    student_right: bool
    teacher_right: bool


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
    success: float
    """Of the episodes."""
    well_formed: float
    """Of all turns, those whose action could be read."""
    share: float
    """Of all turns, those that are trained with a hint, or at all where nothing is diagnosed."""
    answers: list[Answer]
    """Of the turns probed."""

    @property
    def lift(self) -> float:
        return self.teacher_right - self.student_right

    @property
    def gap(self) -> float:
        """Rise of the share of right actions over all turns if the student became the teacher."""
        return self.share * self.lift

    @property
    def figures(self) -> dict[str, float]:
        """What `hero probe` and a study write to files."""
        names = ("turns", "share", "student_right", "teacher_right", "gap")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return (
            f"Before training {self.well_formed:.0%} of the actions can be read and "
            f"{self.success:.0%} of the episodes succeed.\n"
            f"Teacher probe on {self.turns} turns: right actions {self.student_right:.0%} without "
            f"hindsight, {self.teacher_right:.0%} with it. The reflector finds fault where the "
            f"environment does on {self.diagnosis_agreement:.0%} of turns.\n"
            f"On {self.share:.0%} of the turns there is something to learn: if the student became "
            f"its teacher, {self.gap:+.0%} of all actions would turn right."
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
    trained = [
        sample
        for sample in samples
        if sample.distill_weight
        and (not (row := diagnoses[sample.trajectory]) or row[sample.turn].hint)
    ]
    chosen = trained[:max_turns]
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
    answers = [
        Answer(
            saw=renderer.decode(sample.prompt_ids)[-SHOWN:].strip(),
            acted=trajectories[sample.trajectory].turns[sample.turn].action_text,
            hindsight=renderer.decode(sample.privileged_ids).strip(),
            student=renderer.decode(one.ids), teacher=renderer.decode(other.ids),
            student_right=both[0] == 1, teacher_right=both[1] == 1,
        )
        for sample, one, other in zip(chosen, plain, hinted, strict=True)
        if len(both := right(sample, one.ids) + right(sample, other.ids)) == 2
    ]  # fmt: skip
    if faults and not answers:
        raise faults[0]
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    return Probe(
        turns=len(answers),
        student_right=_mean([float(answer.student_right) for answer in answers]),
        teacher_right=_mean([float(answer.teacher_right) for answer in answers]),
        diagnosis_agreement=_mean(agreed),
        success=_mean([float(trajectory.success) for trajectory in trajectories]),
        well_formed=_mean([float(turn.parse_ok) for turn in turns]),
        share=len(trained) / max(1, len(turns)),
        answers=answers,
    )
