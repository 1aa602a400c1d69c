"""Rivals of HERO in the same trainer, from the formulas of their papers and code. [L]

Their privileged text comes from this project's reflector: the hints of an episode stand for its
skill or lesson. [D] What each leaves out of its paper is said in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hero.algorithms.base import Experience, successful_sibling
from hero.algorithms.distillation import Distillation, ReflectionOnly
from hero.algorithms.grpo import Grpo, WithGrpo
from hero.prompts import Hindsight
from hero.types import Sample

if TYPE_CHECKING:
    from torch import Tensor


def lessons(experience: Experience, trajectories: Iterable[int]) -> str:
    """The distinct hints of these episodes, in order."""
    hints = (d.hint for t in trajectories for d in experience.diagnoses[t] if d.hint)
    return " ".join(dict.fromkeys(hints))


def of_group(experience: Experience, trajectory: int) -> list[int]:
    """The episodes of the same group, without those that their environment broke."""
    own = experience.trajectories[trajectory].group_id
    return [t for t, e in enumerate(experience.trajectories) if e.group_id == own and not e.failed]


class HintSd(ReflectionOnly):
    """HinT-SD (arXiv 2605.17873): the diagnosis alone, on flagged turns of failed episodes."""

    def hindsight(self, experience: Experience, trajectory: int, turn: int) -> Hindsight | None:
        if experience.trajectories[trajectory].success:
            return None
        return super().hindsight(experience, trajectory, turn)


class Skills(Distillation):
    """The teacher of a turn reads what the whole group of episodes has taught; all turns."""

    needs_reflection = True

    def hindsight(self, experience: Experience, trajectory: int, turn: int) -> Hindsight | None:
        skill = lessons(experience, of_group(experience, trajectory))
        return Hindsight(hint=skill) if skill else None


class SkillSd(WithGrpo):
    """Skill-SD (arXiv 2604.10674): GRPO, and a divergence from a teacher that reads the skills."""

    needs_reflection = True
    teacher_saw = "the lessons of all episodes of the task"
    distillation: type[Distillation] = Skills


SDAR_WEIGHT, SDAR_SHARPNESS = 0.01, 5.0
"""λ and β of the paper's best setting."""


def sdar_gate(gap: Tensor) -> Tensor:
    """λ·σ(β·gap): tokens that the teacher finds likelier count more."""
    return SDAR_WEIGHT * (SDAR_SHARPNESS * gap).sigmoid()


class Sdar(SkillSd):
    """SDAR (arXiv 2605.15155): as Skill-SD, each token's divergence behind a detached gate."""

    def annotate(self, experience: Experience) -> list[Sample]:
        return [replace(s, distill_gate=sdar_gate) for s in super().annotate(experience)]


GRSD_WEIGHT, GRSD_BOUND, GRSD_LEAST = 0.5, 0.2, 0.1
"""λ and bound of ĝ as its scripts set them; the factor below which no advantage falls."""


def grsd_gate(sign: float, gap: Tensor) -> Tensor:
    """max(0.1, 1 + λ·ĝ), ĝ = clip(exp(sign·gap) - 1, ±0.2): credit where the teacher agrees."""
    found = (sign * gap).clamp(-20, 20).expm1().clamp(-GRSD_BOUND, GRSD_BOUND)
    return (1 + GRSD_WEIGHT * found).clamp(min=GRSD_LEAST)


class Grsd(Grpo):
    """GRSD (arXiv 2607.28076): GRPO whose advantages a teacher reshapes, token by token.

    It reads an episode of the group that succeeded and the lessons of those that failed; groups of
    equal outcomes stay as GRPO has them, without any signal where their rewards are equal too.
    """

    needs_reflection = True
    teacher_saw = "what separated the task's successes from its failures"

    def annotate(self, experience: Experience) -> list[Sample]:
        samples = super().annotate(experience)
        for sample in samples:
            group = of_group(experience, sample.trajectory)
            failed = [t for t in group if not experience.trajectories[t].success]
            if not sample.advantage or not 0 < len(failed) < len(group):
                continue
            seen = Hindsight(
                demonstration=successful_sibling(experience, failed[0]),
                hint=lessons(experience, failed),
            )
            sample.privileged_ids = self.context.privileged_ids(seen)
            sample.branch_at = self.context.renderer.branch_at(sample.prompt_ids)
            sample.advantage_gate = partial(grsd_gate, 1.0 if sample.advantage > 0 else -1.0)
        return samples
