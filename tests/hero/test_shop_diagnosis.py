"""The shop's rule-based reflector.

Oracle: hand-made episodes whose mistakes are known by construction, and the reward that the
correction earns.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from shop_helpers import finish, oracle_actions, trajectory

from hero.envs.shop import ShopEnv
from hero.envs.shop.wording import HINTS, Cause, hint_for
from hero.types import Diagnosis

TASK = "train-4"


@pytest.fixture
def env() -> ShopEnv:
    return ShopEnv("tiny", hints="answer")


def diagnose(env: ShopEnv, actions: list[str]) -> list[Diagnosis]:
    return env.diagnose(trajectory(TASK, actions))


def hinted(found: list[Diagnosis]) -> list[int]:
    return [diagnosis.turn for diagnosis in found if diagnosis.hint]


def wrong_click(env: ShopEnv, actions: list[str], pattern: str) -> str:
    """A click on something like `pattern` that the oracle would not take after `actions`."""
    env.reset(TASK)
    for action in actions:
        env.step(action)
    return next(
        action
        for action in env.available_actions()
        if re.fullmatch(pattern, action) and action != env.oracle()
    )


@pytest.mark.parametrize("profile", ["tiny", "small", "full"])
def test_nothing_to_say_about_a_perfect_episode(profile: str) -> None:
    env = ShopEnv(profile)
    for task in random.Random(0).sample(env.tasks("train"), 40):
        actions = oracle_actions(env, task)
        found = env.diagnose(trajectory(task, actions))
        expected = [Diagnosis(turn=turn, source="rules") for turn in range(len(actions))]
        assert found == expected


def test_options_may_be_chosen_in_either_order(env: ShopEnv) -> None:
    search, item, color, size, buy = oracle_actions(env, TASK)
    assert not any(found.hint for found in diagnose(env, [search, item, size, color, buy]))


def test_another_search_that_finds_the_item_is_fine(env: ShopEnv) -> None:
    search, *rest = oracle_actions(env, TASK)
    first, second = re.findall(r"\w+", search)[1:]
    assert not any(found.hint for found in diagnose(env, [f"search[the {second} {first}]", *rest]))


def test_forgotten_option(env: ShopEnv) -> None:
    search, item, color, size, buy = oracle_actions(env, TASK)
    found = diagnose(env, [search, item, size, buy])
    assert hinted(found) == [3]
    assert found[3].corrected_action == color and color in found[3].hint
    assert "buy now" not in found[3].hint
    assert (found[3].necessary, found[3].valid) == (True, True)
    assert found[3].failure_cause == "option of the goal not chosen"


def test_wrong_item(env: ShopEnv) -> None:
    search, item, *_ = oracle_actions(env, TASK)
    wrong = wrong_click(env, [search], r"click\[p\d+\]")
    found = diagnose(env, [search, wrong, "click[buy now]"])
    assert found[1].corrected_action == item and item in found[1].hint
    assert found[1].failure_cause == "item does not fit the goal"
    assert found[2].corrected_action == "click[< prev]"
    assert found[2].failure_cause == "wrong item bought"


def test_going_back_from_a_wrong_item_is_right(env: ShopEnv) -> None:
    search, item, color, size, buy = oracle_actions(env, TASK)
    wrong = wrong_click(env, [search], r"click\[p\d+\]")
    found = diagnose(env, [search, wrong, "click[< prev]", item, color, size, buy])
    assert hinted(found) == [1]


def test_wrong_option_and_its_correction(env: ShopEnv) -> None:
    search, item, color, size, buy = oracle_actions(env, TASK)
    named = re.findall(r"\w+", color)[1]
    env.reset(TASK)
    env.step(search)
    page = env.step(item)[0]
    other = next(v for v in page.split(" color ")[1].split(" size ")[0].split() if v != named)
    found = diagnose(env, [search, item, f"click[{other}]", color, size, buy])
    assert hinted(found) == [2]
    assert found[2].failure_cause == "option does not fit the goal"
    assert other not in re.findall(r"\w+", found[2].hint)
    undone = diagnose(env, [search, item, color, f"click[{other}]", size, buy])
    assert hinted(undone) == [3, 5]
    assert undone[5].corrected_action == color


@pytest.mark.parametrize(
    "action, cause, valid",
    [
        ("let me think", "not an action", False),
        ("click[xyzzy]", "not on this page", False),
        ("click[p1]", "not on this page", False),
        ("search[xyzzy]", "search without results", True),
        ("search[price]", "search without results", True),
    ],
)
def test_first_turn_mistakes(env: ShopEnv, action: str, cause: str, valid: bool) -> None:
    search, *rest = oracle_actions(env, TASK)
    first, *others = diagnose(env, [action, search, *rest])
    assert (first.failure_cause, first.valid) == (cause, valid)
    assert first.corrected_action == search and search in first.hint
    assert action not in first.hint and not any(found.hint for found in others)


def test_search_in_vain_where_the_item_is_shown(env: ShopEnv) -> None:
    """Models that read take an item's id for a word to search for."""
    search, item, *rest = oracle_actions(env, TASK)
    found = diagnose(env, [search, item.replace("click", "search"), search, item, *rest])
    assert hinted(found) == [1]
    assert found[1].failure_cause == "step not needed" and not found[1].necessary
    assert found[1].corrected_action == item and item in found[1].hint


def test_search_that_misses_the_item(env: ShopEnv) -> None:
    search, *_ = oracle_actions(env, TASK)
    noun = re.findall(r"\w+", search)[2]
    other = next(word for word in ("shirt", "tent") if word != noun)
    [found] = diagnose(env, [f"search[{other}]"])
    assert found.failure_cause == "search misses the item" and search in found.hint


def test_detours_are_not_needed(env: ShopEnv) -> None:
    search, item, color, *_ = oracle_actions(env, TASK)
    found = diagnose(env, [search, "click[next >]", "click[< prev]", item, "click[features]"])
    assert [diagnosis.necessary for diagnosis in found] == [True, False, True, True, False]
    assert found[1].corrected_action == item and found[4].corrected_action == color


def test_leaves_the_running_episode_alone(env: ShopEnv) -> None:
    env.reset("train-9")
    env.step(env.oracle())
    before = env.available_actions()
    diagnose(env, ["search[shirt]", "click[next >]"])
    assert env.available_actions() == before and finish(env)[0] == 1.0


def test_a_trajectory_of_another_shop_is_refused(env: ShopEnv) -> None:
    actions = oracle_actions(env, TASK)
    with pytest.raises(ValueError, match="not from this shop"):
        diagnose(env, [*actions, "search[shirt]"])
    with pytest.raises(KeyError, match="nope-1"):
        env.diagnose(trajectory("nope-1", actions))


@pytest.mark.parametrize("profile", ["tiny", "small", "full"])
def test_hints_are_knowable_and_corrections_lead_on(profile: str) -> None:
    """A hint names nothing but the correction, which the page offers and which earns the reward."""
    env, rng = ShopEnv(profile, max_steps=40, hints="answer"), random.Random(3)
    hints = 0
    for task in rng.sample(env.tasks("train"), 60):
        _, info = env.reset(task)
        actions, offered = [], []
        for _ in range(8):
            offered.append(env.available_actions())
            actions.append(env.random_action(rng) if rng.random() < 0.6 else env.oracle())
            if env.step(actions[-1])[2]:
                break
        for found in env.diagnose(trajectory(task, actions)):
            if not found.hint:
                continue
            hints += 1
            rest = found.hint.replace(found.corrected_action, "")
            assert "[" not in rest and actions[found.turn] not in found.hint
            assert not re.search(r"\d", rest) and found.hint.count(".") <= 2
            verb, argument = found.corrected_action.split("[", 1)
            if verb == "click":
                assert found.corrected_action in offered[found.turn]
            else:
                known = set(re.findall(r"\w+", info["instruction"].lower()))
                assert set(re.findall(r"\w+", argument)) <= known
            env.reset(task)
            for action in [*actions[: found.turn], found.corrected_action]:
                env.step(action)
            assert not env.available_actions() or finish(env)[0] == 1.0
    assert hints > 60


@pytest.mark.parametrize("profile", ["tiny", "small", "full"])
def test_a_rule_names_nothing_of_the_task_and_finds_the_same_faults(profile: str) -> None:
    rule, answer = ShopEnv(profile, max_steps=40), ShopEnv(profile, hints="answer", max_steps=40)
    rng, causes = random.Random(5), set()
    for task in rng.sample(rule.tasks("train"), 60):
        rule.reset(task)
        goal = rule._shop.goal(task)
        details = [*goal.attributes, *(re.escape(value) for _, value in goal.options)]
        actions: list[str] = []
        for _ in range(8):
            drawn = rng.random()
            action = rule.random_action(rng) if drawn < 0.5 else rule.oracle()
            actions.append(action if drawn < 0.9 else rng.choice(["hm", "click[x]", "search[zzz]"]))
            if rule.step(actions[-1])[2]:
                break
        pairs = zip(
            rule.diagnose(trajectory(task, actions)),
            answer.diagnose(trajectory(task, actions)),
            strict=True,
        )
        for found, told in pairs:
            assert found == replace(told, hint=found.hint, corrected_action="")
            assert bool(found.hint) == bool(told.hint)
            if not found.hint:
                continue
            causes.add(found.failure_cause)
            argument = told.corrected_action.lower().partition("[")[2]
            assert not any(re.search(rf"\b{detail}\b", found.hint.lower()) for detail in details)
            assert argument.strip("]") not in found.hint.lower()
            assert not re.search(r"[\[\]\d]", found.hint)
    assert len(causes) >= 8


@pytest.mark.parametrize("kind", ["rule", "answer"])
def test_wordings_vary_and_repeat(kind: str) -> None:
    assert HINTS[kind].keys() == set(Cause)
    for cause, wordings in HINTS[kind].items():
        assert len(set(wordings)) >= 6 and all(
            wording.count("{action}") == (kind == "answer") for wording in wordings
        )
        seen = {hint_for(kind, cause, "click[red]", f"train-{number}", 2) for number in range(100)}
        assert len(seen) == len(wordings)


def test_the_choice_of_a_wording_never_changes() -> None:
    # zlib.crc32(b"train-4/3") % 6, is 1: the choice must not change between versions.
    unreadable = hint_for("answer", Cause.UNREADABLE, "x", "train-4", 3)
    assert unreadable == "An action is a search or a click. Write x."
