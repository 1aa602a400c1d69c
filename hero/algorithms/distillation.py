"""Self-distillation with hindsight: each mode is a class that says what the teacher sees."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

from hero.algorithms.base import Algorithm, Experience, successful_sibling
from hero.prompts import Hindsight
from hero.types import Sample


class Distillation(Algorithm):
    """Every turn with something to show gets a teacher; the others are left out."""

    @abstractmethod
    def hindsight(self, experience: Experience, trajectory: int, turn: int) -> Hindsight | None:
        """What the teacher of this turn sees; None masks the turn."""

    def weight(self, experience: Experience, trajectory: int, turn: int) -> float:
        """Of a turn that is not masked."""
        return 1.0

    def annotate(self, experience: Experience) -> list[Sample]:
        samples = []
        for sample in self.turns(experience):
            seen = self.hindsight(experience, sample.trajectory, sample.turn)
            if seen is not None:
                sample.privileged_ids = self.context.privileged_ids(seen)
                sample.branch_at = self.context.renderer.branch_at(sample.prompt_ids)
                sample.distill_weight = self.weight(experience, sample.trajectory, sample.turn)
                samples.append(sample)
        return samples


class Hero(Distillation):
    """Next observation, final reward and the turn's diagnosis; turns with a hint. [P]

    `loss.turns` adds clean turns behind observation and reward, as far as the config shows them, if
    something followed: something has to hold what is right. [D]
    """

    needs_reflection = True
    chooses_turns = True
    teacher_saw = "what happened next and the hint"

    def hindsight(self, experience: Experience, trajectory: int, turn: int) -> Hindsight | None:
        diagnosis = experience.diagnoses[trajectory][turn]
        seen = self.context.hindsight(experience.trajectories[trajectory], turn)
        if diagnosis.hint:
            return self.context.diagnosed(seen, diagnosis)
        before = experience.diagnoses[trajectory][:turn]
        joins = {
            "hinted": False,
            "from_first_fault": any(earlier.hint for earlier in before),
            "all": True,
        }
        answered = experience.trajectories[trajectory].turns[turn].observation
        shown = answered and (seen.observation or seen.reward is not None)
        return seen if joins[self.loss.turns] and shown else None

    def weight(self, experience: Experience, trajectory: int, turn: int) -> float:
        hinted = experience.diagnoses[trajectory][turn].hint
        return 1.0 if hinted else self.loss.clean_turn_weight


class ReflectionOnly(Distillation):
    """The diagnosis without observation and reward; turns with a hint. [P]"""

    needs_reflection = True
    teacher_saw = "the hint"

    def hindsight(self, experience: Experience, trajectory: int, turn: int) -> Hindsight | None:
        diagnosis = experience.diagnoses[trajectory][turn]
        return self.context.diagnosed(Hindsight(), diagnosis) if diagnosis.hint else None


class EnvOnly(Distillation):
    """Raw environment feedback: observation and reward; all turns with an observation. [P]"""

    teacher_saw = "what happened next"

    def hindsight(self, experience: Experience, trajectory: int, turn: int) -> Hindsight | None:
        seen = self.context.hindsight(experience.trajectories[trajectory], turn)
        return seen if seen.observation else None


class Terminal(Distillation):
    """Only a sentence on the outcome; all turns. [P]"""

    teacher_saw = "how the episode ended"

    def hindsight(self, experience: Experience, trajectory: int, turn: int) -> Hindsight | None:
        return Hindsight(outcome=experience.trajectories[trajectory].success)


class FullDemo(Distillation):
    """A whole successful episode, a sibling's or the gold one; all turns, if there is one. [P]"""

    needs_gold = True
    teacher_saw = "a successful episode"

    def hindsight(self, experience: Experience, trajectory: int, turn: int) -> Hindsight | None:
        task = experience.trajectories[trajectory].task_id
        shown = successful_sibling(experience, trajectory) or experience.gold.get(task, ())
        return Hindsight(demonstration=shown) if shown else None


class Sdpo(Distillation):
    """A successful sibling if there is one, and the feedback; failed episodes. [L]"""

    teacher_saw = "a successful episode or the environment's feedback"

    def hindsight(self, experience: Experience, trajectory: int, turn: int) -> Hindsight | None:
        own = experience.trajectories[trajectory]
        if own.success:
            return None
        seen = self.context.hindsight(own, turn)
        shown = successful_sibling(experience, trajectory)
        return replace(seen, demonstration=shown) if shown or seen.observation else None
