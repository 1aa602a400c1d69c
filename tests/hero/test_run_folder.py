"""The run folder under attack: interruptions, two writers, other settings, leftovers.

Oracle: a run that nothing interrupted. Whatever happens to another one, going on must end with the
same weights, the same logs (times aside) and the same best model.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hero.cli import main
from hero.interrupt import Stopped
from hero.report.tracking import read_jsonl
from hero.types import Fault
from tests.hero.short_runs import (
    Countdown,
    assert_same,
    config_of,
    go_on,
    left,
    settings,
    trainer,
    weights,
)


@pytest.fixture(scope="module")
def whole(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer(config_of(model_path), run).run()
    return run


# 4 steps each: probe, dev and test before; then an update and its dev tasks, twice; test.
@pytest.mark.parametrize("step", [2, 6, 11, 14, 18, 23, 26, 31])
def test_an_interruption_in_any_stage_loses_and_repeats_nothing(
    model_path: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(Countdown, "steps_left", step)
    with pytest.raises(KeyboardInterrupt):
        trainer(config_of(model_path), tmp_path).run()
    go_on(model_path, tmp_path)
    assert left(tmp_path) == left(whole)
    assert_same(weights(tmp_path), weights(whole))


def disk(patch: pytest.MonkeyPatch, limit: float) -> list[int]:
    """Counts how often something is made lasting; that time of so many fails, and all after it."""
    calls, fsync = [0], os.fsync

    def counted(number: int) -> None:
        calls[0] += 1
        if calls[0] >= limit:
            raise OSError(28, "No space left on device")
        fsync(number)

    patch.setattr(os, "fsync", counted)
    return calls


@pytest.fixture(scope="module")
def writes(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often a run makes something lasting."""
    with pytest.MonkeyPatch.context() as patch:
        calls = disk(patch, math.inf)
        trainer(config_of(model_path), tmp_path_factory.mktemp("counted")).run()
    return calls[0]


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.8, 0.97])
def test_a_full_disk_at_any_moment_loses_and_repeats_nothing(
    model_path: Path, whole: Path, tmp_path: Path, writes: int, share: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk(patch, max(1, int(share * writes)))
        with pytest.raises(OSError, match="No space left"):
            trainer(config_of(model_path), tmp_path).run()
    go_on(model_path, tmp_path)
    assert left(tmp_path) == left(whole)
    assert_same(weights(tmp_path), weights(whole))


@pytest.mark.parametrize("update", [1, 2])
def test_a_callback_that_raises_is_not_called_twice_for_an_update(
    model_path: Path, whole: Path, tmp_path: Path, update: int
) -> None:
    from hero.trainer import Trainer

    seen: list[int] = []

    def callback(number: int, metrics: dict[str, float]) -> None:
        seen.append(number)
        if number == update and seen.count(number) == 1:
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        Trainer(config_of(model_path), tmp_path, callbacks=[callback]).run()
    Trainer(config_of(model_path, resume="auto"), tmp_path, callbacks=[callback]).run()
    assert seen == [1, 2]
    assert left(tmp_path) == left(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_preempted_run_saves_and_goes_on(
    model_path: Path, whole: Path, tmp_path: Path, request: pytest.FixtureRequest,
    number: signal.Signals,
) -> None:  # fmt: skip
    before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    request.addfinalizer(lambda: signal.signal(number, before))
    broken = trainer(config_of(model_path), tmp_path)
    rollout = broken.stages.rollout

    def preempted(assignments: Any, **kwargs: Any) -> Any:
        if assignments[0].id.startswith("u2-"):
            os.kill(os.getpid(), number)
        return rollout(assignments, **kwargs)

    broken.stages.rollout = preempted  # type: ignore[assignment]
    with pytest.raises(Stopped) as stop:
        broken.run()
    assert stop.value.number == number
    go_on(model_path, tmp_path)
    assert left(tmp_path) == left(whole)


def test_the_second_training_in_a_folder_is_told_who_has_it(
    model_path: Path, tmp_path: Path
) -> None:
    code = """
import sys, time
from pathlib import Path
from hero.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(Fault, match=f"another training .process {holder.pid} on "):
            trainer(settings(model_path, updates=1), tmp_path).run()
    finally:
        holder.kill()  # it cannot tidy up: its lock must not hold all the same
        holder.wait()
    trainer(settings(model_path, updates=1), tmp_path).run()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, r"seed: 0 in the run, 1 now"),
        ({"mode": "env_only"}, r"mode: 'hero' in the run, 'env_only' now"),
        ({"optim": {"learning_rate": 0.5}}, r"optim.learning_rate: 0.001 in the run, 0.5 now"),
        ({"teacher": {"weights": "ema"}}, r"teacher.weights: 'frozen' in the run, 'ema' now"),
        ({"env": {"options": {"profile": "small"}}}, r"env.options: .*tiny.*small"),
    ],
)
def test_other_settings_are_refused_by_name(
    model_path: Path, whole: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    config = config_of(model_path, resume="auto", **changes)
    with pytest.raises(ValueError, match=named) as refused:
        trainer(config, tmp_path / "run").run()
    assert "--resume-anyway" in str(refused.value) and str(refused.value).count(" now") == 1
    del before[tmp_path / "run" / "lock"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_more_updates_are_no_other_run_and_a_change_that_is_meant_is_taken(
    model_path: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    config = config_of(model_path, resume="auto", optim={"learning_rate": 5e-4}, resume_anyway=True)
    config.updates = 3
    assert "all 3 updates" in trainer(config, tmp_path / "run").run()["stopped"]


def test_logs_without_a_checkpoint_are_not_deleted(
    model_path: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    for resume in ("auto", "never", str(tmp_path / "run")):
        with pytest.raises(ValueError, match="no checkpoint"):
            trainer(config_of(model_path, resume=resume), tmp_path / "run").run()
    kept = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert kept == (whole / "metrics.jsonl").read_bytes()


def test_leftovers_of_killed_writes_are_swept(
    model_path: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / ".config.json.123.tmp").write_text("half")
    shutil.copytree(run / "best", run / "best.new")
    (run / "checkpoint").rename(run / "checkpoint.old")
    go_on(model_path, run)
    assert left(run) == left(whole)
    names = {path.name for path in run.iterdir()}
    assert not {".config.json.123.tmp", "best.new", "checkpoint.old"} & names


def words(run: Path) -> list[str]:
    return ["train", "quickstart", "--updates", "3", "--save-every", "1", "--eval.test-tasks", "0",
            "--eval.dev-tasks", "4", "--rollout.tasks-per-update", "4",
            "--output-dir", str(run)]  # fmt: skip


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("never_killed") / "run"
    assert main(words(run)) == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_goes_on(never_killed: Path, tmp_path: Path, kill: signal.Signals) -> None:
    """The command itself, killed in the middle of its updates."""
    command = [sys.executable, "-m", "hero.cli", *words(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not any('"step": 1' in line for line in lines(tmp_path / "metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(kill)
    _, said = process.communicate()
    assert process.returncode == (-9 if kill == signal.SIGKILL else 143)
    assert kill == signal.SIGKILL or b"--resume" in said
    assert main(["train", "--resume", str(tmp_path)]) == 0
    assert_same(weights(tmp_path), weights(never_killed))
    steps = [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
