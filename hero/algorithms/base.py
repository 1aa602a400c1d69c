"""What every algorithm has: a batch of finished episodes in, annotated samples out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hero.config import LossConfig
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
        loss: which turns are trained, and how much each term counts; None for the defaults.
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
    """Has a teacher whose actions are what is learnt."""
    chooses_turns = False
    """Lets `loss.turns` say which clean turns are trained."""
    teacher_saw = ""
    """What the teacher of a turn has seen that the student had not, for the report."""

    def __init__(self, context: TeacherContext, loss: LossConfig | None = None) -> None:
        self.context = context
        self.loss = loss or LossConfig()

    @abstractmethod
    def annotate(self, experience: Experience) -> list[Sample]:
        """A sample for each turn that is trained, those of a trajectory together and in order."""

    def samples(self, experience: Experience) -> list[Sample]:
        """`annotate`'s, and all other turns where a term of the loss looks at every turn."""
        annotated = self.annotate(experience)
        if not (self.loss.observation_weight or self.loss.kl_to_start):
            return annotated
        chosen = {(sample.trajectory, sample.turn): sample for sample in annotated}
        return [
            replace(chosen.get((t, k), sample), **self._followed_by(experience.trajectories[t], k))
            for sample in self.turns(experience)
            for t, k in [(sample.trajectory, sample.turn)]
        ]

    def _followed_by(self, trajectory: Trajectory, turn: int) -> dict[str, Any]:
        """What of a sample describes the observation after it, as the next prompt holds it.

        Nothing after the last turn, nor where the next prompt does not go on from this one.
        """
        own, following = trajectory.turns[turn], trajectory.turns[turn + 1 : turn + 2]
        before = own.prompt_ids + own.action_ids
        if not following or following[0].prompt_ids[: len(before)] != before:
            return {}
        ids = following[0].prompt_ids[len(before) :]
        start, end = self.context.renderer.observed(own.action_ids, ids)
        return {"following_ids": ids[:end], "num_observed": end - start}

    def turns(self, experience: Experience) -> Iterator[Sample]:
        """Every turn, without annotation; none of an episode that its environment broke."""
        for t, trajectory in enumerate(experience.trajectories):
            if trajectory.failed:
                continue
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
