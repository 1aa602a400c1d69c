"""The desk's reading of the agent's words, and the scripted customer.

Oracle: hand-made messages and what a person would answer to them.
"""

from __future__ import annotations

import pytest
from desk import DeskEnv
from desk.customer import states_fact
from desk.tasks import load_task
from desk_helpers import call, database, identified, order_with, refused, task_of

from hero.toolcalls import FORMATS, ToolCall, write_calls
from hero.types import FeedbackKind


@pytest.mark.parametrize("format", FORMATS)
def test_calls_of_every_format_and_what_cannot_be_read(format: str) -> None:
    env = DeskEnv()
    env.tool_format = format
    env.reset("train-0")
    lost = ToolCall(name="find_user_by_email", arguments={"email": "nobody@example.com"})
    observation, _, _, _, info = env.step(write_calls([lost, lost], format))
    assert observation == "Error: user not found"  # and the second is not tried
    assert (info["parse_ok"], info["valid"], info["role"]) == (True, False, "tool")
    before = database(env).copy()
    observation, _, terminated, _, info = env.step('Sure: {"name": "get_order", "argu')
    assert not terminated and not observation.startswith("Error")
    assert (info["parse_ok"], info["valid"], info["executed_action"]) == (False, False, None)
    assert (info["feedback_kind"], info["role"]) == (FeedbackKind.PARSE_ERROR, "user")
    assert database(env) == before


def test_the_customer_answers_what_he_is_asked() -> None:
    for task_id in DeskEnv().tasks("dev"):
        task = load_task(task_id)
        env = DeskEnv()
        env.reset(task_id)
        email = database(env).users[task.user_id].email
        observation, _, _, _, info = env.step("Could you tell me your e-mail address, please?")
        assert email in observation and info["feedback_kind"] is FeedbackKind.OK
        for question in ("reason", "address", "options", "items"):
            if question in task.requests[0].details:
                reply = env.step(f"What are the {question}?" if question != "reason" else "Why?")[0]
                assert task.requests[0].details[question] in reply


def test_consent_is_about_the_named_order() -> None:
    task_id = task_of("cancel")
    env = identified(task_id)
    pending, shipped = order_with(env, task_id, "pending"), order_with(env, task_id, "shipped")
    cancel = call("cancel_order", order_id=pending, reason="no longer needed")
    assert env.step(f"Shall I cancel order {shipped}?")[0].startswith("No")
    refused(env, cancel, "not confirmed")
    env.step("Please confirm your e-mail address.")
    refused(env, cancel, "not confirmed")
    assert env.step(f"Shall I cancel order {pending}?")[0].startswith("Yes")
    assert env.step(cancel)[-1]["valid"]


def test_the_customer_is_not_fooled_but_believes_a_refusal() -> None:
    env = DeskEnv()
    env.reset(task_of("cancel"))
    observation, _, terminated, _, info = env.step("Your order has been cancelled.")
    assert "any change" in observation and not terminated
    assert info["feedback_kind"] is FeedbackKind.INSUFFICIENT
    _, reward, terminated, _, info = env.step("Sorry, that is not possible.")
    assert terminated and reward == 0.0 and info["success"] is False


def test_patience_and_budget_end_the_episode() -> None:
    env = DeskEnv(max_steps=15, patience=2)
    env.reset("train-0")
    ends = [env.step("Lovely weather.")[2] for _ in range(3)]
    assert ends == [False, False, True]
    env = DeskEnv(max_steps=2)
    env.reset("train-0")
    assert env.step("Your e-mail, please?")[2:4] == (False, False)
    _, reward, terminated, truncated, info = env.step("Your e-mail, please?")
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert info["feedback_kind"] is FeedbackKind.BUDGET and info["success"] is False


@pytest.mark.parametrize(
    ("text", "fact", "expected"),
    [
        ("It is $84.50.", "84.50", True),
        ("It is 84.5 dollars", "84.50", True),
        ("That makes 1,084.50.", "1084.50", True),
        ("That makes 184.50.", "84.50", False),
        ("It is 84.05.", "84.50", False),
        ("Track it: t12345!", "T12345", True),
        ("Track it: T123456", "T12345", False),
        ("It is " + "9" * 5000, "84.50", False),
    ],
)
def test_stating_facts(text: str, fact: str, expected: bool) -> None:
    assert states_fact(text, fact) is expected


def test_a_transfer_without_need_fails_the_task() -> None:
    for family in ("cancel", "tell", "forbidden"):
        env = identified(task_of(family))
        _, reward, terminated, _, _ = env.step(call("transfer_to_human", reason="tired"))
        assert terminated and reward == 0.0
