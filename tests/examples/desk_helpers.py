"""What the tests of the tool desk share: drive an episode and look into its records."""

from __future__ import annotations

from typing import Any

from desk import DeskEnv
from desk.database import Database, initial_database
from desk.tasks import load_task

from hero.toolcalls import ToolCall, write_calls
from hero.types import FeedbackKind


def call(name: str, **arguments: Any) -> str:
    return write_calls([ToolCall(name=name, arguments=arguments)], "react")


def finish(env: DeskEnv) -> tuple[list[str], float]:
    """Follow the oracle to the end."""
    actions = []
    while True:
        actions.append(env.oracle())
        _, reward, terminated, truncated, _ = env.step(actions[-1])
        if terminated or truncated:
            return actions, reward


def database(env: DeskEnv) -> Database:
    assert env._episode is not None
    return env._episode.session.database


def task_of(family: str, split: str = "train") -> str:
    return next(t for t in DeskEnv().tasks(split) if load_task(t).family == family)


def order_with(env: DeskEnv, task_id: str, status: str) -> str:
    user_id = load_task(task_id).user_id
    orders = database(env).orders_of(user_id)
    return next(order.order_id for order in orders if order.status == status)


def identified(task_id: str, **options: int) -> DeskEnv:
    """An episode after the customer was identified."""
    env = DeskEnv(**options)
    env.reset(task_id)
    task = load_task(task_id)
    email = initial_database(task.split).users[task.user_id].email
    env.step(call("find_user_by_email", email=email))
    return env


def refused(env: DeskEnv, text: str, message: str) -> None:
    before = database(env).copy()
    observation, reward, terminated, _, info = env.step(text)
    assert observation.startswith("Error: ") and message in observation
    assert info["valid"] is False and info["parse_ok"] is True and info["role"] == "tool"
    assert info["feedback_kind"] is FeedbackKind.INVALID_ACTION
    assert (reward, terminated) == (0.0, False)
    assert database(env) == before
