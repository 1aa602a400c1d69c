"""`hero eval` and `hero rollout`."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from hero import recipes
from hero.checks import from_dict
from hero.commands.base import Command, make_importable, prepare_torch, saved_settings
from hero.config import Count, Dtype, EnvConfig, ModelConfig, NotNegative, RolloutConfig, Settings
from hero.files import write_atomic
from hero.report.console import Console
from hero.types import Trajectory, to_json

if TYPE_CHECKING:  # it loads torch
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

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Folder or hub id of a model, or the folder of a run: its best model, in its environment."""
    recipe: str = ""
    """Recipe that says which environment to play, and with which caps."""
    output: str = ""
    """File for the results; "" prints only."""
    settings: Annotated[PlayConfig, arg(name="")] = field(default_factory=PlayConfig)

    def __post_init__(self) -> None:
        self.facts: dict[str, str] = {}

    def with_defaults(self) -> Play:
        run = Path(self.model)
        if (run / "config.json").is_file() and (run / "best").is_dir():
            saved = saved_settings(run)
            data = {name: saved[name] for name in ("env", "rollout", "seed")}
            data |= {name: saved["eval"][name] for name in ("temperature", "trials")}
            data |= {name: saved["model"][name] for name in ("device", "dtype")}
            data |= {"tasks": saved["eval"]["test_tasks"] or PlayConfig.tasks}
        else:
            data = {}
        if self.recipe:
            recipe = recipes.load_recipe(self.recipe)
            data |= {name: recipe[name] for name in ("env", "rollout") if name in recipe}
        return replace(self, settings=from_dict(data, PlayConfig))

    def _played(self) -> list[Trajectory]:
        """The episodes: `trials` of each task."""
        config = self.settings
        make_importable(config.env.name)

        from hero.envs.base import make_env
        from hero.envs.border import facts, tasks
        from hero.envs.workers import open_workers
        from hero.episodes import derive_seed, rollout
        from hero.evaluation import trials
        from hero.sampler import HFSampler
        from hero.stages import TEST
        from hero.worked import worked_episodes

        prepare_torch(None, self.debug)
        Path(self.output).parent.mkdir(parents=True, exist_ok=True)  # not after an hour of work
        policy = self._policy()
        size = config.rollout.batch_size
        make = partial(make_env, config.env.name, **config.env.options)
        env, timeout = make(), config.rollout.step_timeout
        self.facts = facts(env)
        for name, value in self.facts.items():
            Console().say(f"{name.replace('_', ' ')}: {value}")
        train, number = tasks(env, "train"), config.env.demonstrations
        most = config.rollout.max_turns
        shown, others = worked_episodes(env, train, number, most, policy.renderer)
        chosen = others if config.split == "train" else tasks(env, config.split)
        workers = open_workers(config.env.workers, make, env, size, timeout)
        with closing(workers), Console().counting("playing") as count:
            return rollout(
                trials(chosen[: config.tasks], config.trials), envs=workers,
                sampler=HFSampler(policy, size),
                renderer=policy.renderer, config=config.rollout, count=count,
                seed=derive_seed(config.seed, TEST),  # the one a run's own test evaluation has
                temperature=config.temperature, shown=shown,
            )  # fmt: skip

    def _policy(self) -> Policy:
        from hero.policy import Policy

        config = self.settings
        folders = [Path(self.model) / name for name in ("selected", "best")]
        path = next((str(folder) for folder in folders if folder.is_dir()), self.model)
        return Policy.load(ModelConfig(path=path, device=config.device, dtype=config.dtype))


@dataclass(kw_only=True)
class Eval(Play):
    """Success, score and turns of a model on held-out tasks.

    For a run: its own test tasks with its own settings, so that the figures are those of its
    summary. The interval is a bootstrap over tasks.
    """

    def run(self) -> None:
        trajectories = self._played()

        from hero.evaluation import summarise
        from hero.report.comparison import bootstrap_interval

        result, config = summarise(trajectories), self.settings
        low, high = bootstrap_interval([task["success"] for task in result.per_task.values()])
        Console().say(
            f"{self.model} on {len(result.per_task)} {config.split} tasks x {config.trials}: "
            f"success {result.success:.1%} (95 % interval {low:.1%} to {high:.1%}), "
            f"score {result.score:.3f}, average turns {result.turns:.1f}"
        )
        if self.output:
            write_atomic(Path(self.output), json.dumps(result.to_dict() | self.facts, indent=1))


@dataclass(kw_only=True)
class Rollout(Play):
    """Play episodes of a model and print them, or write them as JSON lines."""

    def run(self) -> None:
        trajectories, console = self._played(), Console()
        if self.output:
            write_atomic(Path(self.output), "".join(to_json(t) + "\n" for t in trajectories))
            console.say(f"{len(trajectories)} trajectories: {self.output}")
            return
        for trajectory in trajectories:
            console.say(f"\n{trajectory.task_id}: {trajectory.instruction}")
            for number, turn in enumerate(trajectory.turns, 1):
                console.say(f"  {number}. {turn.action_text}\n     {turn.observation}")
            console.say(f"  reward {trajectory.reward:.2f}, {trajectory.stop_reason}")
            if trajectory.error:
                console.say(f"  {trajectory.error}")
