"""Group-relative policy optimisation, alone and beside HERO."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from hero.algorithms.base import Algorithm, Experience
from hero.algorithms.distillation import Distillation, Hero
from hero.types import Sample, Trajectory


def by_group(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """Rewards of each group, without episodes that their environment broke."""
    groups: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        if not trajectory.failed:
            groups[trajectory.group_id].append(trajectory.reward)
    return groups


def group_advantages(trajectories: Sequence[Trajectory]) -> list[float]:
    """(reward - group mean) / group standard deviation; 0 in a group of equal rewards."""
    groups = by_group(trajectories)
    advantages = []
    for trajectory in trajectories:
        rewards = groups[trajectory.group_id]
        mean = sum(rewards) / max(1, len(rewards))
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / max(1, len(rewards)))
        advantages.append((trajectory.reward - mean) / std if std > 1e-6 else 0.0)
    return advantages


class PolicyGradient(Algorithm):
    """No teacher: every turn shares its episode's advantage. Clip 0.2 / 0.28, no KL penalty. [L]"""

    distils = False

    @abstractmethod
    def advantages(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One for each episode of the update."""

    def annotate(self, experience: Experience) -> list[Sample]:
        advantages = self.advantages(experience.trajectories)
        return [
            replace(sample, pg_weight=1.0, advantage=advantages[sample.trajectory])
            for sample in self.turns(experience)
        ]


class Grpo(PolicyGradient):
    """Advantages within a group of episodes of one task, in standard deviations. [L]"""

    needs_groups = True

    def advantages(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return group_advantages(trajectories)


class WithGrpo(Algorithm):
    """A distillation, and GRPO on all turns of the same episodes, weighted by λ.

    The policy-gradient loss is linear in the advantage, so λ (`loss.pg_weight`) multiplies that.
    """

    needs_groups = True
    distillation: type[Distillation]

    def annotate(self, experience: Experience) -> list[Sample]:
        own = self.distillation(self.context, self.loss).annotate(experience)
        distilled = {(sample.trajectory, sample.turn): sample for sample in own}
        return [
            replace(
                distilled.get((sample.trajectory, sample.turn), sample),
                pg_weight=1.0,
                advantage=self.loss.pg_weight * sample.advantage,
            )
            for sample in Grpo(self.context, self.loss).annotate(experience)
        ]


class HeroGrpo(WithGrpo):
    """HERO's distillation beside GRPO. [D]"""

    needs_reflection = True
    chooses_turns = True
    teacher_saw = Hero.teacher_saw
    distillation = Hero
