"""Worlds that give no answer outside of a rollout. Oracle: the clock, and where they hang."""

from __future__ import annotations

import inspect
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shop_helpers import trajectory
from short_runs import settings, trainer

from hero.cli import main
from hero.envs import border
from hero.envs.alarm import set_limit
from hero.envs.border import EnvironmentFault
from hero.envs.shop import ShopEnv
from hero.report.tracking import read_jsonl
from hero.types import Diagnosis, Fault, StopReason, Trajectory


def sleeps() -> Any:
    time.sleep(60)


def loops() -> Any:
    while True:
        pass


def tries_again() -> Any:
    while True:
        try:
            time.sleep(60)
        except:  # noqa: E722
            time.sleep(2)


def matches() -> Any:
    re.match("(a+)+b", "a" * 60)


def multiplies() -> Any:
    return 7 ** (10**9)


def listens() -> Any:
    here, _there = socket.socketpair()
    here.recv(1)


def waits() -> Any:
    threading.Event().wait()


WAYS = (sleeps, loops, tries_again, matches, multiplies, listens, waits)


class Silent(ShopEnv):
    """A shop of which one method hangs."""

    workers = "threads"
    where = ""

    def __init__(self, hang: Callable[[], Any] = sleeps, **options: Any) -> None:
        if self.where == "__init__":
            hang()
        super().__init__("tiny", **options)
        self.hang = hang

    def tasks(self, split: str) -> list[str]:
        if self.where == "tasks":
            self.hang()
        return super().tasks(split)

    def oracle(self) -> str:
        if self.where == "oracle":
            self.hang()
        return super().oracle()

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        if self.where == "diagnose":
            self.hang()
        return super().diagnose(trajectory)


class SilentTasks(Silent):
    where = "tasks"


class SilentOracle(Silent):
    where = "oracle"


class SilentDiagnosis(Silent):
    where = "diagnose"


class Unmade(Silent):
    where = "__init__"


class OnceSilent(Silent):
    """The diagnosis of one episode hangs."""

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        if trajectory.id == "u2-5-0":
            sleeps()
        return super().diagnose(trajectory)


@pytest.fixture
def fast() -> Iterator[None]:
    began = time.monotonic()
    set_limit(0.2)
    yield
    set_limit(300.0)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("way", WAYS)
def test_whatever_hangs_is_ended_and_told_with_its_line(fast: None, way: Any) -> None:
    world, before = SilentDiagnosis(way), signal.getsignal(signal.SIGALRM)
    lines, start = inspect.getsourcelines(way)
    with pytest.raises(EnvironmentFault) as found:
        border.diagnose(world, trajectory("train-0", []))
    said = str(found.value)
    assert said.startswith("SilentDiagnosis, task 'train-0', 0 turns: diagnose gave no answer ")
    assert "within rollout.step_timeout=0.2 s" in said
    line = int(said.rpartition("line ")[2].rstrip("."))
    assert f"See {__file__}, line " in said and start <= line < start + len(lines)
    assert border.diagnose(Silent(), trajectory("train-0", [])) == []
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_method_that_hangs_again_and_again_ends_the_command(fast: None) -> None:
    world = SilentOracle()
    world.reset("train-0")
    for _ in range(2):
        with pytest.raises(EnvironmentFault, match="oracle gave no answer"):
            border.action(world, "oracle")
    with pytest.raises(Fault, match="3 times in a row") as found:
        border.action(world, "oracle")
    assert not isinstance(found.value, EnvironmentFault)


@pytest.mark.parametrize(
    ("world", "more"),
    [("SilentTasks", ""), ("SilentOracle", "--env.demonstrations 1"),
     ("SilentOracle", "--mode full_demo"), ("SilentDiagnosis", "")],
)  # fmt: skip
def test_a_run_in_a_silent_world_ends_with_a_message(
    world: str, more: str, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    words = f"train --env.name {__name__}:{world} --rollout.step-timeout 0.3 {more}"
    small = " --updates 1 --rollout.tasks-per-update 4 --rollout.max-turns 2 --eval.dev-tasks 2"
    small += f" --eval.test-tasks 0 --threads 1 --model.path {model_path} --prompts compact"
    small += " --reflection.reflector rules"
    assert main([*words.split(), *small.split(), "--output-dir", str(tmp_path / "run")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "gave no answer within rollout.step_timeout=0.3 s" in said and "Traceback" not in said
    assert time.monotonic() - began < 30


def test_a_run_survives_a_diagnosis_that_hangs(model_path: Path, tmp_path: Path) -> None:
    config = settings(
        model_path, rollout={"step_timeout": 0.5}, updates=2, eval={"dev_tasks": 2, "test_tasks": 0}
    )
    config.env.name, config.env.options = f"{__name__}:OnceSilent", {}
    trainer(config, tmp_path).run()
    records = read_jsonl(tmp_path / "trajectories.jsonl")
    [broken] = [record for record in records if record["stop_reason"] == StopReason.ENV_ERROR]
    assert broken["id"] == "u2-5-0" and not any(turn["trained"] for turn in broken["turns"])
    assert sum(record["update"] == 2 and record["split"] == "train" for record in records) == 4


@pytest.mark.parametrize("world", ["SilentTasks", "SilentOracle", "SilentDiagnosis", "Unmade"])
def test_the_check_ends_and_says_what_hangs(world: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["env", "check", f"{__name__}:{world}", "--episodes", "2", "--timeout", "0.3"]
    try:
        assert main([*words[:-1], "0"]) == 1
        assert "timeout=0; expected a number of seconds above 0" in capsys.readouterr().err
        assert main(words) == 1
    finally:
        set_limit(300.0)
    output = capsys.readouterr()
    assert "no answer within timeout=0.3 s" in " ".join((output.out + output.err).split())
