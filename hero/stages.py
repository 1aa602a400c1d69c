"""The stages of an update up to its samples: episodes, diagnoses, annotation; also of dev tasks.

What learns from them, counts and saves is the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hero.algorithms import MODES, Experience
from hero.config import TrainConfig
from hero.engines import make_engine
from hero.envs.alarm import set_limit
from hero.envs.base import Environment, make_env
from hero.envs.border import disjoint_tasks
from hero.envs.workers import open_workers
from hero.episodes import assignments_of_update, derive_seed, gold_episodes, rewarded, rollout
from hero.evaluation import Probe, trials
from hero.policy import Policy
from hero.prompts import make_prompts
from hero.ranks import Ranks
from hero.reflection import Reflections, Reflector, make_reflector
from hero.reflection.shuffle import ShuffledReflector
from hero.reflection.verify import VerifiedReflector
from hero.report.console import Console
from hero.sampler import HFSampler
from hero.sampling import Wanted
from hero.state import State
from hero.teacher import TeacherContext, TeacherWeights
from hero.types import Sample, Trajectory
from hero.watch import Watch
from hero.worked import worked_episodes

ROLLOUT, REFLECT, LEARN, DEV, TEST, PROBE = range(6)  # purposes of derived seeds
PURPOSES = {"dev": DEV, "test": TEST}


class Stages:
    """Everything of a run that plays, reflects and annotates, made from its settings."""

    def __init__(
        self, config: TrainConfig, policy: Policy, console: Console,
        environment: Callable[[], Environment] | None = None, reflector: Reflector | None = None,
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        """`environment` and `reflector` take the place of what the settings would make."""
        self.config, self.console, self.renderer = config, console, policy.renderer
        self.ranks = ranks or Ranks()
        size = config.rollout.batch_size
        make = environment or partial(make_env, config.env.name, **config.env.options)
        self.env, timeout = make(), config.rollout.step_timeout
        set_limit(timeout)
        self.workers = open_workers(config.env.workers, make, self.env, size, timeout)
        splits = ["train", "dev", "test"] if config.eval.test_tasks else ["train", "dev"]
        self.tasks = disjoint_tasks(self.env, splits)
        number, most = config.env.demonstrations, config.rollout.max_turns
        shown, self.tasks["train"] = worked_episodes(
            self.env, self.tasks["train"], number, most, self.renderer
        )
        self.teacher = TeacherWeights(policy, config.teacher)
        self.sampler = make_engine(config, policy)
        self.rollout = partial(
            rollout, envs=self.workers, sampler=self.sampler, renderer=self.renderer,
            config=config.rollout, shown=shown, ranks=self.ranks,
        )  # fmt: skip
        teacher_sampler = HFSampler(self.teacher.policy, size, self.ranks)
        many = self.ranks.size > 1  # ranks share what they ask the model that all of them hold
        sampler = HFSampler(policy, size, self.ranks) if many else self.sampler
        prompts = make_prompts(config.prompts)
        context = TeacherContext(config.teacher, self.renderer, prompts)
        self.algorithm = MODES[config.mode](context, config.loss)
        self.reflector = reflector if self.algorithm.needs_reflection else None
        if self.algorithm.needs_reflection and reflector is None:
            self.reflector = make_reflector(
                config.reflection, env=self.env, sampler=sampler, renderer=self.renderer,
                prompts=prompts, teacher_sampler=teacher_sampler,
                teacher_weights=self.teacher.applied,
                context=min(self.sampler.context, self.teacher.policy.context),
            )  # fmt: skip
        self.watch = Watch(
            config, self.env, self.algorithm, self.reflect, self.annotate, self.teacher,
            (sampler, teacher_sampler), self.renderer,
        )  # fmt: skip
        reads: object = self.reflector
        while isinstance(reads, (VerifiedReflector, ShuffledReflector)):
            reads = reads.inner
        self._early = None if many else getattr(reads, "early", None)
        asked = "" if reflector else config.reflection.reflector
        self._asks_own_model = asked in ("self", "teacher")

    def play(self, number: int, state: State) -> list[Trajectory]:
        """The episodes of an update, as many as the budget of turns holds.

        What an episode leaves of the turns set aside for it goes to further ones, so that the
        budget is met to the episode.
        """
        config, played = self.config, list[Trajectory]()
        waiting = assignments_of_update(self.tasks["train"], config.rollout, config.seed, number)
        seed, reading = (derive_seed(config.seed, what, number) for what in (ROLLOUT, REFLECT))

        def ended(trajectory: Trajectory) -> Wanted | None:
            """Episodes are read as soon as they are over."""
            paid = rewarded([trajectory], config.env.reward)[0]
            return self._early(paid, reading) if self._early else None

        while fit := state.affordable(config, sum(len(t.turns) for t in played)):
            if not (batch := waiting[len(played) :][:fit]):
                break
            failed = [t.failed for t in played]
            played += self.rollout(batch, seed=seed, beside=failed, ended=ended)
        return rewarded(played, config.env.reward)

    def reflect(self, trajectories: list[Trajectory], seed: int) -> Reflections:
        if self.reflector is None:
            return Reflections.none(trajectories)
        read = partial(_read, self.reflector, trajectories, seed)
        # All ranks ask the model that they hold, the first one anybody else.
        found = self.ranks.broadcast(read()) if self._asks_own_model else self.ranks.on_first(read)
        trajectories[:], reflections = found
        return reflections

    def annotate(self, trajectories: list[Trajectory], reflections: Reflections) -> list[Sample]:
        tasks = {trajectory.task_id for trajectory in trajectories}
        gold = {}
        if self.algorithm.needs_gold:
            gold = gold_episodes(self.env, tasks, self.config.rollout.max_turns)
        return self.algorithm.samples(
            Experience(trajectories=trajectories, diagnoses=reflections.diagnoses, gold=gold)
        )

    def probe(self) -> Probe | None:
        """Teacher lift on dev episodes; None if nothing is distilled or nobody can judge."""
        if not self.watch.judges:
            return None
        seed = derive_seed(self.config.seed, PROBE)
        tasks = self.tasks["dev"][: self.config.eval.dev_tasks]
        with self.console.counting("probe") as count:
            played = self.rollout(trials(tasks, 1), seed=seed, count=count)
        return self.watch.lift(played, seed)

    def held_out(self, split: str, tasks: int) -> list[Trajectory]:
        config = self.config.eval
        with self.console.counting(f"{split} tasks") as count:
            return self.rollout(
                trials(self.tasks[split][:tasks], config.trials), count=count,
                seed=derive_seed(self.config.seed, PURPOSES[split]), temperature=config.temperature,
            )  # fmt: skip


def _read(
    reflector: Reflector, trajectories: list[Trajectory], seed: int
) -> tuple[list[Trajectory], Reflections]:
    """What a reflector writes, and the episodes, some of which it may mark as failed."""
    return trajectories, reflector.reflect(trajectories, seed)
