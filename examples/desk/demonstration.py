"""Imperfect demonstrations: the planner's step, at times with the mistake a beginner makes."""

from __future__ import annotations

import random

from desk.actions import ToolCall
from desk.episode import Episode
from desk.planner import plan
from desk.tools import CANCEL_REASONS

MISTAKE_RATE = 0.2


def demonstrate(episode: Episode, rng: random.Random) -> str:
    """The next action; with probability `MISTAKE_RATE` a step skipped or an argument wrong.

    A skipped step (identity, look-up or confirmation) leads to a later call whose ids are known.
    """
    steps = plan(episode)
    if rng.random() >= MISTAKE_RATE:
        return steps[0].text
    early = [
        step.action
        for step in steps[1:]
        if isinstance(step.action, ToolCall) and _is_known(step.action, episode.context)
    ]
    if early and rng.random() < 0.5:
        return rng.choice(early).to_json()
    if isinstance(steps[0].action, ToolCall):
        return _spoil(steps[0].action, rng).to_json()
    return early[0].to_json() if early else steps[0].text


def _is_known(call: ToolCall, context: str) -> bool:
    values = [
        v
        for value in call.arguments.values()
        for v in (value if isinstance(value, list) else [value])
    ]
    return all(value in context for value in values)


def _spoil(call: ToolCall, rng: random.Random) -> ToolCall:
    """The same call with one argument slightly wrong."""
    name = rng.choice(list(call.arguments))
    value = call.arguments[name]
    wrong: str | list[str]
    if call.name == "cancel_order" and name == "reason":
        wrong = next(reason for reason in CANCEL_REASONS if reason != value)
    elif isinstance(value, list):
        wrong = value[:-1]
    else:
        position = rng.randrange(len(value))
        wrong = value[:position] + value[position + 1 :]
    return ToolCall(call.name, call.arguments | {name: wrong})


def random_action(episode: Episode, rng: random.Random) -> str:
    """A remark, or the next planned call spoilt, or a look-up that the case may not need."""
    action = plan(episode)[0].action
    if isinstance(action, ToolCall) and action.arguments and rng.random() < 0.5:
        return _spoil(action, rng).to_json()
    return rng.choice(
        [
            "How can I help you?",
            "I am sorry, I cannot do that.",
            ToolCall("get_user", {"user_id": "unknown"}).to_json(),
            ToolCall("get_order", {"order_id": "unknown"}).to_json(),
        ]
    )
