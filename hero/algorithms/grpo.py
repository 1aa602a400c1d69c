"""Group-relative policy optimisation, alone and beside HERO."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from hero.algorithms.base import Algorithm, Episodes
from hero.algorithms.distillation import Hero
from hero.types import Sample, Trajectory


def group_advantages(trajectories: Sequence[Trajectory]) -> list[float]:
    """(reward - group mean) / group standard deviation; 0 where all rewards of a group are
    equal."""
    groups: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        groups[trajectory.group_id].append(trajectory.reward)
    advantages = []
    for trajectory in trajectories:
        rewards = groups[trajectory.group_id]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
        advantages.append((trajectory.reward - mean) / std if std > 1e-6 else 0.0)
    return advantages


class Grpo(Algorithm):
    """No teacher: every turn shares its episode's advantage. Clip 0.2 / 0.28, no KL penalty. [L]"""

    needs_groups = True
    distils = False

    def annotate(self, episodes: Episodes) -> list[Sample]:
        samples = []
        advantages = group_advantages(episodes.trajectories)
        for t, trajectory in enumerate(episodes.trajectories):
            for k in range(len(trajectory.turns)):
                sample = self.sample(episodes, t, k)
                sample.policy_weight = 1.0
                sample.advantage = advantages[t]
                samples.append(sample)
        return samples


class HeroGrpo(Algorithm):
    """HERO's distillation and GRPO's advantages on the same episodes."""

    needs_reflection = True
    needs_groups = True

    def annotate(self, episodes: Episodes) -> list[Sample]:
        distilled = {(s.trajectory, s.turn): s for s in Hero(self.context).annotate(episodes)}
        samples = Grpo(self.context).annotate(episodes)
        for sample in samples:
            if other := distilled.get((sample.trajectory, sample.turn)):
                sample.block_ids = other.block_ids
                sample.branch_at = other.branch_at
                sample.distill_weight = other.distill_weight
        return samples
