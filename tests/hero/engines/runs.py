"""Settings of runs with a server, and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hero.config import TrainConfig
from hero.policy import Policy
from tests.hero.short_runs import settings

SHORT: dict[str, Any] = {
    "updates": 2, "rollout": {"tasks_per_update": 2, "max_turns": 2, "max_turn_tokens": 6},
    "eval": {"every": 2, "dev_tasks": 2, "test_tasks": 2},
}  # fmt: skip
TEXTS = ("find a red lamp", "buy blue", "back to search the catalogue please")


def configured(agent: Path, url: str, **changes: Any) -> TrainConfig:
    engine = {"kind": "server", "base_url": url, **changes.pop("engine", {})}
    return settings(agent, engine=engine, **changes)


def prompts(policy: Policy) -> list[list[int]]:
    return [policy.renderer.start([{"role": "user", "content": text}]) for text in TEXTS]
