"""A world of your own: an agent must read a note to know which box holds the thing it was sent for.

    python examples/custom_env.py

plays the oracle and a clumsy agent, and shows what HERO's teacher reads about the clumsy one's
first turn. Train any chat model on it:

    PYTHONPATH=examples hero train --env.name custom_env:NoteEnv --model.path MODEL

`oracle` and `diagnose` are optional. An oracle gives the mode `full_demo` its demonstrations;
`diagnose` gives `reflection.reflector=rules` and the measurement of the teacher's lift.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from hero.envs.base import HasDiagnosis, HasOracle, StepResult, make_env
from hero.prompts import Hindsight, StandardPrompts
from hero.types import Diagnosis, FeedbackKind, StopReason, Trajectory, Turn

THINGS = (
    "ring",
    "coin",
    "key",
    "map",
    "pen",
    "bell",
    "cup",
    "stamp",
    "lens",
    "dice",
    "flute",
    "rope",
)
COLOURS = ("red", "blue", "green", "black", "white", "brown", "yellow", "grey")
MAX_STEPS = 4
CAUSES = {
    FeedbackKind.PARSE_ERROR: "not an action",
    FeedbackKind.INVALID_ACTION: "no such box",
    FeedbackKind.NO_RESULTS: "wrong box",
}

# Goals are drawn once, from a fixed seed: every process has the same splits, and they are disjoint.
_goals = [f"{thing}-{colour}" for thing in THINGS for colour in COLOURS]
random.Random(0).shuffle(_goals)
SPLITS = {"test": _goals[:16], "dev": _goals[16:32], "train": _goals[32:]}


class NoteEnv:
    """Reward 1 for opening the right box within four actions. Picklable: only plain values."""

    def __init__(self) -> None:
        self._colour = ""
        self._read = False
        self._steps = 0

    @property
    def system_prompt(self) -> str:
        colours = ", ".join(COLOURS)
        return f"Answer with one action: `read note`, or `open COLOUR` with one of {colours}."

    def tasks(self, split: str) -> list[str]:
        return list(SPLITS[split])

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        if not any(task_id in tasks for tasks in SPLITS.values()):
            raise KeyError(f"No task {task_id!r}; tasks(split) lists them.")
        thing, self._colour = task_id.split("-")
        self._read, self._steps = False, 0
        instruction = f"Fetch the {thing}."
        observation = f"{instruction} You see boxes of eight colours and a note."
        return observation, {"task_id": task_id, "instruction": instruction}

    def step(self, text: str) -> StepResult:
        """Whatever an agent writes gets an answer; the answer says what was wrong with it."""
        self._steps += 1
        action = parse(text)
        opened = action.removeprefix("open ") if action and action != "read note" else ""
        success = opened == self._colour
        kind = FeedbackKind.OK
        if action is None:
            observation, kind = "I do not understand that.", FeedbackKind.PARSE_ERROR
        elif not opened:
            self._read = True
            observation = f"The note says: it is in the {self._colour} box."
        elif opened not in COLOURS:
            observation, kind = f"There is no {opened} box.", FeedbackKind.INVALID_ACTION
        elif not success:
            observation, kind = f"The {opened} box is empty.", FeedbackKind.NO_RESULTS
        else:
            observation, kind = "You have found it.", FeedbackKind.DONE
        info = {
            "valid": kind not in (FeedbackKind.PARSE_ERROR, FeedbackKind.INVALID_ACTION),
            "feedback_kind": kind,
            "parse_ok": action is not None,
            "executed_action": action,
            "success": success,
        }
        truncated = not success and self._steps >= MAX_STEPS
        return observation, float(success), success, truncated, info

    def oracle(self) -> str:
        return f"open {self._colour}" if self._read else "read note"

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        """Judge each turn from its replay, in a copy: the running episode is left alone.

        A hint says what to do at its turn with what could be known *then*. Before the note is read
        that is "read the note", never the colour: the student would only learn to guess. And it
        does not quote the action that was wrong: models repeat what they read.
        """
        replay = NoteEnv()
        replay.reset(trajectory.task_id)
        diagnoses = []
        for number, turn in enumerate(trajectory.turns):
            right = replay.oracle()
            action = parse(turn.action_text)
            *_, info = replay.step(turn.action_text)
            if action == right:
                diagnoses.append(Diagnosis(turn=number))  # an empty hint: nothing to learn here
                continue
            told = (
                "Open the box that the note names."
                if right != "read note"
                else "Read the note first."
            )
            diagnoses.append(
                Diagnosis(
                    turn=number,
                    necessary=False,
                    valid=info["valid"],
                    failure_cause=CAUSES.get(info["feedback_kind"], "not needed now"),
                    corrected_action=right,
                    hint=told,
                )
            )
        return diagnoses

    def close(self) -> None:
        """Nothing to release."""


def parse(text: str) -> str | None:
    """`read note` or `open COLOUR` in lower case, or None if the text is neither."""
    match = re.fullmatch(r"read note|open (\w+)", text.strip().lower())
    return match.group(0) if match else None


def play(env: NoteEnv, task_id: str, slips: Sequence[str] = ()) -> Trajectory:
    """The episode of an agent that makes these slips and then follows the oracle.

    There is no model in it, so its turns have no token ids; in training `hero.episodes` fills
    them in.
    """
    observation, info = env.reset(task_id)
    print(f"task {task_id}: {observation}")
    turns: list[Turn] = []
    reward, ended, truncated = 0.0, False, False
    while not (ended or truncated):
        action = slips[len(turns)] if len(turns) < len(slips) else env.oracle()
        observation, gain, ended, truncated, _ = env.step(action)
        print(f"  {action!r} -> {observation}")
        reward += gain
        turns.append(
            Turn(
                prompt_ids=[], action_ids=[], sampled_logprobs=[],
                action_text=action, observation=observation,
            )
        )  # fmt: skip
    print(f"  reward {reward:.2f}")
    return Trajectory(
        id="example", group_id=task_id, task_id=task_id, instruction=info["instruction"],
        turns=turns, reward=reward, success=ended,
        stop_reason=StopReason.DONE if ended else StopReason.TRUNCATED,
    )  # fmt: skip


def main() -> None:
    env = make_env(f"{__name__}:NoteEnv")  # what `hero train --env.name custom_env:NoteEnv` does
    print({split: len(env.tasks(split)) for split in SPLITS})
    print(f"oracle: {isinstance(env, HasOracle)}, diagnosis: {isinstance(env, HasDiagnosis)}")
    assert isinstance(env, NoteEnv)
    task = env.tasks("train")[0]
    play(env, task)
    clumsy = play(env, task, slips=["open pink"])
    print("Diagnoses:")
    for diagnosis in env.diagnose(clumsy):
        hint = diagnosis.hint or "(none: this turn is not trained)"
        print(f"  turn {diagnosis.turn}: {hint}")
    first = env.diagnose(clumsy)[0]
    print("What the teacher reads at the end of its first prompt:")
    context = StandardPrompts().privileged_context(
        Hindsight(
            observation=clumsy.turns[0].observation,
            reward=clumsy.reward,
            failure_cause=first.failure_cause,
            hint=first.hint,
            corrected_action=first.corrected_action,
        )
    )
    print("\n".join(f"  {line}" for line in context.strip().splitlines()))


if __name__ == "__main__":
    main()
