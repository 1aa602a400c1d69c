"""REINFORCE and RLOO: policy gradients without GRPO's division by the standard deviation."""

from __future__ import annotations

from collections.abc import Sequence

from hero.algorithms.grpo import PolicyGradient, by_group
from hero.types import Trajectory


class Reinforce(PolicyGradient):
    """A = reward - mean of the update's rewards: learns from one episode of a task. [L]

    The fair opponent of HERO at group size 1. (Williams 1992, with a batch baseline.)
    """

    needs_batch = True

    def advantages(self, trajectories: Sequence[Trajectory]) -> list[float]:
        mean = sum(t.reward for t in trajectories) / max(1, len(trajectories))
        return [t.reward - mean for t in trajectories]


class Rloo(PolicyGradient):
    """A = reward - mean reward of the group's *other* episodes (arXiv 2402.14740). [L]"""

    needs_groups = True

    def advantages(self, trajectories: Sequence[Trajectory]) -> list[float]:
        groups = by_group(trajectories)
        advantages = []
        for trajectory in trajectories:
            rewards = groups[trajectory.group_id]
            others = (sum(rewards) - trajectory.reward) / max(1, len(rewards) - 1)
            advantages.append(trajectory.reward - others)
        return advantages
