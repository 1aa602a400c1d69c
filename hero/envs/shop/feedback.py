"""The line that `feedback` mode adds beneath a page."""

from __future__ import annotations

from dataclasses import dataclass

from hero.envs.shop.protocol import Action, State, View
from hero.envs.shop.reward import Score
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


def text_line(outcome: Outcome) -> str:
    """In sentences; "" if there is nothing to say."""
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
        return _text_score(outcome.score)
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


def compact_line(outcome: Outcome) -> str:
    """In as few words as possible; the page itself shows the options chosen and the score."""
    words = []
    kind, score = outcome.kind, outcome.score
    if score is not None:
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
