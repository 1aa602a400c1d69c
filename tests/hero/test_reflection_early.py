"""Episodes are read as soon as they are over. Oracle: a world that waits until one was read."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from endpoint_helpers import BARE, completion
from short_runs import left, settings, trainer

from hero.config import ReflectionConfig, RolloutConfig
from hero.envs.workers import Threads
from hero.episodes import Assignment, rollout
from hero.policy import Policy
from hero.prompts import StandardPrompts
from hero.reflection import Endpoint, ModelReflector
from hero.reflection.models import OwnModel
from hero.sampler import HFSampler
from hero.sampling import Completion, Wanted
from hero.types import Trajectory

read = threading.Event()
CONFIG = RolloutConfig(max_turns=2, max_turn_tokens=6, max_episode_tokens=600)
TASKS = ("waits", "quick", "quick too", "quickest", "fine")


class Waiting:
    """The end of the task "waits" comes when something was read, that of the others at once."""

    system_prompt = "Go on."

    def tasks(self, split: str) -> list[str]:
        return list(TASKS)

    def reset(self, task_id: str) -> Any:
        self.task = task_id
        return f"begin {task_id}", {}

    def step(self, text: str) -> Any:
        in_time = self.task != "waits" or read.wait(20)
        return "end", float(in_time), True, False, {}

    def close(self) -> None: ...


def play(policy: Policy, reflector: ModelReflector, done: bool) -> list[Trajectory]:
    def ended(trajectory: Trajectory) -> Wanted | None:
        wanted = reflector.early(trajectory, 7)
        return replace(wanted, done=told(wanted)) if wanted and done else wanted

    def told(wanted: Wanted) -> Any:
        def tell(answer: Completion) -> None:
            wanted.done(answer)
            read.set()

        return tell

    read.clear()
    workers = Threads(Waiting, 2, 30)
    played = rollout(
        [Assignment(id=task, group_id=task, task_id=task) for task in TASKS],
        envs=workers, sampler=HFSampler(policy), renderer=policy.renderer, config=CONFIG, seed=0,
        ended=ended,
    )  # fmt: skip
    workers.close()
    return played


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_student_reads_while_another_episode_goes_on(
    policy: Policy, temperature: float
) -> None:
    config = ReflectionConfig(max_tokens=12, temperature=temperature)

    def make() -> ModelReflector:
        model = OwnModel(HFSampler(policy), policy.renderer, config)
        return ModelReflector(model, config, StandardPrompts(), policy.renderer, rules="be kind")

    reflector = make()
    played = play(policy, reflector, done=True)
    assert [t.reward for t in played] == [1.0] * 5  # "waits" as well
    requests = [reflector._request(trajectory) for trajectory in played]
    early, late = reflector.model.answer(requests, 7), make().model.answer(requests, 7)
    assert all(answer.num_tokens for answer in early)
    if temperature == 0:
        assert early == late
    again = make()
    assert [t.turns for t in play(policy, again, done=True)] == [t.turns for t in played]
    assert again.model.answer(requests, 7) == early
    assert reflector.model.answer(requests, 7) == late  # nothing is kept


def test_an_endpoint_reads_while_an_episode_goes_on(policy: Policy, endpoint: Any) -> None:
    def reply(_: dict[str, Any]) -> tuple[int, str, bytes]:
        read.set()
        return completion(BARE, 7)

    endpoint.reply = reply
    config = ReflectionConfig(reflector="openai", base_url=endpoint.url, model="m")
    reflector = ModelReflector(
        Endpoint(config, policy.renderer), config, StandardPrompts(), policy.renderer, rules=""
    )
    played = play(policy, reflector, done=False)
    assert [t.reward for t in played] == [1.0] * 5
    found = reflector.reflect(played, 7)
    assert [row[0].hint for row in found.diagnoses] == ["h"] * 5
    assert len(endpoint.requests) == 5 and found.stats.generated_tokens == 35


def test_a_run_whose_student_reads_is_the_same_again(model_path: Path, tmp_path: Path) -> None:
    changes = {
        "reflection": {"reflector": "self", "max_tokens": 12},
        "rollout": {"batch_size": 3}, "updates": 2, "eval": {"dev_tasks": 2, "test_tasks": 2},
    }  # fmt: skip
    for name in ("one", "other"):
        trainer(settings(model_path, **changes), tmp_path / name).run()
    assert left(tmp_path / "one") == left(tmp_path / "other")
