"""`TinyDeskEnv`: the tiny desk behind the environment contract.

Each step is taken in silence: whether it was as the house wants shows when the case is closed, and
the reward, 1 or 0, says nothing else. The complaints at the end name what was due, not the turn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from hero.envs.base import StepResult
from hero.envs.tiny_desk.cases import HOUSES, LEVELS, NEEDS, RULE_OF, RULES, SPLITS, Case, load_case
from hero.envs.tiny_desk.wording import (
    CLOSE,
    DONE,
    LEFT_OUT,
    NOT_ASKED,
    OPEN,
    REFUSED,
    SAY,
    STATUSES,
    UNREADABLE,
    WRONG_ANSWER,
    cause_of,
    hint_for,
    opening,
    record,
    vocabulary,
)
from hero.types import Diagnosis, FeedbackKind, Trajectory

Action = tuple[str, str]
"""A step and what it is done with, "" where there is no choice."""
ARGUMENTS = {rule.step: rule.choices for rule in RULES} | {
    OPEN: ("",),
    SAY: STATUSES,
    CLOSE: ("",),
}


def parse_action(text: str) -> Action | None:
    """The step in what an agent wrote; None if there is none."""
    step, _, argument = " ".join(text.lower().split()).partition(" ")
    return (step, argument) if argument in ARGUMENTS.get(step, ()) else None


def as_text(action: Action) -> str:
    return " ".join(action).strip()


@dataclass(slots=True)
class Handling:
    """How far a case is."""

    case: Case
    done: dict[str, str] = field(default_factory=dict)
    """What each step that was taken was done with."""
    closed: bool = False

    def oracle(self, house: int | None = None) -> Action:
        """The next step of the request, as a house (the case's own by default) wants it."""
        for step in self.case.needs:
            if step not in self.done:
                return step, self.case.right(step, house)
        return CLOSE, ""

    def refusal(self, action: Action) -> str:
        """Why the desk does not take the step now; "" if it does."""
        step = action[0]
        if step in self.done:
            return "done already"
        if step in ("ask", CLOSE):
            return ""
        if "ask" in self.case.needs and "ask" not in self.done:
            return "who is it"
        return "" if step == OPEN or OPEN in self.done else "order not open"

    def fault(self, action: Action | None) -> str:
        """The cause why a step is no good one now; "" if it is."""
        if action is None:
            return UNREADABLE
        if self.refusal(action):
            return REFUSED
        step, argument = action
        if step == CLOSE:
            return LEFT_OUT if self.missing() else ""
        if step not in self.case.needs:
            return NOT_ASKED
        if argument == self.case.right(step):
            return ""
        return cause_of(step) if step in RULE_OF else WRONG_ANSWER

    def take(self, action: Action) -> None:
        """A step that is not refused."""
        step, argument = action
        self.closed = step == CLOSE
        if not self.closed:
            self.done[step] = argument

    def missing(self) -> list[str]:
        return [step for step in self.case.needs if step not in self.done]

    def complaints(self) -> list[str]:
        """What was not right, in the order of the request."""
        found = [f"missing {step}" for step in self.missing()]
        for step, argument in self.done.items():
            if step not in self.case.needs:
                found.append(f"not asked {step}")
            elif argument != self.case.right(step):
                rule = RULE_OF.get(step)
                level = LEVELS[self.case.level(step)] if rule else ""
                found.append(f"{rule.quality} {level}" if rule else "wrong answer")
        return found


class TinyDeskEnv:
    """A customer-service desk in a closed vocabulary, for small agents.

    The agent asks who it is, opens the order, checks, lets sign, pays, tells and closes. How each
    step is done the house decides; the agent must find that out. Nothing says so at the step.

    Args:
        house: its rules, 0 to 242: the digits in base 3 are the variants of the five rules. None:
            each task happens in a house of its own, any but 0, as for a warm start that must not
            know the rules.
        requests: what the customers want, words of "cancel return swap status". `status` has no
            rules.
        max_steps: actions after which the episode is truncated; the oracle takes 3 to 6.
        noise: probability with which a step of `demonstrate` is a random action.

    Raises:
        ValueError: an argument that is none of these.
    """

    workers = "inline"
    system_prompt = ""

    def __init__(
        self, house: int | None = 0, *, requests: str = "cancel return swap", max_steps: int = 8,
        noise: float = 0.03,
    ) -> None:  # fmt: skip
        if house is not None and not 0 <= house < HOUSES:
            raise ValueError(f"house={house}; expected 0 to {HOUSES - 1}, or None.")
        self.requests = requests.split()
        if not self.requests or not set(self.requests) <= set(NEEDS):
            raise ValueError(f"requests={requests!r}; expected words of {' '.join(NEEDS)!r}.")
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps}; expected at least 1.")
        if not 0 <= noise <= 1:
            raise ValueError(f"noise={noise}; expected a probability from 0 to 1.")
        self.house, self.max_steps, self.noise = house, max_steps, noise
        self._handling: Handling | None = None
        self._steps = 0
        self._believed: int | None = None

    def vocabulary(self) -> list[str]:
        """Every word that can occur in observations, actions, causes and hints."""
        return vocabulary()

    def tasks(self, split: str) -> list[str]:
        """All requests in turn, so that each beginning of the list has as many of each."""
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}: expected one of {', '.join(SPLITS)}.")
        return [f"{request}-{split}-{n}" for n in range(SPLITS[split]) for request in self.requests]

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        case = load_case(task_id, self.house)
        self._handling, self._steps, self._believed = Handling(case), 0, None
        return opening(case), {"task_id": task_id, "instruction": opening(case)}

    def step(self, text: str) -> StepResult:
        """Take one step of the case.

        Raises:
            RuntimeError: there is no episode, or it has ended; call reset first.
        """
        handling = self._running()
        self._steps += 1
        action = parse_action(text)
        observation, kind = follows(handling, action)
        accepted = kind not in (FeedbackKind.PARSE_ERROR, FeedbackKind.INVALID_ACTION)
        truncated = not handling.closed and self._steps >= self.max_steps
        success = handling.closed and kind is FeedbackKind.DONE
        info = {
            "valid": accepted,
            "feedback_kind": FeedbackKind.BUDGET if accepted and truncated else kind,
            "parse_ok": action is not None,
            "executed_action": None if action is None else as_text(action),
            "role": "user",
            "success": success,
        }
        if truncated:
            observation += " time over"
        return observation, float(success), handling.closed, truncated, info

    def _running(self) -> Handling:
        handling = self._handling
        if handling is None or handling.closed or self._steps >= self.max_steps:
            raise RuntimeError("No episode is running; call reset(task_id) first.")
        return handling

    def oracle(self) -> str:
        return as_text(self._running().oracle())

    def random_action(self, rng: random.Random) -> str:
        """Any step, done in any way."""
        step = rng.choice([*ARGUMENTS])
        return as_text((step, rng.choice(ARGUMENTS[step])))

    def demonstrate(self, rng: random.Random) -> str:
        """The action of one who knows the steps but not the house: he follows another's rules."""
        handling = self._running()
        if self._believed is None:
            self._believed = rng.randrange(HOUSES)
        if rng.random() < self.noise:
            return self.random_action(rng)
        return as_text(handling.oracle(self._believed))

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        """Judge each turn from a replay; the running episode is left alone.

        A step that is right stays right after a wrong one: each is judged by its own rule.

        Raises:
            KeyError: there is no such task.
        """
        handling = Handling(load_case(trajectory.task_id, self.house))
        diagnoses = []
        for turn, played in enumerate(trajectory.turns):
            action = parse_action(played.action_text)
            cause = handling.fault(action)
            step = action[0] if action else ""
            diagnosis = Diagnosis(turn=turn, source="rules")
            if cause:
                diagnosis = Diagnosis(
                    turn=turn,
                    necessary=cause != NOT_ASKED,
                    valid=cause not in (UNREADABLE, REFUSED),
                    failure_cause=cause,
                    hint=hint_for(cause, handling.case, step, trajectory.task_id, turn),
                    source="rules",
                )
            diagnoses.append(diagnosis)
            if action and not handling.refusal(action):
                handling.take(action)
        return diagnoses

    def close(self) -> None:
        """Nothing to release."""


def follows(handling: Handling, action: Action | None) -> tuple[str, FeedbackKind]:
    """Take an action; what is seen then, and what kind of answer that is."""
    if action is None:
        return "unread write one step", FeedbackKind.PARSE_ERROR
    if why := handling.refusal(action):
        return f"refused {why}", FeedbackKind.INVALID_ACTION
    handling.take(action)
    step, argument = action
    if step == OPEN:
        return record(handling.case), FeedbackKind.OK
    if step != CLOSE:
        return f"{argument} {DONE[step]}", FeedbackKind.OK
    if complaints := handling.complaints():
        return f"closed complaint {' , '.join(complaints)}", FeedbackKind.INSUFFICIENT
    return "closed well", FeedbackKind.DONE
