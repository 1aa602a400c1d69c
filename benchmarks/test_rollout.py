"""Turns per second of rollouts: ours, and `model.generate` at every turn.

A random Llama of 3.4 million parameters, 8 episodes side by side, answers of 12 tokens and
observations of 40: an agent's episode in small. A round is one rollout of each contestant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.loops import Call, generate_per_turn
from hero.config import ModelConfig, RolloutConfig, ScratchConfig
from hero.envs.shop import ShopEnv
from hero.episodes import Assignment, rollout
from hero.policy import Policy
from hero.sampler import HFSampler
from hero.scratch import build_model, build_tokenizer

if TYPE_CHECKING:
    from benchmarks.loops import Loops

EPISODES, ANSWER, OBSERVATION = 8, 12, 40


class Corridor:
    """Says the same so many times, whatever it is told."""

    system_prompt = "search click buy now then better again " * 8
    workers = "inline"

    def __init__(self, turns: int, observation: int = OBSERVATION, tasks: int = EPISODES) -> None:
        """`observation` is its number of words."""
        self.turns, self.turn, self.observation, self.num_tasks = turns, 0, observation, tasks

    def tasks(self, split: str) -> list[str]:
        return [f"{split} {number}" for number in range(self.num_tasks)]

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        self.turn = 0
        return "search then click", {}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        return "then " * self.observation, 0.0, self.turn == self.turns, False, {}

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(ShopEnv("tiny").vocabulary())
    shape = ScratchConfig(width=256, layers=4, heads=4, context=4096, init_std=0.02)
    return Policy(build_model(shape, tokenizer), tokenizer, ModelConfig(device="auto"))


def contestants(policy: Policy, turns: int) -> dict[str, Call]:
    tasks = Corridor(turns).tasks("train")
    config = RolloutConfig(max_turns=turns, max_turn_tokens=ANSWER, max_episode_tokens=4096)

    def ours() -> dict[str, float]:
        return counted(rollout(
            [Assignment(id=task, group_id=task, task_id=task) for task in tasks],
            envs=[Corridor(turns) for _ in tasks], sampler=HFSampler(policy),
            renderer=policy.renderer, config=config, seed=0,
        ))  # fmt: skip

    def plain(rows: int) -> dict[str, float]:
        envs = [Corridor(turns) for _ in range(rows)]
        return counted(generate_per_turn(policy, envs, tasks, config))

    def counted(played: list[Any]) -> dict[str, float]:
        assert all(len(trajectory.turns) == turns for trajectory in played)
        tokens = sum(trajectory.num_action_tokens for trajectory in played)
        return {"turns": turns * len(played), "tokens": tokens, "rate": turns * len(played)}

    return {
        "hero": ours,
        "generate, all episodes in a batch": lambda: plain(EPISODES),
        "generate, an episode at a time": lambda: plain(1),
    }


@pytest.mark.parametrize("turns", [2, 5, 15, 30])
def test_rollout(turns: int, policy: Policy, loops: Loops) -> None:
    rounds = 3 if turns == 15 else 1
    found = loops.measure(f"rollout, {turns} turns", contestants(policy, turns), rounds)
    if turns == 15:
        assert found["generate, an episode at a time"]["ratio"] < 1 / 3
