"""Text worlds of gymnasium: discrete actions get names, states become words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hero.envs.base import StepResult
from hero.envs.registry import World, load
from hero.envs.seeded import Info, Seeded, available, chosen
from hero.types import FeedbackKind

NAMES = {
    "FrozenLake": "left,down,right,up",
    "Taxi": "south,north,east,west,pickup,dropoff",
    "CliffWalking": "up,right,down,left",
    "Blackjack": "stick,hit",
}
"""Actions of gymnasium's toy worlds, in the order of their numbers."""
COLOUR = re.compile(r"\x1b\[[\d;]*m([^\x1b]*)\x1b\[0m")


class GymEnv(Seeded):
    """One world of gymnasium whose actions are a number; picklable if the world is.

    Args:
        id: as gymnasium.make takes it.
        actions: names of the actions in the order of their numbers, with commas between; "" for
            those of gymnasium's toy worlds, else `action 0`, `action 1`, …
        describe: `module:function` of your own that puts a state into words: (observation, world)
            to text; "" takes the world's `ansi` rendering, else the observation as it prints.
        rules: said to the agent before the list of actions.
        success: "positive": the last reward is above 0; "terminated": the end is reached.
        max_steps, num_train, num_dev, num_test: as for every seeded world.
        options: further options go to gymnasium.make.
    """

    def __init__(
        self, id: str = "FrozenLake-v1", *, actions: str = "", describe: str = "", rules: str = "",
        success: str = "positive", max_steps: int = 50, num_train: int = 1000, num_dev: int = 100,
        num_test: int = 100, **options: Any,
    ) -> None:  # fmt: skip
        import gymnasium as installed

        gymnasium: Any = installed  # typed or not there at all: checked alike

        super().__init__(
            max_steps=max_steps, num_train=num_train, num_dev=num_dev, num_test=num_test
        )
        if success not in ("positive", "terminated"):
            raise ValueError(f"success={success!r}; expected 'positive' or 'terminated'.")
        self.rules, self.success = rules, success
        try:
            modes = gymnasium.spec(id).entry_point and gymnasium.make(id).metadata["render_modes"]
            self._ansi = not describe and "ansi" in modes
            mode = {"render_mode": "ansi"} if self._ansi else {}
            self._world = gymnasium.make(id, **mode, **options)
        except gymnasium.error.Error as error:
            raise ValueError(f"gymnasium cannot make {id!r}: {error}") from error
        number = getattr(self._world.action_space, "n", None)
        if number is None:
            raise ValueError(f"{id} has no discrete actions: {self._world.action_space}.")
        names = actions or NAMES.get(id.partition("-")[0], "")
        self.names = [name.strip().lower() for name in names.split(",")] if names else [
            f"action {i}" for i in range(int(number))
        ]  # fmt: skip
        if len(self.names) != number:
            raise ValueError(f"{id} has {number} actions, got names for {len(self.names)}.")
        self._describe: Callable[..., Any] | None = (
            load(World(factory=describe)) if describe else None
        )

    @property
    def system_prompt(self) -> str:
        return f"{self.rules}\nAnswer with one action. {available(self.names)}".strip()

    def reset(self, task_id: str) -> tuple[str, Info]:
        observation, info = self._world.reset(seed=self.seed_of(task_id))
        self._steps = 0
        return self._words(observation, info), {"task_id": task_id}

    def step(self, text: str) -> StepResult:
        action = chosen(text, self.names)
        if action is None:
            seen = f"That is not an action. {available(self.names)}"
            said = {"valid": False, "parse_ok": False, "feedback_kind": FeedbackKind.PARSE_ERROR}
            return seen, 0.0, False, self.cut(False), said
        answer = self._world.step(self.names.index(action))
        observation, reward, terminated, truncated, info = answer
        truncated = self.cut(bool(terminated)) or (bool(truncated) and not terminated)
        won = bool(terminated) and (self.success == "terminated" or reward > 0)
        said = {"executed_action": action, "success": won}
        return self._words(observation, info), float(reward), bool(terminated), truncated, said

    def _words(self, observation: Any, info: Info) -> str:
        if self._describe is not None:
            text = str(self._describe(observation, self._world))
        elif self._ansi:  # what a terminal marks by colour stands in angle brackets
            text = COLOUR.sub(r"<\1>", str(self._world.render())).strip()
        else:
            text = str(observation)
        mask = info.get("action_mask")
        if mask is None:
            return text
        return f"{text}\n{available([n for n, on in zip(self.names, mask, strict=True) if on])}"

    def close(self) -> None:
        self._world.close()
