"""One cell of a study: a run of an arm, judged with its last weights at each budget."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hero.checks import from_dict
from hero.config import TrainConfig
from hero.files import write_atomic
from hero.recipes import merge
from hero.types import Trajectory

NEVER = 1_000_000
PANEL_SEED = 7001
"""Of the sampling in every evaluation: all arms, seeds and budgets meet the same noise."""
DIAGNOSED = 48
"""Dev tasks whose episodes the model diagnoses before and after training."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is run, with nothing that depends on the machine."""

    start: str
    arm: str
    seed: int
    settings: dict[str, Any]
    """The arm's, nested; the learning rate among them."""
    model: str
    """Folder of the start."""
    marks: tuple[int, ...]
    split: str
    tasks: int

    @property
    def name(self) -> str:
        rate = self.settings["optim"]["learning_rate"]
        return f"{self.start}/{self.arm}/{self.split}-lr{rate:g}-seed{self.seed}"


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train and judge; returns the row, which is kept as `folder/rows/NAME.json`.

    The run goes from mark to mark, so each budget is met to the episode, and its last weights are
    judged there on the same tasks with the same noise.
    """
    run = folder / "runs" / cell.name
    row = kept(folder / "rows" / f"{cell.name}.json", partial(_run, cell, run))
    shutil.rmtree(run, ignore_errors=True)
    return row


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds; what is there is not made again."""
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(made, separators=(",", ":")))
    return made


def _run(cell: Cell, run: Path) -> dict[str, Any]:
    from hero.report.console import Console
    from hero.trainer import Trainer

    shutil.rmtree(run, ignore_errors=True)  # of a cell that was interrupted
    seconds = 0.0
    row: dict[str, Any] = {
        "start": cell.start, "arm": cell.arm, "seed": cell.seed, "split": cell.split,
    }  # fmt: skip
    row |= {"learning_rate": cell.settings["optim"]["learning_rate"], "marks": []}
    for mark in cell.marks:
        config: TrainConfig = from_dict(merge(cell.settings, {
            "seed": cell.seed, "threads": 1, "model": {"path": cell.model}, "updates": NEVER,
            "max_env_turns": mark, "resume": "auto", "save_every": NEVER, "save_trajectories": 0,
            "output_dir": str(run), "max_idle_updates": 0,
            "eval": {"every": NEVER, "dev_tasks": 8, "test_tasks": 0, "rescues": 0,
                     "stop_drop": 1.0, "min_teacher_lift": None},
        }))  # fmt: skip
        trainer = Trainer(config, run, cell.arm, Console(io.StringIO(), terminal=False))
        began = time.process_time()
        summary = trainer.run()
        seconds += time.process_time() - began
        row["marks"].append({
            "turns": summary["env_turns"], "stopped": summary["stopped"],
            "updates": trainer.state.update, "generated_tokens": trainer.state.generated_tokens,
            "reflection_tokens": trainer.state.reflection_tokens, "cpu_seconds": round(seconds, 2),
            **judge(trainer.policy, config, cell.split, cell.tasks),
        })  # fmt: skip
    if cell.split == "test":
        number = min(DIAGNOSED, cell.tasks)
        row["diagnosing"] = diagnosing(trainer.policy, config, cell.model, number)
    row["training"] = _curve(run)
    return row


class Panel:
    """The first `number` tasks of a split, which all policies play with the same noise."""

    def __init__(self, config: TrainConfig, split: str, number: int) -> None:
        from hero.envs import border
        from hero.envs.base import make_env

        self.config = config
        self.environment = partial(make_env, config.env.name, **config.env.options)
        self.env = self.environment()
        self.tasks = border.tasks(self.env, split)[:number]

    def played(self, policy: Any) -> list[Trajectory]:
        from hero.api import rollout

        return rollout(
            policy, self.environment, self.tasks, config=self.config.rollout, seed=PANEL_SEED,
            demonstrations=self.config.env.demonstrations,
        )  # fmt: skip


def judge(policy: Any, config: TrainConfig, split: str, tasks: int) -> dict[str, Any]:
    """Success (a digit a task), score and turns of a policy on the first tasks of a split."""
    from hero.evaluation import summarise

    panel = Panel(config, split, tasks)
    found = summarise(panel.played(policy))
    per_task = [found.per_task[task] for task in panel.tasks]
    return {
        "success": "".join(str(int(task["success"])) for task in per_task),
        "score": round(found.score, 4),
        "task_turns": [int(task["turns"]) for task in per_task],
    }


def diagnosing(policy: Any, config: TrainConfig, start: str, number: int) -> dict[str, float]:
    """What was not trained: how well a model itself diagnoses the start's episodes.

    On so many (`number`) dev tasks; shares of turns: `parsed`, and `recall`, `precision` and
    `same_action` of the rules' faults. {} in a world without rules.
    """
    from hero.config import ModelConfig
    from hero.envs.base import HasDiagnosis
    from hero.episodes import rewarded
    from hero.evaluation import agreement
    from hero.policy import Policy
    from hero.prompts import make_prompts
    from hero.reflection import make_reflector
    from hero.sampler import HFSampler

    panel = Panel(config, "dev", number)
    if not isinstance(panel.env, HasDiagnosis):
        return {}
    player = Policy.load(ModelConfig(path=start, device=config.model.device))
    episodes = rewarded(panel.played(player), config.env.reward)
    reflector = make_reflector(
        replace(config.reflection, reflector="self", shuffle_hints="off"), env=panel.env,
        sampler=HFSampler(policy, number), renderer=policy.renderer, context=policy.context,
        prompts=make_prompts(config.prompts), teacher_weights=_no_teacher,
    )  # fmt: skip
    read = reflector.reflect(episodes, PANEL_SEED)
    found = {"parsed": read.stats.read / max(1, read.stats.asked)}
    for name, value in agreement(panel.env, episodes, read.diagnoses).items():
        found[name.removeprefix("agreement/")] = value
    return {name: round(value, 4) for name, value in found.items()}


def gap(
    start: str, arm: str, settings: dict[str, Any], model: str, tasks: int, folder: Path
) -> None:
    """What the arm's teacher knows better before training: `folder/gaps/START/ARM.json`.

    Measured on the start's episodes of so many dev `tasks`.
    """

    def measured() -> dict[str, Any]:
        from hero.config import ModelConfig
        from hero.policy import Policy
        from hero.probe import measure

        config: TrainConfig = from_dict(settings)
        policy = Policy.load(ModelConfig(path=model, device=config.model.device))
        panel = Panel(config, "dev", tasks)
        played = panel.played(policy)
        found, _ = measure(policy, config, panel.env, played, PANEL_SEED, max_turns=8 * tasks)
        return {"start": start, "arm": arm} | (found.figures if found else {})

    kept(folder / "gaps" / start / f"{arm}.json", measured)


def _no_teacher() -> Any:
    raise AssertionError("the reflector is the model itself")


KEPT = ("rewards/mean", "rollout/success", "rollout/turns_mean", "reflection/non_empty_rate",
        "frac_reward_zero_std", "loss", "entropy", "completions/mean_length", "divergence/auc",
        "divergence/pushed_down", "env_turns")  # fmt: skip


def _curve(run: Path) -> list[dict[str, float]]:
    from hero.report.tracking import METRICS, read_jsonl

    lines = read_jsonl(run / METRICS)
    return [{k: round(line[k], 4) for k in KEPT if k in line} for line in lines if line.get("step")]
