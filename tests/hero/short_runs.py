"""Small runs for tests: settings, how to start and to resume them, what they leave."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hero.checkpoint import checksum
from hero.checks import from_dict
from hero.cli import main
from hero.config import ScratchConfig, TrainConfig
from hero.envs.shop import ShopEnv
from hero.report.console import Console
from hero.report.tracking import read_jsonl
from hero.scratch import build_model
from hero.trainer import Trainer


def saved(shape: ScratchConfig, tokenizer: Any, folder: Path, seed: int = 0) -> Path:
    """The folder, with a random model of this shape and its tokenizer in it."""
    torch.manual_seed(seed)
    build_model(shape, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SMALL = [
    "--prompts", "compact", "--env.options", "profile", "tiny", "--rollout.tasks-per-update", "16",
    "--rollout.batch-size", "16", "--rollout.max-turns", "4", "--rollout.max-turn-tokens", "4",
    "--reflection.reflector", "rules", "--eval.dev-tasks", "2", "--eval.test-tasks", "2",
    "--updates", "1", "--model.device", "cpu",
]  # fmt: skip
"""Options of a short `hero train` of the shipped agent."""


def settings(model_path: Path, **changes: Any) -> TrainConfig:
    data: dict[str, Any] = {
        "prompts": "compact",
        "model": {"path": str(model_path), "device": "cpu"},
        "env": {"name": "shop", "options": {"profile": "tiny"}},
        "rollout": {"tasks_per_update": 4, "max_turns": 3, "max_turn_tokens": 6, "batch_size": 4},
        "reflection": {"reflector": "rules"},
        "teacher": {"max_privileged_tokens": 500},
        "optim": {"learning_rate": 1e-3},
        "eval": {"every": 2, "dev_tasks": 4, "test_tasks": 4},
        "updates": 4,
        "save_every": 1,
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and key in data else value
    return from_dict(data)


def trainer(config: TrainConfig, run_dir: Path) -> Trainer:
    return Trainer(config, run_dir, "test", Console(io.StringIO()))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoint" / "student.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def left(run: Path) -> dict[str, Any]:
    """What a run leaves, without what the clock says."""
    metrics = [
        {name: value for name, value in line.items() if "second" not in name}
        for line in read_jsonl(run / "metrics.jsonl")
    ]
    records = [
        (r["update"], r["split"], r["id"], r["reward"], [t["action_text"] for t in r["turns"]])
        for r in read_jsonl(run / "trajectories.jsonl")
    ]
    best = checksum(run / "best" / "model.safetensors")
    summary = json.loads((run / "summary.json").read_text())
    return {
        "metrics": metrics, "records": records, "best": best,
        "after": summary["after"], "before": summary["before"],
    }  # fmt: skip


class Countdown(ShopEnv):
    """A shop in which Ctrl-C arrives at some step."""

    steps_left = 10**9

    def step(self, text: str) -> Any:
        Countdown.steps_left -= 1
        if Countdown.steps_left == 0:
            raise KeyboardInterrupt
        return super().step(text)


def config_of(model_path: Path, **changes: Any) -> Any:
    small = {"tasks_per_update": 2, "max_turns": 2, "max_turn_tokens": 6, "batch_size": 4}
    config = settings(
        model_path, updates=2, rollout=small, save_every=2,
        eval={"every": 1, "dev_tasks": 2, "test_tasks": 2}, **changes,
    )  # fmt: skip
    config.env.name = f"{__name__}:Countdown"
    return config


def go_on(model_path: Path, run: Path) -> None:
    trainer(config_of(model_path, resume="auto"), run).run()


def train_eval_and_rollout(world: list[str], model: str) -> None:
    """`hero train`, `eval` and `rollout` of a model in a world, in the present folder."""
    caps = "--rollout.max-turns 2 --rollout.max-turn-tokens 8 --rollout.batch-size 2"
    caps += " --rollout.max-episode-tokens 12000"
    train = "--mode env_only --updates 1 --threads 1 --rollout.tasks-per-update 2"
    train += " --eval.dev-tasks 1 --eval.test-tasks 0 --output-dir run --model.path"
    assert main(["train", *world, *caps.split(), *train.split(), model]) == 0
    assert read_jsonl(Path("run", "metrics.jsonl"))[-1]["optim/steps"] == 1
    played = [*world, *caps.split(), "--tasks", "1"]
    assert main(["eval", model, "run", *played, "--output", "evals"]) == 0
    assert len(list(Path("evals").glob("*/eval.json"))) == 2
    assert main(["rollout", "run", *played, "--output", "episodes.jsonl"]) == 0
    [episode] = read_jsonl(Path("episodes.jsonl"))
    assert episode["turns"] and episode["stop_reason"] != "env_error"
