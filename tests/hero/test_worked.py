"""Worked episodes before a task. Oracle: the tokenizer's own chat template on the conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_trainer import settings, trainer

from hero.config import RolloutConfig
from hero.envs.shop import ShopEnv
from hero.episodes import Assignment, rollout
from hero.renderer import Renderer
from hero.report.tracking import read_jsonl
from hero.targets import Scripted
from hero.types import StopReason
from hero.worked import opening, worked_episodes


@pytest.fixture(scope="module")
def shop() -> ShopEnv:
    return ShopEnv("small", observation="compact")


def test_they_are_chat_turns_of_the_template(renderer: Renderer, shop: ShopEnv) -> None:
    shown, others = worked_episodes(shop, shop.tasks("train"), 2, 8, renderer)
    messages = [{"role": "system", "content": "rules"}]
    for task in shop.tasks("train")[:2]:
        observation, _ = shop.reset(task)
        ended = False
        while not ended:
            action = shop.oracle()
            messages += [
                {"role": "user", "content": observation},
                {"role": "assistant", "content": action},
            ]
            observation, reward, ended, *_ = shop.step(action)
        assert reward == 1.0
    messages.append({"role": "user", "content": "the task"})
    whole = renderer.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert renderer.decode(opening(renderer, "rules", "the task", shown)) == renderer.decode(
        renderer.tokenizer.encode(whole, add_special_tokens=False)
    )
    assert opening(renderer, "rules", "the task", shown) == renderer.tokenizer.encode(
        whole, add_special_tokens=False
    )
    assert others == shop.tasks("train")[2:]


def test_without_any_nothing_changes(renderer: Renderer, shop: ShopEnv) -> None:
    shown, others = worked_episodes(shop, shop.tasks("train"), 0, 8, renderer)
    assert shown == [] and others == shop.tasks("train")
    assert opening(renderer, "", "see", shown) == renderer.start(
        [{"role": "user", "content": "see"}]
    )


def test_every_prompt_of_an_episode_begins_with_them(renderer: Renderer, shop: ShopEnv) -> None:
    """And they count: the same caps without them hold more turns."""
    shown, others = worked_episodes(shop, shop.tasks("train"), 1, 8, renderer)

    def play(cap: int, shown: Any) -> Any:
        [trajectory] = rollout(
            [Assignment(id="a", group_id="a", task_id=others[0])], envs=[shop],
            sampler=Scripted(shop.oracle, renderer), renderer=renderer, seed=0, shown=shown,
            config=RolloutConfig(max_episode_tokens=cap, max_turn_tokens=50),
        )  # fmt: skip
        return trajectory

    with_it, without = play(10**5, shown), play(10**5, ())
    extra = len(with_it.turns[0].prompt_ids) - len(without.turns[0].prompt_ids)
    assert with_it.success and extra > 100
    for one, other in zip(with_it.turns, without.turns, strict=True):
        assert one.prompt_ids[: len(with_it.turns[0].prompt_ids)] == with_it.turns[0].prompt_ids
        assert len(one.prompt_ids) - len(other.prompt_ids) == extra
    cap = len(without.turns[-1].prompt_ids) + 50
    assert play(cap, ()).success
    assert play(cap + extra - 1, shown).stop_reason is StopReason.MAX_TOKENS


class Clueless(ShopEnv):
    """Its oracle never gets anywhere."""

    def oracle(self) -> str:
        return "search[nothing]"


@pytest.mark.parametrize("world", ["Clueless", "Silent"])
def test_who_cannot_demonstrate_is_told(renderer: Renderer, world: str) -> None:
    env: Any = Clueless("tiny") if world == "Clueless" else object()
    tasks = ShopEnv("tiny").tasks("train")[:3]
    message = "solves 0 of 3 .* within 8 turns" if world == "Clueless" else "object has none"
    with pytest.raises(ValueError, match=message):
        worked_episodes(env, tasks, 1, 8, renderer)


def test_a_run_with_worked_episodes(model_path: Path, tmp_path: Path) -> None:
    config = settings(
        model_path, env={"demonstrations": 2}, updates=1, rollout={"max_turns": 5},
        eval={"dev_tasks": 2, "test_tasks": 2},
    )  # fmt: skip
    run = trainer(config, tmp_path)
    assert run.stages.tasks["train"] == ShopEnv("tiny").tasks("train")[2:]
    run.run()
    records = read_jsonl(tmp_path / "trajectories.jsonl")
    assert {record["split"] for record in records} == {"before", "train", "after"}
    first = run.stages.rollout(
        [Assignment(id="a", group_id="a", task_id=run.stages.tasks["dev"][0])], seed=0
    )
    shown = run.policy.renderer.decode(first[0].turns[0].prompt_ids)
    assert shown.count("click[buy now]") == 2
