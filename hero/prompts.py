"""Every word that the method says to a model: privileged contexts and reflection requests, in two
wordings.

`standard` is for language models, `compact` for the shipped small agent, whose vocabulary has a few
hundred words. Two rules come from measurement (docs/method.md): the privileged context names only
the corrected action, never the original one (small models raise whatever string is quoted), and it
stands at the end of the last message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hero.types import StopReason, Trajectory


@dataclass(kw_only=True, frozen=True, slots=True)
class Hindsight:
    """What a teacher may be shown of one turn; None or "" leaves a part out."""

    observation: str | None = None
    later: tuple[str, ...] = ()
    """Observations of the turns after that."""
    reward: float | None = None
    parse_ok: bool = True
    necessary: bool = True
    valid: bool = True
    failure_cause: str = ""
    hint: str = ""
    corrected_action: str = ""
    outcome: bool | None = None
    """True/False: the episode succeeded/failed (mode terminal)."""
    demonstration: tuple[tuple[str, str], ...] = ()
    """(action, observation) of each turn of a successful episode of the same task."""


UNREAD = " (could not be read as an action)"
CUT_OFF = "cut it off, so reward 0 does not mean that every turn was bad"
STOP_SENTENCES = {
    StopReason.DONE: "the environment ended it",
    StopReason.TRUNCATED: f"the environment's step limit {CUT_OFF}",
    StopReason.MAX_TURNS: f"the turn limit {CUT_OFF}",
    StopReason.MAX_TOKENS: f"the context limit {CUT_OFF}",
    StopReason.ENV_ERROR: "the environment broke",
}

REQUEST = """\
Write one JSON object for each turn with a fault, one a line, in order, and nothing else:
{"turn": 1, "necessary": true, "valid": true, "failure_cause": "", "corrected_action": "", \
"hint": ""}
Leave turns without a fault out. If no turn has a fault, write only {"turn": 0}.
Rules: judge a turn by the observation that followed it. necessary: the action served the task. \
valid: the environment accepted it. failure_cause: what went wrong. hint says in at most two \
sentences what to do at that turn, using only what could be known before it (say "look the order \
up first", not the id that was learnt later), and corrected_action is the exact action that should \
have been taken, in the agent's action format. \
Do not quote the original action in the hint."""


def reward_text(reward: float, fewest: int) -> str:
    """Two digits, of which zeros may go down to `fewest`; only a reward of 1 reads as 1."""
    shown = f"{reward if reward >= 1 else min(reward, 0.99):.2f}"
    return shown[:-1] if fewest == 1 and shown.endswith("0") else shown


class StandardPrompts:
    """For language models."""

    def privileged_context(self, hindsight: Hindsight) -> str:
        """Text spliced in at the end of the last user or tool message."""
        lines = ["", "", "[Hindsight, for this turn only]"]
        if hindsight.demonstration:
            episode = "\n".join(f"{action}\n-> {seen}" for action, seen in hindsight.demonstration)
            lines.append(f"An episode of this task that succeeded:\n{episode}")
        if not hindsight.parse_ok:
            lines.append("Your answer could not be read as an action.")
        if hindsight.observation is not None:
            lines.append(f"Your answer was followed by: {hindsight.observation}")
        lines += [f"Later: {observation}" for observation in hindsight.later]
        if hindsight.reward is not None:
            lines.append(f"The episode's final reward was {reward_text(hindsight.reward, 2)}.")
        if hindsight.outcome is not None:
            lines.append(
                f"The episode {'succeeded' if hindsight.outcome else 'failed'} in the end."
            )
        if not hindsight.necessary:
            lines.append("Your action was not needed for the task.")
        if not hindsight.valid:
            lines.append("Your action was not accepted.")
        if hindsight.failure_cause:
            lines.append(f"What went wrong: {hindsight.failure_cause}")
        if hindsight.hint:
            lines.append(f"Advice: {hindsight.hint}")
        if hindsight.corrected_action:
            lines.append(f"The right action here: {hindsight.corrected_action}")
        lines.append("Now give your answer for this turn again.")
        return "\n".join(lines)

    def reflection(
        self, trajectory: Trajectory, rules: str, clip: Callable[[str], str] = str
    ) -> str:
        """The whole request for the diagnoses of one episode, as one user message.

        Args:
            trajectory: the finished episode.
            rules: the environment's system prompt, "" for none.
            clip: shortens each action and observation.
        """
        rules_part = f"\n\nRules and tools of the agent:\n{rules}" if rules else ""
        episode = "\n\n".join(
            f"Turn {i}\nAction: {clip(turn.action_text)}{'' if turn.parse_ok else UNREAD}\n"
            f"Then observed: {clip(turn.observation or '')}"
            for i, turn in enumerate(trajectory.turns, 1)
        )
        return (
            "You review a finished episode of an agent and diagnose the turns that had a fault.\n\n"
            f"Task:\n{trajectory.instruction}{rules_part}\n\n{episode}\n\n"
            f"Final reward: {reward_text(trajectory.reward, 2)} (1.00 is success). It ended "
            f"because {STOP_SENTENCES[trajectory.stop_reason]}.\n\n{REQUEST}"
        )


class CompactPrompts:
    """For the shipped small agent: the same facts in few words.

    That an action was not needed or not accepted is what its cause says ("step not needed").
    """

    def privileged_context(self, hindsight: Hindsight) -> str:
        parts = []
        if hindsight.demonstration:
            parts.append("demo " + " ".join(action for action, _ in hindsight.demonstration))
        if not hindsight.parse_ok:
            parts.append("unread")
        if hindsight.observation is not None:
            parts.append(f"then {hindsight.observation}")
        parts += [f"then {observation}" for observation in hindsight.later]
        if hindsight.reward is not None:
            parts.append(f"reward {reward_text(hindsight.reward, 1)}")
        if hindsight.outcome is not None:
            parts.append("success" if hindsight.outcome else "failed")
        if hindsight.failure_cause:
            parts.append(f"cause {hindsight.failure_cause}")
        if hindsight.hint:
            parts.append(f"hint {hindsight.hint}")
        if hindsight.corrected_action:
            parts.append(f"better {hindsight.corrected_action}")
        return " | " + " ".join([*parts, "again"])

    def reflection(
        self, trajectory: Trajectory, rules: str, clip: Callable[[str], str] = str
    ) -> str:
        episode = " ".join(
            f"turn {i} {clip(turn.action_text)} then {clip(turn.observation or '')}"
            for i, turn in enumerate(trajectory.turns, 1)
        )
        stop = trajectory.stop_reason.value.replace("_", " ")
        reward = reward_text(trajectory.reward, 1)
        return f"review {trajectory.instruction} {episode} reward {reward} {stop}"


Prompts = StandardPrompts | CompactPrompts


def make_prompts(style: str) -> Prompts:
    """The wording by its name in `TrainConfig.prompts`."""
    if style == "standard":
        return StandardPrompts()
    if style == "compact":
        return CompactPrompts()
    raise ValueError(f"Unknown prompts {style!r}: expected 'standard' or 'compact'.")
