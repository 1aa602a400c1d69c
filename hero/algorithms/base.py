"""What every algorithm has: a batch of finished episodes in, annotated samples out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hero.types import Diagnosis, Sample, Trajectory

if TYPE_CHECKING:  # it loads torch, and the report only asks what the modes are
    from hero.teacher import TeacherContext

Demonstration = tuple[tuple[str, str], ...]
"""(action, observation) of each turn of a successful episode."""


@dataclass(kw_only=True, slots=True)
class Experience:
    """What an algorithm may use."""

    trajectories: list[Trajectory]
    diagnoses: list[list[Diagnosis]]
    """One for each turn of each trajectory; empty lists where the mode needs no reflection."""
    gold: dict[str, Demonstration]
    """Gold episodes by task id, if the mode needs them and the environment has an oracle."""


class Algorithm(ABC):
    """Decides which turns are trained, by which loss, and what their teacher sees.

    Everything that is special about a mode stands in its class: trainer, loss and report ask here
    and never compare names of modes.

    Args:
        context: writes what the teacher sees.
        pg_weight: weight of the policy-gradient term where it is one of two (`loss.pg_weight`).
    """

    needs_reflection = False
    """Reads diagnoses, so that a reflector has to run."""
    needs_gold = False
    """Can use the environment's own solution of a task."""
    needs_groups = False
    """Compares episodes of one task: `rollout.group_size` must be at least 2."""
    needs_batch = False
    """Compares the episodes of an update: there must be at least 2."""
    distils = True
    """Has a teacher."""
    teacher_saw = ""
    """What the teacher of a turn has seen that the student had not, for the report."""

    def __init__(self, context: TeacherContext, pg_weight: float = 1.0) -> None:
        self.context = context
        self.pg_weight = pg_weight

    @abstractmethod
    def annotate(self, experience: Experience) -> list[Sample]:
        """A sample for each turn that is trained, those of a trajectory together and in order."""

    def turns(self, experience: Experience) -> Iterator[Sample]:
        """Every turn, without annotation."""
        for t, trajectory in enumerate(experience.trajectories):
            for k, turn in enumerate(trajectory.turns):
                yield Sample(
                    trajectory=t,
                    turn=k,
                    prompt_ids=turn.prompt_ids,
                    action_ids=turn.action_ids,
                    sampled_logprobs=turn.sampled_logprobs,
                )


def successful_sibling(experience: Experience, trajectory: int) -> Demonstration:
    """Another episode of the same group that succeeded, or ()."""
    own = experience.trajectories[trajectory]
    for other in experience.trajectories:
        if other is not own and other.group_id == own.group_id and other.success:
            return tuple((turn.action_text, turn.observation or "") for turn in other.turns)
    return ()
