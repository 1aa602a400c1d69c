"""What an evaluation counts, against figures worked out by hand and by drawing."""

from __future__ import annotations

import itertools

import pytest

from hero.evaluation import figures, summarise, summarise_figures
from hero.types import Trajectory, Turn
from tests.hero.made import episode, turn


def played(task: str, success: bool, *turns: Turn) -> Trajectory:
    return episode(task, *turns, success=success, reward=float(success))


def test_figures_of_an_episode() -> None:
    one = played(
        "a", True, turn("look", "a door"), turn("look", "a door"), turn("look", "an open door"),
        turn("lok", "what?", is_error=True, parse_ok=False), turn("eat", "no", is_error=True),
    )  # fmt: skip
    assert figures(one) == {
        "success": 1.0, "score": 1.0, "turns": 5.0, "tokens": 10.0, "turns_of_successes": 5.0,
        "invalid": 2 / 5, "duplicate": 1 / 5, "error": 0.0,
    }  # fmt: skip
    one.fail("it broke")
    assert figures(one)["error"] == 1.0 and "turns_of_successes" not in figures(one)


def test_tasks_count_the_same_however_many_trials_they_have() -> None:
    episodes = [
        played("a", True, turn("x", "y")), played("b", True, *[turn("x", "y")] * 3),
        played("b", False, *[turn("x", "y")] * 5), played("b", False, turn("x", "y")),
    ]  # fmt: skip
    found = summarise(episodes)
    assert found.success == pytest.approx((1 + 1 / 3) / 2)
    assert found.turns == pytest.approx((1 + 3) / 2)
    assert found.turns_of_successes == pytest.approx((1 + 3) / 2)
    assert found.per_task["b"]["success"] == pytest.approx(1 / 3)
    assert summarise(episodes[2:]).turns_of_successes is None


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
