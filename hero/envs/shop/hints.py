"""What the rule-based reflector says: causes, and several wordings of the hint for each.

A hint names the corrected action and never the original one: models copy whatever string is named.
The wordings vary, so that a model which learns from them does not depend on one.
"""

from __future__ import annotations

import zlib

from hero.types import StrEnum


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


HINTS: dict[Cause, tuple[str, ...]] = {
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


def hint_for(cause: Cause, action: str, task_id: str, turn: int) -> str:
    """One wording of the hint, the same for the same task and turn in every process."""
    wordings = HINTS[cause]
    return wordings[zlib.crc32(f"{task_id}/{turn}".encode()) % len(wordings)].format(action=action)
