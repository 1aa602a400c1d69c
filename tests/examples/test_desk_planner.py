"""The desk's oracle, demonstrations, state and diagnosis.

Oracles: an independent reading of "lost" on the raw records; the reward that the oracle reaches
from random prefixes; a pickled twin; hand-made conversations whose faults are known.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import time

import pytest
from desk import DeskEnv
from desk.database import initial_database
from desk.planner import plan
from desk.tasks import TASK_IDS, load_task
from desk_helpers import call, database, finish, identified, order_with, task_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hero.types import Diagnosis, FeedbackKind
from tests.hero.shop_helpers import trajectory

SPLITS = tuple(TASK_IDS)

ID = re.compile(r"\b[A-Z]\d{3,5}\b|[\w.]+@[\w.]+\.com|\d+\.\d\d")


def wander(env: DeskEnv, rng: random.Random, steps: int) -> bool:
    """Random prefix of sensible and senseless turns; False if the episode ended."""
    for _ in range(steps):
        records = database(env)
        orders = [order.order_id for order in records.orders_of(load_task(env_task(env)).user_id)]
        text = rng.choice(
            [
                *[env.oracle()] * 6,
                *["Do you confirm (yes/no)?"] * 4,
                "What are the order number, the reason, the items, the options?",
                "Sorry, this is not possible.",
                call("get_order", order_id=rng.choice(orders)),
                call("get_product", product_id=rng.choice(list(records.items.values())).product_id),
                call(
                    "change_address",
                    order_id=rng.choice(orders),
                    street="7 Wrong Lane",
                    city="Nowhere",
                    zip="00000",
                ),
                call("cancel_order", order_id=rng.choice(orders), reason="no longer needed"),
                '{"name": "get_order"',
            ]
        )
        _, _, terminated, truncated, _ = env.step(text)
        if terminated or truncated:
            return False
    return True


def env_task(env: DeskEnv) -> str:
    assert env._episode is not None
    return env._episode.task.id


def undoable(env: DeskEnv) -> bool:
    """Independent reading of "lost": some order changed its status, and not as it should."""
    assert env._episode is not None
    episode = env._episode
    return any(
        order.status != episode.initial.orders[key].status and order != episode.gold.orders[key]
        for key, order in episode.session.database.orders.items()
    )


def test_oracle_wins_from_random_prefixes() -> None:
    env, rng = DeskEnv(max_steps=60, patience=40), random.Random(7)
    won = lost = 0
    for task_id in [t for split in SPLITS for t in env.tasks(split)] * 2:
        env.reset(task_id)
        if not wander(env, rng, rng.randint(2, 12)):
            continue
        assert env._episode is not None
        given_up = plan(env._episode)[0].kind == "give_up"
        if undoable(env):
            assert given_up
        _, reward = finish(env)
        assert reward == (0.0 if given_up else 1.0), task_id
        won, lost = won + (reward == 1.0), lost + given_up
    assert won > 300 and lost > 5, (won, lost)


@pytest.mark.parametrize("index", [0, 4, 7, 13])
def test_pickled_mid_episode_continues_identically(index: int) -> None:
    env, rng = DeskEnv(), random.Random(index)
    env.reset(f"test-{index}")
    assert wander(env, random.Random(1), 2)
    twin = pickle.loads(pickle.dumps(env))
    for _ in range(6):
        text = rng.choice([env.oracle(), "Hello?", call("get_order", order_id="W1")])
        result = env.step(text)
        assert result == twin.step(text)
        if result[2] or result[3]:
            break


def test_episodes_do_not_touch_each_other() -> None:
    env = DeskEnv()
    before = {split: initial_database(split) for split in SPLITS}
    for _ in range(2):
        env.reset("train-0")
        assert finish(env)[1] == 1.0
    assert before == {split: initial_database(split) for split in SPLITS}


CALLS = st.builds(
    lambda name, arguments: json.dumps({"name": name, "arguments": arguments}),
    st.sampled_from(
        ["get_order", "cancel_order", "change_address", "return_items", "find_user_by_email"]
    ),
    st.dictionaries(
        st.sampled_from(["order_id", "email", "street", "city", "zip", "item_ids", "reason"]),
        st.recursive(st.none() | st.text() | st.integers(), st.lists, max_leaves=4),
    ),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text() | CALLS, max_size=6), st.integers(0, len(TASK_IDS["dev"]) - 1))
def test_no_text_makes_step_raise(texts: list[str], index: int) -> None:
    env = DeskEnv(patience=3)
    env.reset(f"dev-{index}")
    for text in texts:
        observation, reward, terminated, truncated, info = env.step(text)
        assert isinstance(observation, str) and reward == 0.0
        assert isinstance(info["feedback_kind"], FeedbackKind)
        json.dumps([observation, info["executed_action"]]).encode()
        if terminated or truncated:
            break
    assert len(env.diagnose(trajectory(f"dev-{index}", texts))) == len(texts)


def test_a_step_takes_less_than_a_millisecond() -> None:
    env = DeskEnv()
    times = []
    for task_id in env.tasks("dev"):
        env.reset(task_id)
        done = False
        while not done:
            text = env.oracle()
            start = time.perf_counter()
            _, _, terminated, truncated, _ = env.step(text)
            times.append(time.perf_counter() - start)
            done = terminated or truncated
    assert sorted(times)[len(times) // 2] < 1e-3


def test_gold_turns_need_no_hint() -> None:
    env = DeskEnv()
    for task_id in env.tasks("test"):
        env.reset(task_id)
        actions, _ = finish(env)
        diagnoses = env.diagnose(trajectory(task_id, actions))
        assert [d.turn for d in diagnoses] == list(range(len(actions)))
        assert all(d == Diagnosis(turn=d.turn, source="rules") for d in diagnoses), task_id


def test_diagnosis_of_a_clumsy_conversation() -> None:
    task_id = next(
        t
        for t in DeskEnv().tasks("train")
        if load_task(t).family == "cancel" and load_task(t).requests[0].mention.value == "number"
    )
    request = load_task(task_id).requests[0]
    env = DeskEnv(max_steps=30)
    records = initial_database("train")
    email = records.users[load_task(task_id).user_id].email
    actions = [
        call("get_order", order_id=request.order_id),  # before the identity is known
        "May I have your e-mail address?",
        '{"name": "find_user_by_email", "arguments": {"email": ',
        call("find_user_by_email", email=email),
        call("get_order", order_id=request.order_id),
        call("cancel_order", order_id=request.order_id, reason=request.details["reason"]),
        "Your order has been cancelled.",
        "What is the reason, and shall I cancel it?",
        call("cancel_order", order_id=request.order_id, reason=request.details["reason"]),
        "Lovely weather.",
        "It has been cancelled.",
    ]
    env.reset("dev-0")
    running = pickle.dumps(env)
    found = env.diagnose(trajectory(task_id, actions))
    assert pickle.dumps(env) == running  # the running episode is left alone
    hinted = [d.turn for d in found if d.hint]
    assert hinted == [0, 2, 5, 6, 9]
    assert "e-mail" in found[0].hint and "identified" in found[0].failure_cause
    assert found[2].corrected_action == call("find_user_by_email", email=email)
    assert "tool call in the form" in found[2].hint and not found[2].valid
    assert "confirm" in (found[5].hint + found[5].failure_cause).lower()
    assert "did not help" in found[6].failure_cause and found[6].valid
    assert found[9].corrected_action.startswith("Done")


def test_damage_is_named() -> None:
    task_id = task_of("tell")
    env = identified(task_id)
    pending = order_with(env, task_id, "pending")
    email = database(env).users[load_task(task_id).user_id].email
    actions = [
        "Your e-mail address and order number, please?",
        call("find_user_by_email", email=email),
        "Do you confirm (yes/no)?",
        call("cancel_order", order_id=pending, reason="no longer needed"),
        call("transfer_to_human", reason="a mistake"),
    ]
    found = env.diagnose(trajectory(task_id, actions))
    assert "not what the customer asked for" in found[3].failure_cause and found[3].hint
    assert found[3].valid and not found[0].hint and not found[1].hint


def test_hints_are_short_and_leak_nothing() -> None:
    env, rng = DeskEnv(max_steps=20, patience=20), random.Random(11)
    hints = set()
    for task_id in [t for split in SPLITS for t in env.tasks(split)]:
        context, _ = env.reset(task_id)
        contexts, actions, done = [], [], False
        while not done:
            mistake = rng.random() < 0.3
            text = rng.choice(["Hm.", '{"name":', env.oracle()]) if mistake else env.oracle()
            contexts.append(context)
            actions.append(text)
            observation, _, terminated, truncated, _ = env.step(text)
            context += "\n" + observation
            done = terminated or truncated
        for diagnosis in env.diagnose(trajectory(task_id, actions)):
            context, action = contexts[diagnosis.turn], actions[diagnosis.turn]
            assert set(ID.findall(diagnosis.corrected_action)) <= set(ID.findall(context))
            if diagnosis.hint:
                hints.add(diagnosis.hint)
                assert diagnosis.source == "rules" and diagnosis.failure_cause
                assert diagnosis.corrected_action != action
                assert not ID.search(diagnosis.hint) and "{" not in diagnosis.hint
                assert action not in diagnosis.hint or len(action) < 4
                assert len(re.findall(r"[.!?](?:\s|$)", diagnosis.hint)) <= 2
                assert len(diagnosis.hint.split()) <= 40
    assert len(hints) > 10
