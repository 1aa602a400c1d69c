"""The tool desk: contract, tasks and policy.

Oracles: policy rules written out here and checked on the raw records; the gold reward 1.0 by
replay; constant policies for the floor; a second process for determinism.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import desk
import pytest
from desk import DeskEnv
from desk.database import initial_database
from desk.tasks import FAMILIES, TASK_IDS, load_task
from desk_helpers import call, database, finish, identified, order_with, refused, task_of

from hero.checks import check, from_dict
from hero.envs.base import make_env
from hero.envs.check import Verdict
from hero.envs.check import check as check_world
from hero.recipes import load_file

SPLITS = tuple(TASK_IDS)


def test_keeps_the_contract() -> None:
    found = check_world("desk:DeskEnv", {"max_steps": 20}, episodes=8)
    assert [f.rule for f in found if f.verdict is not Verdict.OK] == ["vocabulary"]
    assert len(DeskEnv().tools()) == 9


def test_the_settings_of_the_example_fit_it() -> None:
    config = from_dict(load_file(Path(desk.__file__).with_name("train.yaml")))
    check(config)
    assert isinstance(make_env(config.env.name, **config.env.options), DeskEnv)


@pytest.mark.parametrize(
    "task_id", ["train-240", "nope-0", "train", "train-01", "train--1", "", "dev-\u0663"]
)
def test_unknown_tasks_are_key_errors(task_id: str) -> None:
    with pytest.raises(KeyError) as error:
        DeskEnv().reset(task_id)
    assert repr(task_id) in error.value.args[0]


def test_bad_use_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        DeskEnv(max_steps=0)
    with pytest.raises(ValueError, match="patience"):
        DeskEnv(patience=-1)
    with pytest.raises(ValueError, match="train, dev, test"):
        DeskEnv().tasks("validation")
    with pytest.raises(ValueError, match="reset"):
        DeskEnv().step("hello")


@pytest.mark.parametrize("split", SPLITS)
def test_gold_replay_solves_every_task(split: str) -> None:
    env = DeskEnv()
    for task_id in env.tasks(split):
        env.reset(task_id)
        actions, reward = finish(env)
        assert reward == 1.0, (task_id, actions)


@pytest.mark.parametrize(
    "message",
    [
        "Hello, how can I help you?",
        "",
        "I am sorry, that is not possible; the order is shipped or delivered.",
        "Done: the order has been cancelled, returned, exchanged and changed.",
        call("find_user_by_email", email="nobody@example.com"),
    ],
    ids=["greets", "silent", "refuses", "claims", "fails"],
)
def test_constant_agents_solve_nothing(message: str) -> None:
    env = DeskEnv()
    for task_id in [task for split in SPLITS for task in env.tasks(split)]:
        env.reset(task_id)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(message)
            done = terminated or truncated
        assert reward == 0.0, task_id


def test_splits_are_disjoint_and_large_enough() -> None:
    env = DeskEnv()
    tasks = {split: [load_task(task_id) for task_id in env.tasks(split)] for split in SPLITS}
    assert len(tasks["train"]) >= 200 and len(tasks["dev"]) >= 50 and len(tasks["test"]) >= 50
    seen: set[Any] = set()
    for split in SPLITS:
        records = initial_database(split)
        here: set[Any] = {task.user_id for task in tasks[split]}
        here |= {user.email for user in records.users.values()} | set(records.users)
        here |= set(records.orders) | {user.name for user in records.users.values()}
        goals = {
            (task.user_id, repr([(r.order_id, r.kind, r.call, r.fact) for r in task.requests]))
            for task in tasks[split]
        }
        assert len(goals) == len(tasks[split])
        assert not (here | goals) & seen
        seen |= here | goals
        assert {task.family for task in tasks[split]} == set(FAMILIES)


def test_requests_agree_with_the_policy() -> None:
    """Read off the records, not from the tools: what is asked for agrees."""
    needed = {
        "cancel": "pending",
        "address": "pending",
        "return": "delivered",
        "exchange": "delivered",
    }
    for split in SPLITS:
        records = initial_database(split)
        for task_id in DeskEnv().tasks(split):
            task = load_task(task_id)
            orders = [request.order_id for request in task.requests if request.order_id]
            assert len(set(orders)) == len(orders)
            for request in task.requests:
                assert request.call is not None or request.fact
                if request.kind in needed:
                    allowed = records.orders[request.order_id].status == needed[request.kind]
                    assert allowed != request.forbidden
                if request.order_id:
                    assert records.orders[request.order_id].user_id == task.user_id


def test_the_same_world_in_another_process() -> None:
    code = (
        "import hashlib; from desk import DeskEnv; e = DeskEnv(); "
        "print(hashlib.sha256(repr([(e.reset(t), e.oracle(), e._episode.gold.orders) "
        "for s in ('train', 'dev', 'test') for t in e.tasks(s)]).encode()).hexdigest())"
    )
    prints = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        prints.add(run.stdout.strip())
    env = DeskEnv()
    here = repr(
        [
            (env.reset(task_id), env.oracle(), env._episode.gold.orders)  # type: ignore[union-attr]
            for split in SPLITS
            for task_id in env.tasks(split)
        ]
    )
    assert prints == {hashlib.sha256(here.encode()).hexdigest()}


def test_nothing_without_identity() -> None:
    task_id = task_of("cancel")
    env = DeskEnv(max_steps=50)
    env.reset(task_id)
    order_id = order_with(env, task_id, "pending")
    env.step("Do you confirm (yes/no)?")
    for text in (
        call("get_order", order_id=order_id),
        call("get_user", user_id=load_task(task_id).user_id),
        call("cancel_order", order_id=order_id, reason="no longer needed"),
        call("transfer_to_human", reason="tired"),
    ):
        refused(env, text, "not identified")


def test_policy_rules_are_errors_and_change_nothing() -> None:
    task_id = task_of("cancel")
    env = identified(task_id, max_steps=100)
    pending, shipped = order_with(env, task_id, "pending"), order_with(env, task_id, "shipped")
    delivered = order_with(env, task_id, "delivered")
    records = database(env)
    items = records.orders[delivered].item_ids
    foreign = next(o for o in records.orders.values() if o.user_id != load_task(task_id).user_id)
    home = {"street": "1 Oak Street", "city": "Ashford", "zip": "12345"}

    refused(env, call("cancel_order", order_id=pending, reason="no longer needed"), "not confirmed")
    env.step("Do you confirm (yes/no)?")
    for text, message in (
        (call("get_order", order_id="W0000"), "order not found"),
        (call("get_order", order_id=foreign.order_id), "another customer"),
        (call("get_user", user_id=foreign.user_id), "another customer"),
        (call("get_product", product_id="P000"), "product not found"),
        (call("cancel_order", order_id=shipped, reason="no longer needed"), "only pending"),
        (call("cancel_order", order_id=delivered, reason="no longer needed"), "only pending"),
        (call("cancel_order", order_id=pending, reason="a whim"), "one of no longer needed"),
        (call("change_address", order_id=shipped, **home), "only pending"),
        (call("change_address", order_id=pending, **home | {"city": " "}), "1 to 60"),
        (call("return_items", order_id=pending, item_ids=["I0000"]), "only items of delivered"),
        (call("return_items", order_id=delivered, item_ids=[]), "each item once"),
        (call("return_items", order_id=delivered, item_ids=[items[0]] * 2), "each item once"),
        (call("return_items", order_id=delivered, item_ids=["I0000"]), "item not found"),
        (call("return_items", order_id=delivered, item_ids=items[0]), "a list of strings"),
        (call("exchange_item", order_id=shipped, item_id="I0", new_item_id="I1"), "delivered"),
        (
            call("exchange_item", order_id=delivered, item_id=items[0], new_item_id=items[0]),
            "another variant",
        ),
        (
            call("exchange_item", order_id=delivered, item_id=items[0], new_item_id=items[1]),
            "same product",
        ),
        (call("find_user_by_email", email="nobody@example.com"), "user not found"),
        (call("find_user_by_email"), "exactly these arguments: email"),
        (call("find_user_by_email", email=3), "a string"),
        (call("refund", order_id=pending), "unknown tool"),
    ):
        refused(env, text, message)


def test_sold_out_variants_cannot_be_had() -> None:
    for index in range(len(TASK_IDS["train"])):
        task_id = f"train-{index}"
        env = identified(task_id)
        records = database(env)
        delivered = order_with(env, task_id, "delivered")
        for item_id in records.orders[delivered].item_ids:
            product_id = records.items[item_id].product_id
            sold_out = next(v for v in records.variants(product_id) if not v.available)
            if sold_out.item_id != item_id:
                env.step("Do you confirm (yes/no)?")
                exchange = call(
                    "exchange_item",
                    order_id=delivered,
                    item_id=item_id,
                    new_item_id=sold_out.item_id,
                )
                refused(env, exchange, "not available")
                return
    pytest.fail("no order with a sold-out neighbour")


def test_one_confirmation_covers_one_change() -> None:
    task_id = task_of("cancel")
    env = identified(task_id)
    pending, delivered = order_with(env, task_id, "pending"), order_with(env, task_id, "delivered")
    item_id = database(env).orders[delivered].item_ids[0]
    env.step("Do you confirm (yes/no)?")
    env.step(call("cancel_order", order_id=pending, reason="no longer needed"))
    assert database(env).orders[pending].status == "cancelled"
    refused(env, call("return_items", order_id=delivered, item_ids=[item_id]), "not confirmed")
    refused(env, call("cancel_order", order_id=pending, reason="no longer needed"), "only pending")
