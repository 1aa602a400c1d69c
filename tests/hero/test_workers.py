"""Worlds that raise, hang, die or are slow, whoever runs them. Oracle: their script."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from short_runs import settings, trainer
from worlds import Unmade, Unready, World

from hero.config import RolloutConfig
from hero.envs.border import EnvironmentFault
from hero.envs.shop import ShopEnv
from hero.envs.workers import GRACE, Given, InTurn, Threads, Workers, closing, open_workers
from hero.episodes import Assignment, rollout
from hero.policy import Policy
from hero.report.tracking import read_jsonl
from hero.sampler import HFSampler
from hero.types import StopReason, Trajectory

KINDS = ("inline", "threads", "processes")
FAST = RolloutConfig(max_turns=3, max_turn_tokens=8, max_episode_tokens=400)


def play(policy: Policy, tasks: list[str], workers: Any, **changes: Any) -> list[Trajectory]:
    config = replace(FAST, **changes)
    return rollout(
        [Assignment(id=f"{i}", group_id="g", task_id=task) for i, task in enumerate(tasks)],
        envs=workers, sampler=HFSampler(policy), renderer=policy.renderer, config=config, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_world_that_raises_hangs_or_dies_ends_its_own_episode(policy: Policy, kind: str) -> None:
    bad = ["raise", "hang", "die"] if kind == "processes" else ["raise", "hang"]
    tasks = ["fine 0", *bad, *(f"fine {i}" for i in range(1, 8))]
    workers = open_workers(kind, World, World(), rows=2, timeout=0.5)
    played = play(policy, tasks, workers)
    workers.close()
    assert [t.task_id for t in played] == tasks
    failed = {t.task_id: t.error for t in played if t.failed}
    assert set(failed) == set(bad)
    assert "ValueError: broke" in failed["raise"]
    assert "task 'hang', turn 1: no answer within rollout.step_timeout=0.5 s" in failed["hang"]
    if kind == "processes":
        assert "the process of an environment died (exit code 3)" in failed["die"]
    alone = play(policy, [t for t in tasks if "fine" in t], Given([World()]))
    assert [t.reward for t in played if not t.failed] == [t.reward for t in alone] == [1.0] * 8


@pytest.mark.parametrize("kind", KINDS)
def test_an_environment_is_made_where_it_is_used(policy: Policy, kind: str) -> None:
    """Connections of sqlite, event loops and their like belong to their thread."""
    workers = open_workers(kind, World, World(), rows=2, timeout=60)
    answers = []
    for row in range(2):
        workers.submit(row, World.reset, "fine")
        answers += workers.done(wait=True)
    workers.close()
    told = [observation.split() for _, (observation, _) in answers]
    assert [same for _, same in told] == ["True", "True"]
    assert len({pid for pid, _ in told} | {str(os.getpid())}) == (3 if kind == "processes" else 1)


def safe_path(env: Any) -> str | None:
    return os.environ.get("PYTHONSAFEPATH")


def test_a_process_takes_no_module_of_the_folder_for_python_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "socket.py").write_text("raise SystemExit('the wrong socket')")
    monkeypatch.chdir(tmp_path)
    workers = open_workers("processes", World, World(), rows=1, timeout=60)
    workers.submit(0, safe_path)
    assert workers.done(wait=True) == [(0, None)] and safe_path(None) is None
    workers.close()


def test_the_environment_says_who_runs_it() -> None:
    assert isinstance(open_workers("auto", ShopEnv, ShopEnv(), 4, 1), InTurn)
    assert type(open_workers("auto", World, World(), 4, 1)) is Threads
    assert type(open_workers("threads", ShopEnv, ShopEnv(), 4, 1)) is Threads
    world: Any = World()
    world.workers = "fibres"
    with pytest.raises(ValueError, match=r"World\.workers is 'fibres'; expected inline, threads"):
        open_workers("auto", World, world, 4, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["OSError", "SystemExit"])
def test_what_cannot_be_made_is_a_fault(kind: str, how: str) -> None:
    workers = open_workers(kind, partial(Unmade, how), World(), rows=2, timeout=60)
    workers.submit(1, World.reset, "fine")
    [(_, fault)] = workers.done(wait=True)
    assert isinstance(fault, EnvironmentFault)
    assert f"an environment could not be made: {how}: no disk" in str(fault)
    workers.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_made_in_time_is_a_fault(kind: str) -> None:
    workers, began = open_workers(kind, Unready, World(), rows=1, timeout=0.1), time.monotonic()
    fault = answer(workers, World.reset, "fine")
    assert isinstance(fault, EnvironmentFault) and time.monotonic() - began < 20
    assert "it was not made within 10 times rollout.step_timeout=0.1 s" in str(fault)
    workers.close()


def answer(workers: Workers, *job: Any) -> Any:
    workers.submit(0, *job)
    [(_, found)] = workers.done(wait=True)
    return found


def pid_of(workers: Workers) -> int:
    return int(answer(workers, World.reset, "fine")[0].split()[0])


def test_a_process_that_dies_between_two_jobs_is_replaced() -> None:
    workers = open_workers("processes", World, World(), rows=1, timeout=60)
    pid = pid_of(workers)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert "environment died (exit code -9)" in str(answer(workers, World.reset, "fine"))
    assert pid_of(workers) != pid
    workers.close()


def test_a_process_outlives_an_answer_that_cannot_be_sent() -> None:
    workers = open_workers("processes", World, World(), rows=1, timeout=60)
    pid = pid_of(workers)
    assert "the answer cannot be sent: " in str(answer(workers, World.lock))
    assert pid_of(workers) == pid
    workers.close()


@pytest.mark.parametrize("kind", KINDS)
def test_environments_are_closed_by_those_who_made_them(
    policy: Policy, tmp_path: Path, kind: str
) -> None:
    tasks, first = [f"close {tmp_path / str(i)}" for i in range(3)], World()
    workers = open_workers(kind, World, first, rows=3, timeout=60)
    play(policy, tasks, workers)
    assert not list(tmp_path.iterdir())
    workers.close()
    closed = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert closed == dict.fromkeys(("0", "1", "2"), "closed\n")
    with closing(workers, first):  # it is used again
        play(policy, tasks, workers)
    assert (tmp_path / "0").read_text() == "closed\n" * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_closing_hides_no_other(policy: Policy, kind: str) -> None:
    workers = open_workers(kind, World, World(), rows=2, timeout=60)
    play(policy, ["fine", "stay"], workers)
    with pytest.raises(EnvironmentFault, match="World: close raised OSError: stuck"):
        workers.close()
    with pytest.raises(ZeroDivisionError), closing(workers, World()):
        play(policy, ["fine", "stay"], workers)
        1 / 0  # noqa: B018


def test_too_many_failures_stop_the_run(policy: Policy) -> None:
    tasks = ["raise 0", "fine", "raise 1"]
    assert len(play(policy, tasks, Given([World()]), max_env_errors=0.7)) == 3
    with pytest.raises(EnvironmentFault, match=r"2 of 3 episodes .*max_env_errors=0\.5.*broke"):
        play(policy, tasks, Given([World()]))


def test_inline_steps_never_run_at_once() -> None:
    at_once, most = 0, 0

    def job(env: World) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.01)
        at_once -= 1

    workers = open_workers("inline", World, World(), rows=3, timeout=60)
    for row in range(3):
        workers.submit(row, job)
    assert [row for row, _ in workers.done(wait=True)] == [0, 1, 2] and most == 1
    workers.close()


def test_an_interruption_in_a_thread_reaches_the_run(policy: Policy) -> None:
    with pytest.raises(KeyboardInterrupt):
        play(policy, ["interrupt"], Threads(World, 1, 1))


def test_slow_worlds_answer_when_they_are_ready() -> None:
    workers = Threads(World, 2, 60)
    workers.submit(0, lambda env: time.sleep(6 * GRACE))
    workers.submit(1, lambda env: "quick")
    assert workers.done(wait=False) == [(1, "quick")]
    assert workers.done(wait=False) == []
    assert workers.done(wait=True) == [(0, None)]
    workers.close()


class Rough(ShopEnv):
    """A shop of which a fifth of the episodes breaks, and one hangs for a minute."""

    workers = "threads"
    hung = False
    draw = random.Random(0)

    def step(self, text: str) -> Any:
        if not Rough.hung:
            Rough.hung = True
            time.sleep(60)
        if self.draw.random() < 0.1:  # of two turns
            raise RuntimeError("down")
        return super().step(text)


def test_a_run_survives_a_rough_world(model_path: Path, tmp_path: Path) -> None:
    small = {"tasks_per_update": 12, "max_turns": 2, "step_timeout": 0.5}
    config = settings(
        model_path, rollout=small, updates=3, eval={"every": 3, "dev_tasks": 12, "test_tasks": 12}
    )
    config.env.name = f"{__name__}:Rough"
    began = time.monotonic()
    trainer(config, tmp_path).run()
    assert time.monotonic() - began < 50
    updates = [line for line in read_jsonl(tmp_path / "metrics.jsonl") if line["step"]]
    assert len(updates) == 3 and sum(line["rollout/env_errors"] for line in updates) > 0
    records = read_jsonl(tmp_path / "trajectories.jsonl")
    ends = [record["stop_reason"] for record in records]
    assert StopReason.ENV_ERROR in ends and len(set(ends)) > 1
    assert not any(
        turn["trained"]
        for record in records if record["stop_reason"] == "env_error" for turn in record["turns"]
    )  # fmt: skip


def test_partial_is_a_maker_for_processes(policy: Policy) -> None:
    workers = open_workers("processes", partial(ShopEnv, "tiny"), ShopEnv(), 1, 60)
    [played] = play(policy, [ShopEnv("tiny").tasks("dev")[0]], workers, max_episode_tokens=4000)
    workers.close()
    assert not played.failed and played.turns
