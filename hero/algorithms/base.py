"""What every algorithm has: a batch of episodes in, annotated samples out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hero.types import Diagnosis, Sample, Trajectory

if TYPE_CHECKING:  # it loads torch, and the report only asks what the modes are
    from hero.teacher import TeacherContext

Demonstration = tuple[tuple[str, str], ...]
"""(action, observation) of each turn of a successful episode."""


@dataclass(kw_only=True, slots=True)
class Episodes:
    """What an algorithm may use."""

    trajectories: list[Trajectory]
    diagnoses: list[list[Diagnosis]]
    """One a turn of each trajectory; empty lists where the mode needs no reflection."""
    gold: dict[str, Demonstration]
    """Gold episodes by task id; only for modes with `needs_gold`, and where the environment has an
    oracle."""


class Algorithm(ABC):
    """Decides which turns are trained and what their teacher sees."""

    needs_reflection = False
    needs_gold = False
    needs_groups = False
    distils = True
    teacher_saw = ""

    def __init__(self, context: TeacherContext) -> None:
        self.context = context

    @abstractmethod
    def annotate(self, episodes: Episodes) -> list[Sample]:
        """One sample for each turn that is trained; those of one trajectory together and in
        order."""

    def sample(self, episodes: Episodes, trajectory: int, turn: int) -> Sample:
        """The turn without annotation."""
        item = episodes.trajectories[trajectory].turns[turn]
        return Sample(
            trajectory=trajectory,
            turn=turn,
            prompt_ids=item.prompt_ids,
            action_ids=item.action_ids,
            sampled_logprobs=item.sampled_logprobs,
            loss_mask=item.loss_mask,
        )


def successful_sibling(episodes: Episodes, trajectory: int) -> Demonstration:
    """Another episode of the same group that succeeded, or ()."""
    own = episodes.trajectories[trajectory]
    for other in episodes.trajectories:
        if other is not own and other.group_id == own.group_id and other.success:
            return demonstration(other)
    return ()


def demonstration(trajectory: Trajectory) -> Demonstration:
    return tuple((turn.action_text, turn.observation or "") for turn in trajectory.turns)
