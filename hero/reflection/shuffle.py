"""The control experiment: every hint is replaced by one from another task. It must lose the gain.

What is left if it does not is the effect of *any* text in the teacher's context, not of the right
one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hero.reflection.base import Reflections, Reflector
from hero.types import Diagnosis, Trajectory


def shuffle_hints(
    diagnoses: Sequence[Sequence[Diagnosis]], trajectories: Sequence[Trajectory], seed: int
) -> list[list[Diagnosis]]:
    """Replace every diagnosis that has a hint by a random one that has a hint for another task.

    Turns with a hint keep one and turns without stay without, so that the same tokens are trained.
    Only where no other task has a hint at all is a hint removed: the right one must not reach the
    control.

    Raises:
        ValueError: the trajectories are of fewer than two tasks.
    """
    tasks = sorted({trajectory.task_id for trajectory in trajectories})
    if len(tasks) < 2:
        raise ValueError(
            f"shuffle_hints takes hints from other tasks, but the batch has only {tasks}: "
            "set --rollout.tasks-per-update to 2 or more."
        )
    donors: dict[str, list[Diagnosis]] = {
        task: [
            diagnosis
            for trajectory, of_turns in zip(trajectories, diagnoses, strict=True)
            for diagnosis in of_turns
            if diagnosis.hint and trajectory.task_id != task
        ]
        for task in tasks
    }
    rng = random.Random(seed)

    def replacement(diagnosis: Diagnosis, task: str) -> Diagnosis:
        if not diagnosis.hint:
            return diagnosis
        if not donors[task]:
            return Diagnosis(turn=diagnosis.turn)
        return replace(rng.choice(donors[task]), turn=diagnosis.turn)

    return [
        [replacement(diagnosis, trajectory.task_id) for diagnosis in of_turns]
        for trajectory, of_turns in zip(trajectories, diagnoses, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class ShuffledReflector:
    """A reflector whose hints go to the wrong tasks; statistics stay as they were."""

    inner: Reflector

    def reflect(self, trajectories: Sequence[Trajectory], seed: int) -> Reflections:
        reflections = self.inner.reflect(trajectories, seed)
        shuffled = shuffle_hints(reflections.diagnoses, trajectories, seed)
        return replace(reflections, diagnoses=shuffled)
