"""Counters of long stages."""

from __future__ import annotations

import io

import pytest

from hero.report import console as module
from hero.report.console import Console


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_stage_counts_and_says_what_is_left(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(out, terminal)
    with console.counting("test tasks") as count:
        for done in range(1, 5):
            now[0] += 20.0
            count(done, 4)
    if terminal:
        assert "4/4" in out.getvalue()
    else:  # a line at 40 s and at 80 s
        assert out.getvalue().splitlines() == [
            "test tasks: 2 of 4 episodes, about 40 s left",
            "test tasks: 4 of 4 episodes, about 0 s left",
        ]


def test_a_batch_that_ends_at_once_does_not_mislead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches of eight episodes, 40 s each, after one that an earlier process has played."""
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Console(out, False).counting("test tasks", before=8) as count:
        for done in range(9, 41):
            now[0] += 40.0 if done % 8 == 1 else 0.001
            count(done, 40)
    assert out.getvalue().splitlines() == [
        "test tasks: 17 of 40 episodes, about 80 s left",
        "test tasks: 25 of 40 episodes, about 40 s left",
        "test tasks: 33 of 40 episodes, about 0 s left",
    ]


def test_training_says_where_the_time_goes_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(out, False)
    with console.training(10, done=2):  # a run that goes on after two updates
        for step, rollout in ((3, 6.0), (4, 2.0), (5, 4.0), (6, 6.0)):
            now[0] += 12.0
            pace = {"seconds/rollout": rollout, "seconds/train": 6.0, "tokens_per_second": 80.4}
            console.update(step, pace)
    assert [line for line in out.getvalue().splitlines() if "time:" in line] == [
        "  time: rollout 50%, train 50%; 80 generated tokens/s; about 0:01:24 left",
        "  time: rollout 40%, train 60%; 80 generated tokens/s; about 0:00:48 left",
    ]
