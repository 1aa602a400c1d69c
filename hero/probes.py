"""Does the teacher know better? Measured before training, where the environment can judge a single
action.

Teacher lift = share of right actions when the hinted teacher answers a turn again, minus the same
share of the student without a hint, both in the restored state. Without lift there is nothing to
distil.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hero.envs.base import HasDiagnosis
from hero.generation.base import Generator, Sampling
from hero.renderer import Renderer
from hero.teacher import TeacherWeights
from hero.types import Diagnosis, Sample, Trajectory


@dataclass(kw_only=True, slots=True)
class Probe:
    """Shares in 0..1; `turns` is how many turns were probed."""

    turns: int
    student_right: float
    teacher_right: float
    diagnosis_agreement: float
    """Share of turns on which the reflector finds fault exactly when the environment's own
    diagnosis does."""

    @property
    def lift(self) -> float:
        return self.teacher_right - self.student_right

    def __str__(self) -> str:
        return (
            f"Teacher probe on {self.turns} turns: right actions {self.student_right:.0%} without "
            "hindsight, "
            f"{self.teacher_right:.0%} with it. The reflector finds fault where the environment "
            "does on "
            f"{self.diagnosis_agreement:.0%} of turns."
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
    generator: Generator,
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
        generator: samples from the policy.
        weights: the teacher's, applied for its answers.
        renderer: decodes answers.
        max_turn_tokens: cap of an answer.
        seed: of the sampling.
    """
    chosen = [sample for sample in samples if sample.distill_weight][:max_turns]
    sampling = Sampling(max_tokens=max_turn_tokens, seed=seed)
    plain = generator.generate([sample.prompt_ids for sample in chosen], sampling)
    with weights.applied():
        hinted = generator.generate([sample.teacher_prompt_ids for sample in chosen], sampling)

    def right(answers: Sequence[list[int]]) -> float:
        judged = [
            _is_right(env, trajectories[sample.trajectory], sample.turn, renderer.decode(ids))
            for sample, ids in zip(chosen, answers, strict=True)
        ]
        return sum(judged) / max(1, len(judged))

    agreed = [
        bool(own.hint) == bool(theirs.hint)
        for trajectory, row in zip(trajectories, diagnoses, strict=True)
        for own, theirs in zip(row, env.diagnose(trajectory), strict=False)
    ]
    return Probe(
        turns=len(chosen),
        student_right=right([completion.ids for completion in plain]),
        teacher_right=right([completion.ids for completion in hinted]),
        diagnosis_agreement=sum(agreed) / max(1, len(agreed)),
    )


def _is_right(env: HasDiagnosis, trajectory: Trajectory, turn: int, action: str) -> bool:
    changed = replace(trajectory.turns[turn], action_text=action)
    return not env.diagnose(replace(trajectory, turns=[*trajectory.turns[:turn], changed]))[
        turn
    ].hint
