"""Corrected actions tried in the restored state: what the environment refuses is no correction."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hero.envs import border
from hero.envs.base import Environment
from hero.envs.border import EnvironmentFault
from hero.reflection.base import Reflections, Reflector
from hero.types import Diagnosis, Trajectory


@dataclass(frozen=True, slots=True)
class VerifiedReflector:
    """Masks turns whose corrected action fails, in a state restored by playing the turns before.

    It fails if the environment does not accept it, or if it ends the episode with less reward than
    the episode had. So does one whose state cannot be restored, as something else is observed.
    """

    inner: Reflector
    env: Environment

    def reflect(self, trajectories: Sequence[Trajectory], seed: int) -> Reflections:
        """Diagnose every turn of every trajectory."""
        reflections, started = self.inner.reflect(trajectories, seed), time.perf_counter()
        replayed = 0
        rows: list[list[Diagnosis]] = []
        for trajectory, row in zip(trajectories, reflections.diagnoses, strict=True):
            rows.append([])
            for diagnosis in row:
                if diagnosis.hint and diagnosis.corrected_action:
                    replayed += diagnosis.turn + 1
                    if not self.holds(trajectory, diagnosis):
                        diagnosis = Diagnosis(turn=diagnosis.turn, source=diagnosis.source)
                rows[-1].append(diagnosis)
        stats = replace(
            reflections.stats,
            non_empty=sum(bool(d.hint) for row in rows for d in row),
            replayed=replayed,
            seconds=reflections.stats.seconds + time.perf_counter() - started,
        )
        return Reflections(diagnoses=rows, stats=stats)

    def holds(self, trajectory: Trajectory, diagnosis: Diagnosis) -> bool:
        """Whether the corrected action works in the state of its turn."""
        task, reward = trajectory.task_id, 0.0
        try:
            border.reset(self.env, task)
            for k, turn in enumerate(trajectory.turns[: diagnosis.turn]):
                before = border.step(self.env, turn.action_text, task, k)
                reward += before.reward
                if before.observation != turn.observation:
                    return False
            step = border.step(self.env, diagnosis.corrected_action, task, diagnosis.turn)
        except EnvironmentFault:
            return False
        worse = step.terminated and reward + step.reward < trajectory.reward
        return step.valid and step.parse_ok and not worse
