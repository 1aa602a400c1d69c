"""Control experiments: every hint is replaced by a wrong one. They must lose the gain.

What is left if they do not is the effect of *any* text in the teacher's context, not of the right
one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hero.reflection.base import Reflections, Reflector
from hero.types import Diagnosis, Trajectory


def shuffle_hints(
    diagnoses: Sequence[Sequence[Diagnosis]],
    trajectories: Sequence[Trajectory],
    seed: int,
    kind: str = "tasks",
) -> list[list[Diagnosis]]:
    """Replace every diagnosis that has a hint by a wrong one, drawn at random.

    Turns with a hint keep one and turns without stay without, so that the same tokens are trained.
    Only where there is nothing to take is a hint removed: the right one must not reach the control.

    Args:
        diagnoses: one for each turn of each trajectory.
        trajectories: what they are of.
        seed: of the draws.
        kind: "tasks": one that has a hint for another task; "causes": one that also has another
            failure cause, since in a world with one frequent fault most hints fit most tasks;
            "unrelated": no diagnosis, the instruction of another task as hint.
    """
    tasks = sorted({trajectory.task_id for trajectory in trajectories})
    rng = random.Random(seed)
    instructions = {t.task_id: t.instruction for t in trajectories}
    donors: dict[str, list[Diagnosis]] = {
        task: [
            diagnosis
            for trajectory, of_turns in zip(trajectories, diagnoses, strict=True)
            for diagnosis in of_turns
            if diagnosis.hint and trajectory.task_id != task
        ]
        for task in tasks
    }

    def replacement(diagnosis: Diagnosis, task: str) -> Diagnosis:
        if not diagnosis.hint:
            return diagnosis
        if kind == "unrelated":
            if not (others := [name for name in tasks if name != task]):
                return Diagnosis(turn=diagnosis.turn)
            other = rng.choice(others)
            return Diagnosis(turn=diagnosis.turn, hint=instructions[other], source=diagnosis.source)
        cause = diagnosis.failure_cause if kind == "causes" else None
        wrong = [donor for donor in donors[task] if donor.failure_cause != cause]
        if not wrong:
            return Diagnosis(turn=diagnosis.turn)
        return replace(rng.choice(wrong), turn=diagnosis.turn)

    return [
        [replacement(diagnosis, trajectory.task_id) for diagnosis in of_turns]
        for trajectory, of_turns in zip(trajectories, diagnoses, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class ShuffledReflector:
    """A reflector whose hints go to the wrong turns; statistics stay as they were."""

    inner: Reflector
    kind: str = "tasks"

    def reflect(self, trajectories: Sequence[Trajectory], seed: int) -> Reflections:
        reflections = self.inner.reflect(trajectories, seed)
        shuffled = shuffle_hints(reflections.diagnoses, trajectories, seed, self.kind)
        return replace(reflections, diagnoses=shuffled)
