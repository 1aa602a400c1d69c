"""When a run counts as collapsed, by curves written by hand and by one that is provoked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hero.checks import from_dict
from hero.envs.shop import ShopEnv
from hero.evaluation import agreement
from hero.recipes import load_recipe, merge
from hero.report.tracking import read_jsonl
from hero.state import State
from hero.trainer import Trainer
from hero.types import Diagnosis, Trajectory

Curve = list[tuple[float, float, float, float]]
"""Dev success, share of episodes cut off, entropy, share of turns with a hint."""


def alarms(curve: Curve) -> list[int]:
    """Evaluations that count as a collapse; the first is made before training."""
    state, found = State(), []
    for number, (success, cut, entropy, hints) in enumerate(curve):
        metrics = {"dev/success": success, "dev/cut_rate": cut}
        if number:
            metrics |= {"entropy": entropy, "reflection/non_empty_rate": hints}
        state.judge(metrics, number, drop=0.3)
        if state.collapse:
            found.append(number)
    return found


RISING: Curve = [(0.1, 0.2, 0, 0), (0.3, 0.3, 0.5, 0.4), (0.6, 0.2, 0.4, 0.3)]


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        ([(0.59, 0.2, 0.35, 0.28), (0.58, 0.2, 0.3, 0.25)], []),  # noise
        ([(0.7, 0.2, 0.1, 0.05), (0.69, 0.2, 0.1, 0.05)], []),  # learnt: calm and without faults
        ([(0.55, 0.2, 0.1, 0.05)], []),  # the same, but for noise
        ([(0.25, 0.2, 0.4, 0.3)], []),  # a fall without another sign: once is no proof
        ([(0.25, 0.2, 0.4, 0.3), (0.2, 0.2, 0.4, 0.3)], [4]),
        ([(0.25, 0.2, 0.4, 0.3), (0.5, 0.2, 0.4, 0.3), (0.2, 0.2, 0.4, 0.3)], []),
        ([(0.4, 0.9, 0.4, 0.3)], [3]),  # clicks for ever
        ([(0.4, 0.2, 0.1, 0.3)], [3]),
        ([(0.4, 0.2, 0.4, 0.1)], [3]),  # faults go unseen
        ([(0.55, 0.9, 0.4, 0.1)], [3]),
        ([(0.55, 0.9, 0.4, 0.3)], []),
        ([(0.4, 0.2, 0.0, 0.3)], []),  # nothing was trained, so no entropy was seen
    ],
)
def test_collapse_is_seen_by_several_signs(then: Curve, expected: list[int]) -> None:
    assert alarms(RISING + then) == expected


class Judge(ShopEnv):
    """A shop that finds the first four of five turns faulty."""

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        faults = [Diagnosis(turn=k, hint="no", corrected_action="go") for k in range(4)]
        return [*faults, Diagnosis(turn=4)]


def test_agreement_with_the_rules_by_hand(episode: Callable[..., Trajectory]) -> None:
    own = [
        Diagnosis(turn=0, hint="go", corrected_action="go"),
        Diagnosis(turn=1, hint="stay", corrected_action="stay"),
        Diagnosis(turn=2, hint="hm"),
        Diagnosis(turn=3),
        Diagnosis(turn=4, hint="why"),
    ]
    played = [episode(["s"] * 5)]
    assert agreement(Judge("tiny"), played, [own]) == {
        "agreement/recall": 3 / 4,
        "agreement/precision": 3 / 4,
        "agreement/same_action": 1 / 2,
    }
    assert agreement(Judge("tiny"), played, [[]]) == {}  # a mode without reflection
    assert agreement(object(), played, [own]) == {}  # a world without rules


def test_a_reflector_that_goes_blind_is_a_sign() -> None:
    state = State()
    for number, (success, recall) in enumerate([(0.6, 0.9), (0.4, 0.8), (0.4, 0.3)]):
        state.judge({"dev/success": success, "agreement/recall": recall}, number, drop=0.3)
    assert "recall" in state.collapse


def test_an_agent_that_never_succeeds_can_collapse() -> None:
    lost: Curve = [(0, 0.2, 0, 0), (0, 0.3, 0.5, 0.4), (0, 0.9, 0.4, 0.3), (0, 1.0, 0.1, 0.1)]
    assert alarms(lost) == [3]


def test_an_agent_that_was_always_cut_off_is_not_collapsing() -> None:
    slow: Curve = [(0, 1.0, 0, 0), (0, 1.0, 0.5, 0.4), (0, 1.0, 0.2, 0.1)]
    assert alarms(slow) == []


def test_a_collapse_that_is_provoked_is_caught_and_mended(tmp_path: Path) -> None:
    """A live teacher at ten times the quickstart's rate: everybody clicks to the cap, then not."""
    changes = {
        "model": {"path": "tiny-shop-1"}, "reflection": {"episodes": "all"},  # as docs/results.md
        "teacher": {"weights": "live"}, "optim": {"learning_rate": 3e-3, "warmup_steps": 1},
        "rollout": {"tasks_per_update": 16}, "updates": 4,
        "eval": {"every": 2, "dev_tasks": 32, "test_tasks": 0, "min_teacher_lift": None},
    }  # fmt: skip
    config = from_dict(merge(load_recipe("quickstart"), changes))
    run = Trainer(config, tmp_path / "run")
    summary = run.run()
    start, fallen, risen = (
        line["dev/success"]
        for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")
        if "dev/success" in line
    )
    assert fallen < 0.1 < start < risen - 0.15
    assert summary["rescues"] == 1 and summary["best_update"] == 4
    assert run.teacher.kind == "frozen"
