"""What is watched while a run trains, beside success: does the teacher still know better, does the
reflector still see the faults, is anything left to learn?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hero.algorithms import Algorithm
from hero.config import TrainConfig
from hero.envs.base import Environment, HasDiagnosis
from hero.episodes import derive_seed, rewarded
from hero.evaluation import Probe, agreement, consistency, probe_teacher
from hero.reflection import Reflections
from hero.renderer import Renderer
from hero.sampling import Sampler
from hero.teacher import TeacherWeights
from hero.types import Sample, Trajectory


@dataclass
class Watch:
    """Measures teacher and reflector on finished episodes.

    Raises:
        ValueError: a setting asks for what this world or this reflector cannot give.
    """

    config: TrainConfig
    env: Environment
    algorithm: Algorithm
    reflect: Callable[[list[Trajectory], int], Reflections]
    annotate: Callable[[list[Trajectory], Reflections], list[Sample]]
    teacher: TeacherWeights
    samplers: tuple[Sampler, Sampler]
    """Of the student and of the teacher."""
    renderer: Renderer

    def __post_init__(self) -> None:
        has_rules, reflection = isinstance(self.env, HasDiagnosis), self.config.reflection
        name, mode = type(self.env).__name__, self.config.mode
        if self.config.eval.watch_teacher and not self.judges:
            raise ValueError(
                "eval.watch_teacher needs a teacher and an environment that judges its actions by "
                f"a diagnose method; got mode={mode} and {name}. Leave it off."
            )
        if reflection.min_agreement is None:
            return
        if not self.algorithm.needs_reflection:
            raise ValueError(
                f"reflection.min_agreement={reflection.min_agreement} needs a reflector, and "
                f"mode={mode} has none: leave it at None."
            )
        if not has_rules and reflection.temperature == 0:
            raise ValueError(
                f"reflection.min_agreement compares two reflections, as {name} has no rules "
                "(diagnose), and at temperature 0 they are the same: set "
                "--reflection.temperature 0.7."
            )

    @property
    def judges(self) -> bool:
        """Whether there is a teacher, and a world that can judge what it does."""
        return self.algorithm.distils and isinstance(self.env, HasDiagnosis)

    def lift(self, trajectories: list[Trajectory], seed: int) -> Probe:
        """Teacher lift on played episodes, which are paid as in training."""
        assert isinstance(self.env, HasDiagnosis)
        rewarded(trajectories, self.config.env.reward)
        reflections = self.reflect(trajectories, seed)
        return probe_teacher(
            self.env, trajectories, reflections.diagnoses, self.annotate(trajectories, reflections),
            sampler=self.samplers[0], teacher_sampler=self.samplers[1], weights=self.teacher,
            renderer=self.renderer, max_turn_tokens=self.config.rollout.max_turn_tokens, seed=seed,
        )  # fmt: skip

    def agreement(
        self, trajectories: list[Trajectory], reflections: Reflections, seed: int
    ) -> dict[str, float]:
        """Of the reflector with the rules; without them, if a bound asks for it, with itself."""
        if isinstance(self.env, HasDiagnosis):
            return agreement(self.env, trajectories, reflections.diagnoses)
        if self.config.reflection.min_agreement is None:
            return {}
        again = self.reflect(trajectories, derive_seed(seed, 1)).diagnoses
        return consistency(reflections.diagnoses, again)
