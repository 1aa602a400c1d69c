"""Self-distillation with hindsight: one class a mode, which says what the teacher of a turn
sees."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

from hero.algorithms.base import Algorithm, Episodes, successful_sibling
from hero.prompts import Hindsight
from hero.types import Sample


class Distillation(Algorithm):
    """Every turn with something to show gets a teacher block and weight 1; the others are left
    out."""

    @abstractmethod
    def hindsight(self, episodes: Episodes, trajectory: int, turn: int) -> Hindsight | None:
        """What the teacher of this turn sees; None masks the turn."""

    def annotate(self, episodes: Episodes) -> list[Sample]:
        samples = []
        for t, trajectory in enumerate(episodes.trajectories):
            for k in range(len(trajectory.turns)):
                seen = self.hindsight(episodes, t, k)
                if seen is None:
                    continue
                sample = self.sample(episodes, t, k)
                sample.block_ids = self.context.block_ids(seen)
                sample.branch_at = self.context.renderer.branch_at(sample.prompt_ids)
                sample.distill_weight = 1.0
                samples.append(sample)
        return samples


class Hero(Distillation):
    """The paper's teacher: next observation, final reward and the turn's diagnosis; turns with a
    hint. [P]"""

    needs_reflection = True

    def hindsight(self, episodes: Episodes, trajectory: int, turn: int) -> Hindsight | None:
        diagnosis = episodes.diagnoses[trajectory][turn]
        if not diagnosis.hint:
            return None
        seen = self.context.hindsight(episodes.trajectories[trajectory], turn)
        return self.context.diagnosed(seen, diagnosis)


class ReflectionOnly(Distillation):
    """The diagnosis without observation and reward; turns with a hint. [P]"""

    needs_reflection = True

    def hindsight(self, episodes: Episodes, trajectory: int, turn: int) -> Hindsight | None:
        diagnosis = episodes.diagnoses[trajectory][turn]
        return self.context.diagnosed(Hindsight(), diagnosis) if diagnosis.hint else None


class EnvOnly(Distillation):
    """Raw environment feedback: observation and reward; all turns with an observation. [P]"""

    def hindsight(self, episodes: Episodes, trajectory: int, turn: int) -> Hindsight | None:
        seen = self.context.hindsight(episodes.trajectories[trajectory], turn)
        return seen if seen.observation else None


class Terminal(Distillation):
    """Only a sentence on the outcome; all turns. [P]"""

    def hindsight(self, episodes: Episodes, trajectory: int, turn: int) -> Hindsight | None:
        return Hindsight(outcome=episodes.trajectories[trajectory].success)


class FullDemo(Distillation):
    """A whole successful episode, a sibling's or the gold one; all turns, if there is one. [P]"""

    needs_gold = True

    def hindsight(self, episodes: Episodes, trajectory: int, turn: int) -> Hindsight | None:
        task = episodes.trajectories[trajectory].task_id
        shown = successful_sibling(episodes, trajectory) or episodes.gold.get(task, ())
        return Hindsight(demonstration=shown) if shown else None


class Sdpo(Distillation):
    """SDPO's teacher: a successful sibling if there is one, and the feedback; failed episodes.
    [L]"""

    def hindsight(self, episodes: Episodes, trajectory: int, turn: int) -> Hindsight | None:
        own = episodes.trajectories[trajectory]
        if own.success:
            return None
        seen = self.context.hindsight(own, turn)
        shown = successful_sibling(episodes, trajectory)
        return replace(seen, demonstration=shown) if shown or seen.observation else None
