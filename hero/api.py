"""The commands as functions: `from hero import train, evaluate, rollout, load_run`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hero.checks import from_dict
from hero.config import ModelConfig, RolloutConfig, TrainConfig
from hero.envs import border
from hero.envs.alarm import set_limit
from hero.envs.base import Environment
from hero.envs.workers import closing, open_workers
from hero.episodes import derive_seed
from hero.episodes import rollout as play
from hero.evaluation import Evaluation, summarise, trials
from hero.policy import Policy
from hero.recipes import load_recipe, merge
from hero.report.tracking import METRICS, read_jsonl
from hero.run_folder import RunFolder
from hero.sampler import HFSampler
from hero.stages import TEST
from hero.trainer import Trainer
from hero.types import Trajectory
from hero.worked import worked_episodes


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left in its folder."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    """One for each update; step 0 is before training."""
    summary: dict[str, Any]
    """Empty if the run has not ended."""

    def policy(self) -> Policy:
        """The selected model of the run: that of its figures, the best one unless it says else."""
        selected = self.folder / "selected"
        path = selected if selected.is_dir() else self.folder / "best"
        return Policy.load(ModelConfig(path=str(path)))


def train(
    settings: TrainConfig | str, output_dir: str | Path, *, changes: dict[str, Any] | None = None,
    **objects: Any,
) -> Run:  # fmt: skip
    """Train; the same as `hero train`, without a word.

    Where a launcher has started several processes, all of them call it.

    Args:
        settings: a `TrainConfig`, or the name of a recipe.
        output_dir: new folder of the run.
        changes: nested settings on top of the recipe, as in a file.
        objects: `environment`, `policy`, `reflector`, `callbacks` and `console` of
            `hero.trainer.Trainer`.

    Raises:
        ValueError: settings that do not go together, or a folder that is not empty.
        hero.trainer.TeacherGate: the teacher does not know better than the student.
    """
    name = settings if isinstance(settings, str) else "train"
    if isinstance(settings, str):
        settings = from_dict(merge(load_recipe(settings), changes or {}))
    elif changes:
        raise ValueError("changes go on top of a recipe: change the TrainConfig itself.")
    RunFolder(Path(output_dir)).check(settings)
    Trainer(settings, Path(output_dir), name, **objects).run()
    return load_run(output_dir)


def load_run(folder: str | Path) -> Run:
    """Read the folder of a run, finished or not.

    Raises:
        OSError: it is not the folder of a run.
    """
    folder = Path(folder)
    summary = folder / "summary.json"
    return Run(
        folder=folder,
        config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        metrics=read_jsonl(folder / METRICS),
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
    )


def rollout(
    policy: Policy,
    environment: Callable[[], Environment],
    tasks: Sequence[str],
    *,
    config: RolloutConfig | None = None,
    trials_per_task: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    demonstrations: int = 0,
) -> list[Trajectory]:
    """Play episodes.

    Args:
        policy: who acts.
        environment: makes an environment, such as its class; at most `config.batch_size` are made.
        tasks: ids of tasks.
        config: caps and sampling.
        trials_per_task: episodes of each task.
        temperature: of the sampling; 0 is greedy.
        seed: the same seed, weights and tasks give the same episodes.
        demonstrations: worked episodes of training tasks before each task, which needs an oracle.

    Raises:
        ValueError: a first prompt already passes `config.max_episode_tokens`.
        hero.types.Fault: the environment raised.
    """
    config = config or RolloutConfig()
    env = environment()
    set_limit(config.step_timeout)
    train = border.tasks(env, "train")
    shown, _ = worked_episodes(env, train, demonstrations, config.max_turns, policy.renderer)
    workers = open_workers("auto", environment, env, config.batch_size, config.step_timeout)
    with closing(workers, env):
        return play(
            trials(tasks, trials_per_task), envs=workers, shown=shown,
            sampler=HFSampler(policy, config.batch_size), renderer=policy.renderer, config=config,
            seed=derive_seed(seed, TEST), temperature=temperature,
        )  # fmt: skip


def evaluate(
    policy: Policy, environment: Callable[[], Environment], tasks: Sequence[str], **options: Any
) -> Evaluation:
    """Success, score and turns on tasks; the options are those of `rollout`."""
    return summarise(rollout(policy, environment, tasks, **options))
