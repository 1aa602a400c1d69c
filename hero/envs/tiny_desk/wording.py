"""Every word of the desk: actions, observations, causes and hints.

A hint states a rule of the house by the level that it wants of this kind of cases. It names neither
the step nor what it is done with: a reader has to know what the level means at this step.
"""

from __future__ import annotations

import re
import zlib

from hero.envs.tiny_desk.cases import ITEMS, LEVELS, NEEDS, RULE_OF, RULES, Case

OPEN, SAY, CLOSE = "open", "say", "close"
STATUSES = ("sent", "packed")
DONE = {"ask": "given", "check": "seen", "sign": "signed", "pay": "paid", "tell": "told",
        SAY: "answered"}  # fmt: skip
"""What follows a step that was taken: silent on whether it was right."""

UNREADABLE = "not an action"
REFUSED = "not possible now"
NOT_ASKED = "step not asked for"
LEFT_OUT = "step left out"
WRONG_ANSWER = "answer not as the order says"

HINTS = {
    UNREADABLE: (
        "Write one step and nothing else.",
        "A step is two words. Write only them.",
        "The desk reads only steps.",
    ),
    REFUSED: (
        "First the customer, then the order, then the rest.",
        "Each step has its time and is taken once.",
        "Take a step that is possible now.",
    ),
    NOT_ASKED: (
        "The request does not call for this step.",
        "Take only steps that the request calls for.",
        "Nothing in the request asks for this.",
    ),
    LEFT_OUT: (
        "Do not end yet. A step of the request is still open.",
        "The request calls for one more step.",
        "First take all steps of the request.",
    ),
    WRONG_ANSWER: (
        "Look at the order before you answer.",
        "The order says how far it is.",
        "Answer what the order says.",
    ),
}
RULE_HINTS = (
    "The house wants {level} {quality} for {kind}.",
    "Here {kind} take {level} {quality}.",
    "Use {level} {quality} with {kind}.",
)


def cause_of(step: str) -> str:
    """Of a step that was done otherwise than the house wants."""
    return f"{RULE_OF[step].quality} not as the house wants"


def rule_hint(case: Case, step: str, draw: int) -> str:
    """The rule of the step for this kind of case; `draw` chooses the wording."""
    rule = RULE_OF[step]
    return RULE_HINTS[draw % len(RULE_HINTS)].format(
        level=LEVELS[case.level(step)], quality=rule.quality, kind=rule.facts[case.fact(step)]
    )


def hint_for(cause: str, case: Case, step: str, task_id: str, turn: int) -> str:
    """The hint for a cause, in a wording that is the same for the same task and turn."""
    draw = zlib.crc32(f"{task_id}/{turn}".encode())
    said = HINTS[cause][draw % 3] if cause in HINTS else rule_hint(case, step, draw)
    return said.lower()


def opening(case: Case) -> str:
    """What the customer wants."""
    return f"{case.customer} wants {case.request}"


def record(case: Case) -> str:
    """What the opened order shows."""
    return f"order {case.item} price {case.price} {case.status} {case.place}"


WORD = re.compile(r"[a-z]+|\d|[^\sa-z\d]")
PAGE_WORDS = (
    "wants order price member guest home abroad closed well complaint missing wrong answer refused "
    "who is it not open done already time over unread write one step 0 1 2 3 4 5 6 7 8 9 , ."
)


def vocabulary() -> list[str]:
    """Words of observations, actions, causes and hints, sorted, each once."""
    texts = [PAGE_WORDS, OPEN, SAY, CLOSE, *STATUSES, *LEVELS, *DONE.values(), *NEEDS, *HINTS]
    texts += [*ITEMS["glass"], *ITEMS["cloth"], *(cause_of(rule.step) for rule in RULES)]
    texts += [hint for wordings in HINTS.values() for hint in wordings]
    for rule in RULES:
        texts += [rule.step, rule.quality, *rule.facts, *rule.choices]
        texts += [hint.format(level="", quality="", kind="") for hint in RULE_HINTS]
    return sorted({word for text in texts for word in WORD.findall(text.lower())})
