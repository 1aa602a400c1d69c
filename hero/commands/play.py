"""Playing a model without training it; `hero rollout`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from hero import recipes
from hero.checks import from_dict, named_options, refuse_blotted
from hero.commands.base import Command, make_importable, prepare_torch, saved_settings
from hero.config import Count, Dtype, EnvConfig, ModelConfig, NotNegative, RolloutConfig, Settings
from hero.files import check_writable, write_atomic
from hero.models import existing_model
from hero.report.console import Console
from hero.report.tracking import METRICS
from hero.run_folder import played_settings
from hero.types import Trajectory, to_json

if TYPE_CHECKING:  # it loads torch
    from hero.evaluated import EvalFolder
    from hero.policy import Policy


@dataclass(kw_only=True)
class PlayConfig(Settings):
    """Playing a model without training it."""

    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    device: str = "auto"
    """auto, cpu, cuda, …"""
    dtype: Dtype = "auto"
    split: Literal["train", "dev", "test"] = "test"
    """Which tasks."""
    tasks: Count = 100
    """How many tasks of the split, from its start."""
    trials: Count = 1
    """Episodes per task."""
    temperature: NotNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    seed: int = 0


@dataclass(kw_only=True)
class Play(Command):
    """Base of the commands that play a model without training it."""

    recipe: str = ""
    """Recipe that says which environment to play, and with which caps."""
    settings: Annotated[PlayConfig, arg(name="")] = field(default_factory=PlayConfig)

    @abstractmethod
    def models(self) -> list[str]:
        """Folders or hub ids of models, or folders of runs, as they were given."""

    def with_defaults(self) -> Play:
        """With the settings of the first run among the models: all play in one world."""
        data: dict[str, Any] = {}
        for run in map(Path, self.models()):
            if (run / METRICS).is_file() and (run / "best").is_dir():
                saved = saved_settings(run)
                data = played_settings(saved)
                data |= {"tasks": saved["eval"]["test_tasks"] or PlayConfig.tasks}
                break
        if self.recipe:
            recipe = recipes.load_recipe(self.recipe)
            data |= {name: recipe[name] for name in ("env", "rollout") if name in recipe}
        return replace(self, settings=from_dict(data, PlayConfig))

    def played(
        self, model: str, kept: EvalFolder | None = None
    ) -> tuple[list[Trajectory], dict[str, str]]:
        """The episodes of a model, `trials` of each task, and the facts of the environment.

        Those that are `kept` already are not played; the others are added to it.
        """
        config, console = self.settings, Console()
        existing_model(str(weights_of(model)))
        refuse_blotted(named_options(config.env.options))
        make_importable(config.env.name)

        from hero.envs.alarm import set_limit
        from hero.envs.base import make_env
        from hero.envs.border import facts, tasks
        from hero.envs.workers import closing, open_workers
        from hero.episodes import derive_seed, rollout
        from hero.evaluation import trials
        from hero.sampler import HFSampler
        from hero.stages import TEST
        from hero.worked import worked_episodes

        prepare_torch(None, self.debug)
        policy = self.policy(model)
        size = config.rollout.batch_size
        make = partial(make_env, config.env.name, **config.env.options)
        env, timeout = make(), config.rollout.step_timeout
        set_limit(timeout)
        for name, value in (of_world := facts(env)).items():
            console.say(f"{name.replace('_', ' ')}: {value}")
        train, number = tasks(env, "train"), config.env.demonstrations
        most, renderer = config.rollout.max_turns, policy.renderer
        shown, others = worked_episodes(env, train, number, most, renderer)
        chosen = others if config.split == "train" else tasks(env, config.split)
        episodes = trials(chosen[: config.tasks], config.trials)
        if kept:
            episodes = [episode for episode in episodes if episode.id not in kept.done]
        workers = open_workers(config.env.workers, make, env, size, timeout)
        with closing(workers, env, console.say), console.counting(model) as count:
            found = rollout(
                episodes, envs=workers, sampler=HFSampler(policy, size),
                renderer=renderer, config=config.rollout, count=count,
                seed=derive_seed(config.seed, TEST),  # the one a run's own test evaluation has
                temperature=config.temperature, shown=shown,
                ended=partial(kept.add, pieces=renderer.pieces) if kept else lambda episode: None,
                beside=[False] * len(kept.done) if kept else (),
            )  # fmt: skip
        if said := renderer.newly_unknown():
            console.say(said)
        return found, of_world

    def policy(self, model: str) -> Policy:
        from hero.policy import Policy

        config, path = self.settings, str(weights_of(model))
        return Policy.load(ModelConfig(path=path, device=config.device, dtype=config.dtype))


def weights_of(model: str) -> Path:
    """Where the weights of a model are: those that a run has selected, or its best ones."""
    folders = [Path(model) / name for name in ("selected", "best")]
    return next((folder for folder in folders if folder.is_dir()), Path(model))


@dataclass(kw_only=True)
class PlayOne(Play):
    """Base of the commands that play one model."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Folder or hub id of a model, or the folder of a run: its best model, in its environment."""
    output: str = ""
    """File for the results; "" prints only."""

    def models(self) -> list[str]:
        return [self.model]


@dataclass(kw_only=True)
class Rollout(PlayOne):
    """Play episodes of a model and print them, or write them as JSON lines."""

    def run(self) -> None:
        check_writable(self.output, '"group_id"')
        out = Path(self.output).absolute()  # worlds may change the folder one stands in
        (trajectories, _), console = self.played(self.model), Console()
        if self.output:
            write_atomic(out, "".join(to_json(t) + "\n" for t in trajectories))
            console.say(f"{len(trajectories)} trajectories: {self.output}")
            return
        for trajectory in trajectories:
            console.say(f"\n{trajectory.task_id}: {trajectory.instruction}")
            for number, turn in enumerate(trajectory.turns, 1):
                console.say(f"  {number}. {turn.action_text}\n     {turn.observation}")
            console.say(f"  reward {trajectory.reward:.2f}, {trajectory.stop_reason}")
            if trajectory.error:
                console.say(f"  {trajectory.error}")
