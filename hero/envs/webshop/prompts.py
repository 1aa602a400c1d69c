"""What an agent reads and writes: this project's way, the official text, verl-agent's and RAGEN's.

Published scores depend on the prompt. Its wording is therefore taken over as it is, character by
character: verl-agent's from agent_system/environments (Apache-2.0, Nanyang Technological University
and the verl-agent team), RAGEN's from its ragen/env/webshop and config/envs.yaml at 5eb79b8 (MIT,
RAGEN Team). Nothing else here is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SEPARATOR = " [SEP] "
SHOWN_ACTION = 20
"""verl-agent takes the last characters of an answer without tags for the action."""
MAX_PROMPT = 13_000
"""Characters; verl-agent leaves the history out of a longer prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What a prompt is made from."""

    instruction: str
    page: str
    """In the official text style."""
    clickable: Sequence[str]
    """Labels of the page in lower case, in the official order."""
    on_index: bool
    history: Sequence[tuple[str, str]]
    """(page, action) of every turn so far."""
    steps_left: int
    max_turn_tokens: int = 400


class Plain:
    """The page, and actions as they are."""

    system_prompt = ""
    max_steps = 15
    window = False
    """Whether each prompt is a whole one, without the turns before."""

    def read(self, text: str) -> str | None:
        """The action in an answer, as the environment gets it; None for none at all."""
        return text

    def write(self, action: str) -> str:
        """An action as an answer."""
        return action

    def show(self, moment: Moment) -> str:
        """What is shown before the next answer."""
        return moment.page


class VerlAgent(Plain):
    """verl-agent's: a prompt of its own for each step, with the last steps and what can be done."""

    window = True

    def __init__(self, history: int) -> None:
        self.history = history

    def read(self, text: str) -> str | None:
        lowered = text.lower()
        start, end = lowered.find("<action>"), lowered.find("</action>")
        if start < 0 or end < 0:
            return lowered[-SHOWN_ACTION:]
        return lowered[start + len("<action>") : end].strip()

    def write(self, action: str) -> str:
        return f"<action>{action}</action>"

    def show(self, moment: Moment) -> str:
        actions = ["search[<your query>]"] if moment.on_index else []
        actions += [f"click[{label}]" for label in moment.clickable]
        choice = "\n".join(f"'{action}'," for action in actions)
        page = self._page(moment.page, moment.instruction)
        past = list(moment.history)[-self.history :] if self.history else []
        if not past:
            return self._text(moment, page, choice, "")
        first = len(moment.history) - len(past) + 1
        told = "\n".join(
            f"[Observation {n}: '{self._page(seen, moment.instruction)}', Action {n}: '{action}']"
            for n, (seen, action) in enumerate(past, first)
        )
        taken = len(moment.history)
        text = self._text(
            moment, page, choice,
            f"Prior to this step, you have already taken {taken} step(s). Below are the most "
            f"recent {len(past)} observations and the corresponding actions you took: {told}\n"
            f"You are now at step {taken + 1} and your",
        )  # fmt: skip
        return text if len(text) <= MAX_PROMPT else self._text(moment, page, choice, "")

    def _page(self, page: str, instruction: str) -> str:
        parts = page.split(SEPARATOR)
        if instruction not in parts:
            return page
        return SEPARATOR.join(f"'{part}'" for part in parts[parts.index(instruction) + 1 :])

    def _text(self, moment: Moment, page: str, choice: str, past: str) -> str:
        blank = "" if past else " "  # behind the first sentence of a prompt without history
        return (
            "\nYou are an expert autonomous agent operating in the WebShop e\u2011commerce "
            f"environment.{blank}\nYour task is to: {moment.instruction}.\n{past or 'Your'} "
            f"current observation is: {page}.\nYour admissible actions of the current situation "
            f"are: \n[\n{choice}\n].\n\nNow it's your turn to take one action for the current "
            "step.\nYou should first reason step-by-step about the current situation, then think "
            "carefully which admissible action best advances the shopping goal. This reasoning "
            "process MUST be enclosed within <think> </think> tags. \nOnce you've finished your "
            "reasoning, you should choose an admissible action for current step and present it "
            "within <action> </action> tags.\n"
        )


class Ragen(Plain):
    """RAGEN's: one conversation, with rules of thumb and what can be done on every page."""

    system_prompt = "You're a helpful assistant. "
    max_steps = 9
    rules = (
        "You are browsing an online shop. Based on the instruction, buy a product that close to "
        "the production description. You need to search, read the search results, pick a product, "
        "choose the size and color and buy. You should only choose action from the available "
        "actions list provided later.  Example process: I need a gingko light and 20x20 pillow "
        "cover that is hand painted. First search[gingko light 20x20 pillow cover hand painted], "
        "answer format: <answer>search[blanket with fleece throw]</answer>. Valid answer is "
        "search[<keywords>] or click[<clickable>]."
    )
    advice = (
        "We must buy a product within 10 actions. It doesn't have to match perfectly with "
        "description.\nSearch term should not include details like size, color.\nNever search for "
        "more than 2 times.\nDo not be too strict about the description, it's more important to "
        "buy one that is close enough within action limit.\nPrioritize click a product in the "
        "current page over going to next page.\nAlmost never click[next >] for more than 2 times."
        "Almost never click[< prev] unless you are sure the product is on one of the previous "
        "pages.\nIf you have less than 3 actions left, just buy the first product you see in the "
        "current page.\nIf an matching option exists, make sure to click[size] then click[color], "
        "one at a time, before click[buy now], but don't have to if only 1 action left, in that "
        "case you just click[buy now]. Never click description."
    )
    form = "<think> [Your thoughts] </think> <answer> [your answer] </answer>"

    def read(self, text: str) -> str | None:
        start = text.find("<answer>")
        end = text.find("</answer>", start)
        if start < 0 or end < 0:
            return None
        inside = text[start + len("<answer>") : end]
        for tag in ("<think>", "</think>", "<answer>"):
            inside = inside.replace(tag, "")
        return next((part.strip() for part in inside.split("||") if part.strip()), None)

    def write(self, action: str) -> str:
        return f"<think></think><answer>{action}</answer>"

    def show(self, moment: Moment) -> str:
        turn = len(moment.history) + 1
        labels = [label for label in moment.clickable if label != "search"]
        if labels == ["back to search", "< prev", "next >"]:
            labels.remove("next >")
        actions = ["search[<content>]"] if moment.on_index else []
        actions += [f"click[{label}]" for label in labels]
        before = self.rules if turn == 1 else "Reward:\n0\n"
        return (
            f"{before}\nTurn {turn}:\nState:\n{moment.page}.{self.advice}\n You must choose from "
            f"these actions:{', '.join(actions)}.\nYou have {moment.steps_left} actions left. "
            f"Always output: {self.form} with no extra text. Strictly follow this format. Max "
            f"response length: {moment.max_turn_tokens} words (tokens).\n"
        )
