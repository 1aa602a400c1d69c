"""A world of your own: a note says which box holds what was asked for.

First hero env check custom_env:NoteEnv, then hero train --env.name custom_env:NoteEnv.
"""

import random

from hero.types import Diagnosis, FeedbackKind

THINGS = ["ring", "coin", "key", "map", "pen", "bell", "cup", "stamp", "lens", "dice"]
COLOURS = ["red", "blue", "green", "black", "white", "brown", "yellow", "grey"]
TASKS = [f"{thing}-{colour}" for thing in THINGS for colour in COLOURS]
random.Random(0).shuffle(TASKS)  # a fixed seed: every process has the same splits


class NoteEnv:
    """Reward 1 for opening the right box within four actions."""

    system_prompt = f"Write one action: `read note`, or `open COLOUR`, one of {', '.join(COLOURS)}."

    def tasks(self, split):
        return {"test": TASKS[:16], "dev": TASKS[16:32], "train": TASKS[32:]}[split]

    def reset(self, task_id):
        if task_id not in TASKS:
            raise KeyError(f"no task {task_id!r}")
        thing, self.colour = task_id.split("-")
        self.read, self.steps = False, 0
        return f"Fetch the {thing}. You see boxes of eight colours and a note.", {}

    def step(self, text):  # whatever is written gets an answer that says what was wrong
        self.steps += 1
        verb, _, colour = text.strip().lower().partition(" ")
        seen, kind, found = "I do not understand that.", FeedbackKind.PARSE_ERROR, False
        if (verb, colour) == ("read", "note"):
            seen, kind, self.read = f"It is in the {self.colour} box.", FeedbackKind.OK, True
        elif verb == "open" and (found := colour == self.colour):
            seen, kind = "You have found it.", FeedbackKind.DONE
        elif verb == "open":
            seen, kind = f"No luck with {colour!r}.", FeedbackKind.NO_RESULTS
        parsed = kind is not FeedbackKind.PARSE_ERROR
        info = {"success": found, "feedback_kind": kind, "parse_ok": parsed, "valid": parsed}
        return seen, float(found), found, not found and self.steps >= 4, info

    def oracle(self):  # optional: demonstrations for full_demo
        return f"open {self.colour}" if self.read else "read note"

    def diagnose(self, trajectory):  # optional: reflection.reflector=rules
        world, found = NoteEnv(), []  # a replay, so that the running episode is left alone
        world.reset(trajectory.task_id)
        for number, turn in enumerate(trajectory.turns):
            right = world.oracle()
            hint = "Open the box that the note names." if world.read else "Read the note first."
            hint = "" if turn.action_text.strip().lower() == right else hint
            world.step(turn.action_text)
            found.append(Diagnosis(turn=number, hint=hint, corrected_action=hint and right))
        return found

    def close(self): ...
