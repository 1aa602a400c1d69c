"""Cases of the desk, the steps that they take, and the house rules that say how.

A house has one of three variants of each rule. The variant says which of three levels a case takes:
level of a case = (variant + fact of the case) mod 3. So a rule holds for two kinds of cases, and
one case shows which variant is in force.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

LEVELS = ("much", "some", "little")


@dataclass(frozen=True, slots=True)
class Rule:
    """How one step is done, depending on one fact of the case."""

    step: str
    quality: str
    """What the house wants much, some or little of."""
    facts: tuple[str, str]
    """The two kinds of cases."""
    choices: tuple[str, str, str]
    """What the step can be done with, one a level."""


RULES = (
    Rule("ask", "proof", ("members", "guests"), ("code", "phone", "name")),
    Rule("check", "care", ("glass", "cloth"), ("goods", "label", "bill")),
    Rule("sign", "rank", ("dear", "cheap"), ("manager", "clerk", "robot")),
    Rule("pay", "ease", ("sent", "packed"), ("cash", "card", "voucher")),
    Rule("tell", "haste", ("home", "abroad"), ("call", "mail", "letter")),
)
HOUSES = len(LEVELS) ** len(RULES)
RULE_OF = {rule.step: rule for rule in RULES}

NEEDS = {
    "cancel": ("ask", "open", "sign", "pay"),
    "return": ("ask", "open", "check", "pay", "tell"),
    "swap": ("ask", "open", "check", "sign", "tell"),
    "status": ("open", "say"),
}
"""Steps of each request, in the order of the oracle; then the case is closed."""
ITEMS = {"glass": ("vase", "bowl", "lamp", "mirror"), "cloth": ("shirt", "coat", "scarf", "rug")}
DEAR = 50
"""From this price on goods are dear."""
SPLITS = {"train": 400, "dev": 70, "test": 70}
"""Cases of each request."""
LAST_DIGITS = {"train": range(8), "dev": (8,), "test": (9,)}
"""Of the prices: no case of one split is one of another."""
TASK_ID = re.compile(r"([a-z]+)-([a-z]+)-(0|[1-9]\d{0,3})")


@dataclass(frozen=True, slots=True)
class Case:
    """One request of one customer, and the house that it comes to."""

    request: str
    house: int
    customer: str
    item: str
    price: int
    status: str
    place: str

    @property
    def needs(self) -> tuple[str, ...]:
        return NEEDS[self.request]

    def fact(self, step: str) -> int:
        """Which of the two kinds of cases of the step's rule this is."""
        return {
            "ask": self.customer == "guest",
            "check": self.item in ITEMS["cloth"],
            "sign": self.price < DEAR,
            "pay": self.status == "packed",
            "tell": self.place == "abroad",
        }[step]  # fmt: skip

    def level(self, step: str, house: int | None = None) -> int:
        """What a house (its own by default) wants at the step of a rule, as index of LEVELS."""
        variant = variant_of(self.house if house is None else house, step)
        return (variant + self.fact(step)) % len(LEVELS)

    def right(self, step: str, house: int | None = None) -> str:
        """What the step is done with to satisfy a house, its own by default."""
        if step in RULE_OF:
            return RULE_OF[step].choices[self.level(step, house)]
        return self.status if step == "say" else ""


def variant_of(house: int, step: str) -> int:
    """The house's variant of the step's rule: a digit of its number in base 3."""
    return house // len(LEVELS) ** RULES.index(RULE_OF[step]) % len(LEVELS)


def load_case(task_id: str, house: int | None) -> Case:
    """The case of a task, drawn from its id.

    Args:
        task_id: REQUEST-SPLIT-NUMBER.
        house: where it happens; None: one of its own, any but house 0.

    Raises:
        KeyError: there is no such task.
    """
    found = TASK_ID.fullmatch(task_id)
    request, split, number = found.groups() if found else ("", "", "0")
    if request not in NEEDS or split not in SPLITS or int(number) >= SPLITS[split]:
        raise KeyError(f"Unknown task {task_id!r}: expected REQUEST-SPLIT-NUMBER.")
    rng = random.Random(task_id)
    return Case(
        request=request,
        house=rng.randrange(1, HOUSES) if house is None else house,
        customer=rng.choice(("member", "guest")),
        item=rng.choice(ITEMS["glass"] + ITEMS["cloth"]),
        price=10 * rng.randrange(1, 10) + rng.choice(LAST_DIGITS[split]),
        status=rng.choice(("sent", "packed")),
        place=rng.choice(("home", "abroad")),
    )
