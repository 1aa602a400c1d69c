"""The desk of tools in examples/. Oracle: the requests as a person would serve them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from desk import CUSTOMERS, REQUESTS, Desk

from hero.envs.check import Verdict, check
from hero.envs.tools import ToolsEnv
from hero.toolcalls import ToolCall, write_calls


def serve(desk: Desk, wish: str) -> None:
    """What the policy asks for, read off the customer's words."""
    found = desk.find_customer(re.search(r"\S+@\S+\.com", wish)[0])  # type: ignore[index]
    named = next((o["order_id"] for o in found for item in o["items"] if item in wish), "")
    item = next((i for o in found for i in o["items"] if i in wish), "")
    if "compensation" in wish:
        desk.transfer_to_human("compensation")
        return
    order = desk.get_order(named)
    if "please cancel" in wish and order["status"] == "pending":
        desk.cancel_order(named)
    elif "should go to" in wish:
        desk.change_address(named, re.search(r"go to (.*?)\. My", wish)[1])  # type: ignore[index]
    elif "return" in wish:
        desk.return_item(named, item)
    desk.reply(f"Done. In all {sum(order['items'].values()):.2f}, tracking {order['tracking']}.")


@pytest.mark.parametrize("request_", REQUESTS)
def test_who_follows_the_policy_is_paid_and_who_does_nothing_is_not(request_: str) -> None:
    desk = Desk()
    for email in CUSTOMERS:
        wish = desk.reset(email, request_)
        assert desk.reward() == 0.0
        serve(desk, wish)
        assert desk.reward() == 1.0, wish
        desk.reset(email, request_)
        desk.reply("I am sorry, that is not possible.")
        assert desk.reward() == 0.0
        if request_ != "compensation":
            desk.reset(email, request_)
            desk.transfer_to_human("tired")
            assert desk.reward() == 0.0


def refused(desk: Desk, message: str, tool: str, *arguments: Any) -> None:
    before = repr(desk._orders)
    with pytest.raises(ValueError, match=message):
        getattr(desk, tool)(*arguments)
    assert repr(desk._orders) == before


def test_the_policy_is_enforced() -> None:
    desk, (email, other) = Desk(), [*CUSTOMERS][:2]
    desk.reset(email, "cancel")
    pending, shipped, _ = CUSTOMERS[email]
    refused(desk, "not looked up", "cancel_order", pending)
    refused(desk, "no such customer", "find_customer", other)
    desk.find_customer(f" {email.upper()}")
    refused(desk, "no such order", "get_order", next(iter(CUSTOMERS[other])))
    refused(desk, "pending orders only", "cancel_order", shipped)
    refused(desk, "pending orders only", "change_address", shipped, "1 Oak Street")
    refused(desk, "delivered orders only", "return_item", pending, "kettle")
    assert repr(CUSTOMERS[email]) == repr(desk._orders)


def test_it_is_a_world_of_tools() -> None:
    found = check("tools", {"factory": "desk:Desk"}, episodes=4)
    assert not [finding for finding in found if finding.verdict is Verdict.FAULT]
    env = ToolsEnv(Desk)
    assert [len(env.tasks(split)) for split in ("train", "dev", "test")] == [280, 70, 70]
    assert len(env.tools()) == 7 and "e-mail address is" in env.reset("dev-3")[0]
    call = write_calls([ToolCall(name="reply", arguments={"text": "no"})], "react")
    assert env.step(call)[1:3] == (0.0, True)
