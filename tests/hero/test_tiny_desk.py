"""The tiny desk: its rules, and that nothing but a hint tells which of them are in force.

Oracle: episodes worked out by hand from the table of docs/environments/tiny-desk.md.
"""

from __future__ import annotations

import io
import random
from collections import defaultdict
from pathlib import Path

import pytest
from shop_helpers import trajectory

from hero.api import rollout
from hero.checks import from_dict
from hero.config import ModelConfig
from hero.envs.check import Verdict, check
from hero.envs.tiny_desk import TinyDeskEnv
from hero.envs.tiny_desk.cases import HOUSES, NEEDS, RULES, SPLITS, Case, load_case
from hero.envs.tiny_desk.env import Handling, follows, parse_action
from hero.envs.tiny_desk.wording import (
    LEFT_OUT,
    NOT_ASKED,
    REFUSED,
    UNREADABLE,
    rule_hint,
    vocabulary,
)
from hero.policy import Policy
from hero.probe import CONTEXTS, measure
from hero.recipes import load_recipe, merge
from hero.report.console import Console
from hero.trainer import Trainer

HOUSE = 0 * 1 + 1 * 3 + 2 * 9 + 0 * 27 + 1 * 81  # variants of ask, check, sign, pay, tell
GUEST = Case(request="return", house=HOUSE, customer="guest", item="vase", price=72,
             status="sent", place="abroad")  # fmt: skip
MEMBER = Case(request="cancel", house=HOUSE, customer="member", item="coat", price=49,
              status="packed", place="home")  # fmt: skip


@pytest.mark.parametrize(
    ("case", "actions"),
    [
        # guest: 0 + 1 = some proof; glass: 1 + 0 = some care; sent: 0 = much ease;
        # abroad: 1 + 1 = little haste
        (GUEST, ["ask phone", "open", "check label", "pay cash", "tell letter"]),
        # member: 0 = much proof; cheap: 2 + 1 = 0, much rank; packed: 0 + 1 = some ease
        (MEMBER, ["ask code", "open", "sign manager", "pay card"]),
    ],
    ids=["guest", "member"],
)
def test_episodes_worked_out_by_hand(case: Case, actions: list[str]) -> None:
    handling = Handling(case)
    for action in [*actions, "close"]:
        assert " ".join(handling.oracle()).strip() == action
        parsed = parse_action(action)
        assert handling.fault(parsed) == ""
        seen, _ = follows(handling, parsed)
    assert seen == "closed well"


@pytest.mark.parametrize(
    ("actions", "causes", "end"),
    [
        (
            ["ask code", "open", "check label", "pay voucher", "tell letter", "close"],
            ["proof not as the house wants", "", "", "ease not as the house wants", "", ""],
            "closed complaint proof some , ease much",
        ),
        (
            ["open", "ask phone", "check bill", "open", "open", "check label", "close"],
            [REFUSED, "", REFUSED, "", REFUSED, "", LEFT_OUT],
            "closed complaint missing pay , missing tell",
        ),
        (
            ["ask phone", "open", "sign robot", "close"],
            ["", "", NOT_ASKED, LEFT_OUT],
            "closed complaint missing check , missing pay , missing tell , not asked sign",
        ),
        (
            ["Ask  phone", "ask code", "I do not know", "ask", "openly", "close"],
            ["", REFUSED, UNREADABLE, UNREADABLE, UNREADABLE, LEFT_OUT],
            "closed complaint missing open , missing check , missing pay , missing tell",
        ),
    ],
    ids=["rules", "order", "unasked", "form"],
)  # fmt: skip
def test_faults_worked_out_by_hand(actions: list[str], causes: list[str], end: str) -> None:
    handling, found, seen = Handling(GUEST), [], ""
    for action in map(parse_action, actions):
        found.append(handling.fault(action))
        seen, _ = follows(handling, action)
    assert (found, seen) == (causes, end)


def test_the_oracle_solves_every_case_in_every_house() -> None:
    for house in range(0, HOUSES, 5):
        env = TinyDeskEnv(house, requests=" ".join(NEEDS))
        for task in env.tasks("dev")[:8]:
            env.reset(task)
            steps = [env.step(env.oracle()) for _ in range(len(NEEDS[task.split("-")[0]]) + 1)]
            assert [reward for _, reward, *_ in steps] == [*[0.0] * (len(steps) - 1), 1.0]
            assert steps[-1][2] and steps[-1][4]["success"]


@pytest.mark.parametrize(("request_", "solved"), [("cancel", 9), ("return", 3), ("swap", 3)])
def test_another_house_solves_a_case_by_chance_alone(request_: str, solved: int) -> None:
    """Of 243 houses those whose variants agree on the rules of the case: 3 for each other rule."""
    case = load_case(f"{request_}-test-3", 17)
    right = [case.right(step) for step in case.needs]
    others = [[case.right(step, house) for step in case.needs] for house in range(HOUSES)]
    assert others.count(right) == solved


def test_nothing_tells_the_house_before_the_end() -> None:
    rng, ends = random.Random(0), set()
    for task in TinyDeskEnv().tasks("train")[:60]:
        envs = [TinyDeskEnv(house, max_steps=20) for house in (0, 17, 121, 242)]
        assert len({env.reset(task)[0] for env in envs}) == 1
        for _ in range(20):
            action = envs[0].oracle() if rng.random() < 0.5 else envs[0].random_action(rng)
            steps = [env.step(action) for env in envs]
            if steps[0][2]:
                ends.add(len({step[0] for step in steps}))
                break
            assert len({(step[0], step[1], step[4]["feedback_kind"]) for step in steps}) == 1
    assert max(ends) > 1  # and then it shows


def test_a_complaint_and_the_case_tell_the_rule_in_force() -> None:
    hints: dict[tuple[str, str, int], set[str]] = defaultdict(set)
    for house in range(HOUSES):
        for task in TinyDeskEnv().tasks("dev")[:12]:
            case = load_case(task, house)
            right = {step: case.right(step) for step in case.needs}
            for rule in RULES:
                if rule.step in right:
                    wrong = next(choice for choice in rule.choices if choice != right[rule.step])
                    [said] = Handling(case, right | {rule.step: wrong}).complaints()
                    told = rule_hint(case, rule.step, 0)
                    hints[said, rule.step, case.fact(rule.step)].add(told)
    assert len(hints) == 5 * 3 * 2  # rules, levels, kinds of cases
    assert all(len(told) == 1 for told in hints.values())
    assert len(set.union(*hints.values())) == 5 * 3 * 2


def test_hints_name_a_rule_and_no_action() -> None:
    choices = {choice for rule in RULES for choice in rule.choices} | {rule.step for rule in RULES}
    for house in range(HOUSES):
        case = load_case("return-train-0", house)
        for rule in RULES:
            for draw in range(3):
                assert not choices & set(rule_hint(case, rule.step, draw).lower().split())
    assert choices < set(vocabulary())


def test_no_case_of_one_split_is_one_of_another() -> None:
    env = TinyDeskEnv(requests=" ".join(NEEDS))
    cases = [{load_case(task, 0) for task in env.tasks(split)} for split in SPLITS]
    assert all(len(found) > 200 for found in cases)
    assert not cases[0] & cases[1] and not cases[0] & cases[2] and not cases[1] & cases[2]


def test_a_warm_start_never_meets_the_house_that_is_trained_in() -> None:
    houses = [load_case(task, None).house for task in TinyDeskEnv(None).tasks("train")]
    assert 0 not in houses and len(set(houses)) > 200
    assert [load_case(task, None).house for task in TinyDeskEnv(None).tasks("train")] == houses


def test_diagnoses_are_of_the_house_of_the_task() -> None:
    env = TinyDeskEnv(HOUSE)
    case = load_case("return-train-5", HOUSE)
    wrong = next(c for c in RULES[0].choices if c != case.right("ask"))
    actions = [f"ask {wrong}", "open", "close"]
    first, second, last = env.diagnose(trajectory("return-train-5", actions))
    assert first.hint and first.valid and first.necessary and not first.corrected_action
    assert not second.hint and last.failure_cause == "step left out"
    assert ("much proof" in first.hint) == (case.customer == "member")  # variant 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"house": 243}, "house=243; expected 0 to 242, or None"),
        ({"requests": "refund"}, "expected words of 'cancel return swap status'"),
        ({"requests": ""}, "requests=''"),
        ({"max_steps": 0}, "max_steps=0; expected at least 1"),
        ({"noise": 2.0}, "noise=2.0; expected a probability"),
    ],
)
def test_options_that_are_none(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyDeskEnv(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("house", [0, None])
def test_the_contract(house: int | None) -> None:
    found = check("tiny-desk", {"house": house}, episodes=12)
    assert [f.rule for f in found if f.verdict is not Verdict.OK] == ["tools"]


# ---- the shipped agent ---------------------------------------------------------------------------


def test_the_shipped_agent_reads_hints_and_nothing_else() -> None:
    """Right actions on flagged turns: chance is a third, whatever is shown but the right hint."""
    policy = Policy.load(ModelConfig(path="tiny-desk", device="cpu"))
    data, env = load_recipe("tiny-desk"), TinyDeskEnv()
    config = from_dict(data)
    played = rollout(policy, TinyDeskEnv, env.tasks("dev")[:48], config=config.rollout, seed=3)
    assert sum(episode.success for episode in played) <= 5
    right = {
        name: measure(policy, from_dict(merge(data, CONTEXTS[name])), env, played, 3)[0]
        for name in ("rules", "self reflection", "shuffled", "empty")
    }
    found = {name: gap.teacher_right for name, gap in right.items() if gap}
    assert min(found["rules"], found["self reflection"]) > 0.8, found
    assert max(found["shuffled"], found["empty"]) < 0.6, found


def test_a_few_updates_of_hero_teach_rules_of_the_house(tmp_path: Path) -> None:
    changes = {
        "updates": 4, "reflection": {"reflector": "rules"}, "rollout": {"tasks_per_update": 32},
        "eval": {"dev_tasks": 8, "test_tasks": 0, "min_teacher_lift": None},
        "save_trajectories": 0,
    }  # fmt: skip
    config = from_dict(merge(load_recipe("tiny-desk"), changes))
    trainer, env = Trainer(config, tmp_path, "tiny-desk", Console(io.StringIO())), TinyDeskEnv()

    def faulty(policy: Policy) -> float:
        """Share of turns on 100 dev tasks."""
        played = rollout(policy, TinyDeskEnv, env.tasks("dev")[:100], config=config.rollout, seed=5)
        hints = [bool(found.hint) for episode in played for found in env.diagnose(episode)]
        return sum(hints) / len(hints)

    before = faulty(trainer.policy)
    trainer.run()
    after = faulty(trainer.policy)
    assert before > 0.4 and after < before - 0.12
