"""What an evaluation counts, against figures worked out by hand and by drawing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hero.evaluation import figures, summarise, summarise_figures
from hero.types import StopReason, Trajectory, Turn


def turn(action: str, seen: str, **flags: Any) -> Turn:
    return Turn(
        prompt_ids=[1], action_ids=[1, 2], sampled_logprobs=[-1.0, -1.0], action_text=action,
        observation=seen, **flags,
    )  # fmt: skip


def episode(task: str, success: bool, *turns: Turn, **other: Any) -> Trajectory:
    return Trajectory(
        id=task, group_id=task, task_id=task, instruction="", turns=list(turns),
        reward=float(success), success=success, stop_reason=StopReason.DONE, **other,
    )  # fmt: skip


def test_figures_of_an_episode() -> None:
    played = episode(
        "a", True, turn("look", "a door"), turn("look", "a door"), turn("look", "an open door"),
        turn("lok", "what?", is_error=True, parse_ok=False), turn("eat", "no", is_error=True),
    )  # fmt: skip
    assert figures(played) == {
        "success": 1.0, "score": 1.0, "turns": 5.0, "tokens": 10.0, "turns_of_successes": 5.0,
        "invalid": 2 / 5, "duplicate": 1 / 5, "error": 0.0,
    }  # fmt: skip
    played.fail("it broke")
    assert figures(played)["error"] == 1.0 and "turns_of_successes" not in figures(played)


def test_tasks_count_the_same_however_many_trials_they_have() -> None:
    played = [
        episode("a", True, turn("x", "y")), episode("b", True, *[turn("x", "y")] * 3),
        episode("b", False, *[turn("x", "y")] * 5), episode("b", False, turn("x", "y")),
    ]  # fmt: skip
    found = summarise(played)
    assert found.success == pytest.approx((1 + 1 / 3) / 2)
    assert found.turns == pytest.approx((1 + 3) / 2)
    assert found.turns_of_successes == pytest.approx((1 + 3) / 2)
    assert found.per_task["b"]["success"] == pytest.approx(1 / 3)
    assert summarise(played[2:]).turns_of_successes is None


def test_pass_at_k_counts_every_choice_of_k_trials() -> None:
    outcomes = {"a": [1, 0, 0, 1, 1], "b": [0, 0, 0, 0, 1], "c": [1] * 5, "d": [0] * 5}
    found = summarise_figures(
        [(task, {"success": float(one), "score": 0.0, "turns": 1.0, "tokens": 1.0, "invalid": 0.0,
                 "duplicate": 0.0, "error": 0.0}) for task, all in outcomes.items() for one in all]
    )  # fmt: skip
    for k in range(1, 6):
        choices = {task: list(itertools.combinations(all, k)) for task, all in outcomes.items()}
        any_of = [sum(map(any, of)) / len(of) for of in choices.values()]
        all_of = [sum(map(all, of)) / len(of) for of in choices.values()]
        assert found.pass_any[k] == pytest.approx(sum(any_of) / 4)
        assert found.pass_all[k] == pytest.approx(sum(all_of) / 4)
    assert found.pass_any[1] == pytest.approx(found.success) == found.pass_all[1]
