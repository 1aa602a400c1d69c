"""What the shop says besides its pages: feedback on an action, hints in hindsight.

In `feedback` mode one line beneath the page says what an action did. The rule-based reflector names
a cause and gives a hint, in one of several wordings so that a model which learns from them does not
depend on one. Hints are of two kinds: RULES say what holds for such a turn and name no action,
ANSWERS name the corrected action. None names the original one: models copy whatever is named.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from enum import StrEnum

from hero.envs.shop.protocol import BACK, BUY, DETAILS, NEXT, PREV, Action, State, View
from hero.envs.shop.reward import Score
from hero.envs.shop.words import TINY_ATTRIBUTES, TINY_COLORS, TINY_NOUNS, TINY_SIZES
from hero.types import FeedbackKind

BUDGET_WARNING = 2
"""The steps left are told from this number on."""

SHOWN_ARGUMENT = 60
"""Characters of an agent's own words that are repeated to it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one action did."""

    action: Action | None
    """None if it could not be read."""
    before: State
    after: State | None
    """None if the page does not offer the action."""
    found: int
    """Products on the results page, if there is one."""
    score: Score | None
    steps_left: int

    @property
    def kind(self) -> FeedbackKind:
        if self.action is None:
            return FeedbackKind.PARSE_ERROR
        if self.after is None:
            return FeedbackKind.INVALID_ACTION
        if self.score is not None:
            return FeedbackKind.DONE if self.score.reward == 1.0 else FeedbackKind.INSUFFICIENT
        if self.after.view is View.RESULTS and not self.found:
            return FeedbackKind.NO_RESULTS
        return FeedbackKind.BUDGET if self.steps_left <= BUDGET_WARNING else FeedbackKind.OK


def text_line(outcome: Outcome, breakdown: bool) -> str:
    """In sentences; "" if there is nothing to say.

    Args:
        outcome: of the action.
        breakdown: say after a purchase which parts of the goal were met.
    """
    sentences = []
    kind, action, after = outcome.kind, outcome.action, outcome.after
    if kind is FeedbackKind.PARSE_ERROR:
        sentences.append("Could not read the action. Write search[words] or click[x].")
    elif kind is FeedbackKind.INVALID_ACTION:
        assert action is not None
        shown = action.argument[:SHOWN_ARGUMENT]
        sentences.append(f"Invalid action: {action.verb}[{shown}] is not on this page.")
    elif kind is FeedbackKind.NO_RESULTS:
        assert after is not None
        words = after.query[:SHOWN_ARGUMENT]
        sentences.append(
            f"No results for '{words}'. Try fewer words."
            if after.number == 1
            else "No more results."
        )
    elif outcome.score is not None:
        return _text_score(outcome.score) if breakdown else ""
    elif after is not None and after.asin == outcome.before.asin:
        changed = dict(after.options).items() - dict(outcome.before.options).items()
        sentences += [f"Selected {name}: {value}." for name, value in changed]
    if outcome.steps_left <= BUDGET_WARNING:
        plural = "" if outcome.steps_left == 1 else "s"
        sentences.append(f"You have {outcome.steps_left} step{plural} left.")
    return " ".join(sentences)


def _text_score(score: Score) -> str:
    parts = [
        f"attributes {score.matched_attributes}/{score.num_attributes}",
        f"options {score.matched_options}/{score.num_options}",
        "price ok" if score.price_ok else "price too high",
    ]
    if score.type_factor < 1:
        parts.append(f"another kind of product, times {score.type_factor:g}")
    return f"{', '.join(parts)} → {score.reward:.2f}"


def compact_line(outcome: Outcome, breakdown: bool) -> str:
    """In as few words as possible; the page itself shows the options chosen and the score."""
    words = []
    kind, score = outcome.kind, outcome.score
    if score is not None:
        if not breakdown:
            return ""
        price = "price ok" if score.price_ok else "price too high"
        attributes = f"attributes {score.matched_attributes} of {score.num_attributes}"
        return f"{attributes} options {score.matched_options} of {score.num_options} {price}"
    if kind in (FeedbackKind.PARSE_ERROR, FeedbackKind.INVALID_ACTION):
        words.append("invalid")
    elif kind is FeedbackKind.NO_RESULTS:
        words.append("no results")
    if outcome.steps_left <= BUDGET_WARNING:
        words.append(f"steps left {outcome.steps_left}")
    return " ".join(words)


class Cause(StrEnum):
    """Why a turn did not bring the purchase nearer."""

    UNREADABLE = "not an action"
    NOT_ON_PAGE = "not on this page"
    NO_RESULTS = "search without results"
    POOR_SEARCH = "search misses the item"
    WRONG_ITEM = "item does not fit the goal"
    WRONG_OPTION = "option does not fit the goal"
    OPTION_MISSING = "option of the goal not chosen"
    WRONG_PURCHASE = "wrong item bought"
    DETOUR = "step not needed"


RULES: dict[Cause, tuple[str, ...]] = {
    Cause.UNREADABLE: (
        "Write one action and nothing else.",
        "An action is a search or a click. Write only that.",
        "Use the form of an action.",
        "The shop reads only actions, so give one.",
        "Answer with a single action.",
        "Words without the form of an action do nothing here.",
    ),
    Cause.NOT_ON_PAGE: (
        "Click only what this page shows.",
        "Look at the page again and use what is on it.",
        "Take a step that is possible here.",
        "What is not shown is not possible.",
        "Read the page first and choose from it.",
        "Choose from the actions that are open on this page.",
    ),
    Cause.NO_RESULTS: (
        "Search with words of the goal.",
        "Try fewer and simpler words.",
        "The words of the goal are enough for a search.",
        "Use the name of the item in the search.",
        "The shop knows the words of the goal.",
        "Write only words that name the item.",
    ),
    Cause.POOR_SEARCH: (
        "Search for the item that the goal names.",
        "Use the words of the goal in the search.",
        "Better words lead to the right item.",
        "Read the goal again and search for what it asks.",
        "The goal says which words to use.",
        "A good search names the item of the goal.",
    ),
    Cause.WRONG_ITEM: (
        "Find the item that fits all words of the goal.",
        "Compare the item with the goal.",
        "Read the names with care before you choose.",
        "The goal asks for another item.",
        "An item that misses words of the goal is wrong.",
        "Do not take an item that does not fit.",
    ),
    Cause.WRONG_OPTION: (
        "Choose the option that the goal names.",
        "The goal says which one to take.",
        "Compare the options with the goal.",
        "Read the goal again before you choose.",
        "Only the options of the goal are right.",
        "Take what the goal asks for and nothing else.",
    ),
    Cause.OPTION_MISSING: (
        "The goal names an option that is still open.",
        "Choose all options of the goal before you buy.",
        "One choice is still missing.",
        "Do not buy yet. Compare what is chosen with the goal.",
        "Look for open options before the purchase.",
        "A purchase without all options of the goal is wrong.",
    ),
    Cause.WRONG_PURCHASE: (
        "Do not buy an item that does not fit the goal.",
        "Compare the item with the goal before you buy.",
        "Buy only the item of the goal.",
        "The goal asks for another item, so do not buy yet.",
        "Look for the right item first.",
        "This is another item than the goal names.",
    ),
    Cause.DETOUR: (
        "This step is not needed.",
        "Save steps and take the direct way.",
        "You know enough to go on.",
        "Do only what is still missing.",
        "Nothing here calls for this step.",
        "Use only steps that lead on to the purchase.",
    ),
}

ANSWERS: dict[Cause, tuple[str, ...]] = {
    Cause.UNREADABLE: (
        "Write one action only: {action}.",
        "An action is a search or a click. Write {action}.",
        "Use the form of an action, here {action}.",
        "Answer with {action} and nothing else.",
        "The shop reads only actions. The right one is {action}.",
        "Give a single action, that is {action}.",
    ),
    Cause.NOT_ON_PAGE: (
        "Click only what this page shows. Now {action} is right.",
        "Look at the page again. It calls for {action}.",
        "Take a step that is possible here: {action}.",
        "From this page the way on is {action}.",
        "Use what is shown here, so {action}.",
        "The next step from here is {action}.",
    ),
    Cause.NO_RESULTS: (
        "Search with words of the goal: {action}.",
        "Fewer and simpler words find it. Use {action}.",
        "The words of the goal are enough, so {action}.",
        "Try the name of the item: {action}.",
        "A good search here is {action}.",
        "The shop knows the words in {action}.",
    ),
    Cause.POOR_SEARCH: (
        "Search for the item that the goal names: {action}.",
        "Use the words of the goal. Better is {action}.",
        "The item is found with {action}.",
        "Read the goal again and use {action}.",
        "Better words lead to the item: {action}.",
        "To see the right item use {action}.",
    ),
    Cause.WRONG_ITEM: (
        "Only one item here fits all words of the goal. The step is {action}.",
        "Compare the item with the goal. The way to the right one is {action}.",
        "Read the names with care and use {action}.",
        "The goal asks for another item. Go on with {action}.",
        "To get the item of the goal use {action}.",
        "Find the item that fits the goal: {action}.",
    ),
    Cause.WRONG_OPTION: (
        "Choose the option that the goal names: {action}.",
        "The goal says which one to take. Use {action}.",
        "Compare the options with the goal and use {action}.",
        "Read the goal again. It asks for {action}.",
        "The right choice for this goal is {action}.",
        "Take what the goal asks for, so {action}.",
    ),
    Cause.OPTION_MISSING: (
        "The goal names an option that is still open. First use {action}.",
        "Choose all options of the goal before you buy. Now {action} is next.",
        "One choice is still missing: {action}.",
        "Before the purchase comes {action}.",
        "Do not buy yet. The goal asks for {action}.",
        "Look for open options. What is missing is {action}.",
    ),
    Cause.WRONG_PURCHASE: (
        "Do not buy yet. This item does not fit, so use {action}.",
        "Compare the item with the goal before you buy. The right step is {action}.",
        "Buy only the item of the goal. The way to it is {action}.",
        "The goal asks for another item. Use {action}.",
        "Look for the right item first, with {action}.",
        "This is another item than the goal names. Go on with {action}.",
    ),
    Cause.DETOUR: (
        "The direct way is {action}.",
        "This step is not needed. Go on with {action}.",
        "All that is needed now is {action}.",
        "You know enough for {action}.",
        "Save steps with {action}.",
        "Nothing is missing for the next step, {action}.",
    ),
}


HINTS = {"rule": RULES, "answer": ANSWERS}


def hint_for(kind: str, cause: Cause, action: str, task_id: str, turn: int) -> str:
    """One wording of the hint, the same for the same task and turn in every process."""
    wordings = HINTS[kind][cause]
    return wordings[zlib.crc32(f"{task_id}/{turn}".encode()) % len(wordings)].format(action=action)


TOKEN_PATTERN = re.compile(r"[a-z]+|\d|[^\sa-z\d]")
"""A run of letters, one digit, or one other character, on lower-case text."""

PAGE_WORDS = (
    "goal results item done score chosen color size price max p ; invalid no steps left attributes "
    "options of ok too high search click [ ] . , : 0 1 2 3 4 5 6 7 8 9"
)


def tiny_vocabulary() -> list[str]:
    """Words of observations, actions, causes and hints in compact style, sorted, each once."""
    hints = [wording.format(action="") for kind in HINTS.values() for wordings in kind.values()
             for wording in wordings]  # fmt: skip
    texts = [PAGE_WORDS, *hints, *Cause, BUY, BACK, NEXT, PREV, *DETAILS]
    texts += [*TINY_ATTRIBUTES, *TINY_NOUNS, *TINY_COLORS, *TINY_SIZES]
    return sorted({word for text in texts for word in TOKEN_PATTERN.findall(str(text).lower())})
