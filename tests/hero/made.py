"""Turns, episodes and what is logged of them, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hero.learner import Learned
from hero.report.tracking import trajectory_record
from hero.types import Diagnosis, FeedbackKind, StopReason, Trajectory, Turn

ATTACK = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
HINT = Diagnosis(
    turn=0, valid=False, failure_cause="Wrong <b>page</b>.", corrected_action="search[shirt]",
    hint="Search & look first.", source="rules",
)  # fmt: skip


def turn(action: str, seen: str | None = None, ids: Sequence[int] = (1, 2), **other: Any) -> Turn:
    """A turn whose tokens were sampled with log-probability -1 each."""
    given: dict[str, Any] = {"prompt_ids": [1], "sampled_logprobs": [-1.0] * len(ids)} | other
    return Turn(action_ids=list(ids), action_text=action, observation=seen, **given)


def episode(task: str, *turns: Turn, **other: Any) -> Trajectory:
    given = {
        "id": task, "group_id": task, "instruction": "", "reward": 0.0, "success": False,
        "stop_reason": StopReason.DONE,
    }  # fmt: skip
    return Trajectory(task_id=task, turns=list(turns), **{**given, **other})


def a_record(
    update: int = 1, split: str = "train", *, seen: str = ATTACK,
    tokens: Sequence[str] = ("click", "<b>", "\n", "buy"),
    diagnoses: Sequence[Diagnosis] = (HINT, Diagnosis(turn=1)),
    divergence: Sequence[float] = (0.0, 0.1, 5.0), gap: Sequence[float] = (0.01, -1.0, 0.9),
    **of_episode: Any,
) -> dict[str, Any]:  # fmt: skip
    """What is logged of two turns, of which the first was distilled if there is a divergence."""
    first = turn("click[x]", seen, (0, 1, 2), is_error=True)
    first.feedback_kind = FeedbackKind.INVALID_ACTION
    given = {
        "id": f"e{update}", "instruction": "Buy a shirt.", "reward": 0.25,
        "success": split == "after", "stop_reason": StopReason.MAX_TURNS,
    }  # fmt: skip
    learned = Learned(trained={(0, 0): ("distillation",)})
    if divergence:
        learned.divergence[0, 0], learned.logprob_gap[0, 0] = list(divergence), list(gap)
    return trajectory_record(
        episode("t", first, turn("buy", None, (3,)), **{**given, **of_episode}), diagnoses, learned,
        pieces=lambda ids: [tokens[i] for i in ids], update=update, split=split,
    )  # fmt: skip
