"""The functions of `hero`: objects in the place of settings, nothing printed or loaded early."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hero import evaluate, load_run, rollout, train
from hero.checks import from_dict
from hero.config import ModelConfig, RolloutConfig, TrainConfig
from hero.envs.shop import ShopEnv
from hero.policy import Policy
from hero.reflection import Reflections
from hero.trainer import Trainer
from hero.types import Diagnosis, Trajectory


class OneTask(ShopEnv):
    def tasks(self, split: str) -> list[str]:
        return super().tasks(split)[:1]


class FirstTurn:
    """Hints at the first turn of every episode."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def reflect(self, trajectories: Sequence[Trajectory], seed: int) -> Reflections:
        self.read += [trajectory.task_id for trajectory in trajectories]
        diagnoses = [
            [Diagnosis(turn=k, hint="" if k else "search dress") for k in range(len(t.turns))]
            for t in trajectories
        ]
        return replace(Reflections.none(trajectories), diagnoses=diagnoses)


def settings(**changes: Any) -> TrainConfig:
    return from_dict(
        {
            "prompts": "compact",
            "updates": 2,
            "rollout": {"tasks_per_update": 2, "batch_size": 2, "max_turns": 2},
            "eval": {"dev_tasks": 1, "test_tasks": 1},
        }
        | changes
    )


def test_nothing_is_loaded_with_hero() -> None:
    code = "import sys, hero; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_from_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, reflector = Policy.load(ModelConfig(path="tiny-shop", device="cpu")), FirstTurn()
    heard: list[int] = []
    run = train(
        settings(), tmp_path / "run", environment=OneTask, policy=policy, reflector=reflector,
        callbacks=[lambda number, metrics: heard.append(number)],
    )  # fmt: skip
    assert heard == [1, 2]
    [task] = OneTask().tasks("train")
    assert reflector.read.count(task) == 4  # two episodes in each of two updates
    assert run == load_run(run.folder)
    assert [line["step"] for line in run.metrics] == [0, 1, 2]
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="already holds a run"):
        train(settings(), run.folder, environment=OneTask, policy=policy)


def test_a_played_model_is_judged_as_its_run_judged_it(tmp_path: Path) -> None:
    config = settings(updates=1, mode="env_only", model={"path": "tiny-shop", "device": "cpu"})
    summary = Trainer(config, tmp_path).run()
    tasks = ShopEnv().tasks("test")[:1]
    policy = load_run(tmp_path).policy()
    again = evaluate(policy, ShopEnv, tasks, config=config.rollout)
    assert again.to_dict() == summary["after"]


def test_trials_and_caps_of_a_rollout() -> None:
    policy = Policy.load(ModelConfig(path="tiny-shop", device="cpu"))
    caps = RolloutConfig(batch_size=3, max_turns=1)
    tasks = ShopEnv().tasks("dev")[:2]
    played = rollout(policy, ShopEnv, tasks, config=caps, trials_per_task=2)
    assert [t.task_id for t in played] == [*tasks, *tasks]
    assert all(len(t.turns) == 1 for t in played)
