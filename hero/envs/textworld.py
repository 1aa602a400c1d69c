"""TextWorld-Express: eight text games, in folds of their own, by a Java process."""

from __future__ import annotations

from typing import Any

from hero.envs.base import StepResult
from hero.envs.seeded import Info, Seeded, available
from hero.text import harmless
from hero.types import FeedbackKind

UNKNOWN = "Unknown action"
"""How an answer begins to what is not an action."""
MAX_ACTION = 500
"""Characters of an answer that are read."""


class TextWorldEnv(Seeded):
    """One game; not picklable, since a Java process (17 or newer) holds it.

    The reward is the gain of the game's score, which ends at 1. Tasks are the package's own seeds.

    Args:
        game: cookingworld, twc, coin, mapreader, arithmetic, sorting, simonsays or peckingorder.
        params: the game's own, "numLocations=3,includeDoors=0"; "" takes its defaults.
        actions: list the valid actions beneath each page.
        max_steps, num_train, num_dev, num_test: as for every seeded world.
    """

    def __init__(
        self, game: str = "coin", *, params: str = "", actions: bool = True, max_steps: int = 50,
        num_train: int = 100, num_dev: int = 50, num_test: int = 50,
    ) -> None:  # fmt: skip
        from textworld_express import TextWorldExpressEnv

        super().__init__(
            max_steps=max_steps, num_train=num_train, num_dev=num_dev, num_test=num_test
        )
        self._world: Any = TextWorldExpressEnv(envStepLimit=max_steps + 1)
        games = list(self._world.getGameNames())
        if game not in games:
            self.close()
            raise ValueError(f"game={game!r}; expected one of {', '.join(games)}.")
        self._world.load(game, params)
        seeds = {"train": self._world.getValidSeedsTrain, "dev": self._world.getValidSeedsDev,
                 "test": self._world.getValidSeedsTest}  # fmt: skip
        self.seeds = {split: sorted(ask())[: self.sizes[split]] for split, ask in seeds.items()}
        self.actions, self._gold, self._score = actions, list[str](), 0.0

    @property
    def system_prompt(self) -> str:
        return f"{self._world.getTaskDescription()}\nAnswer with one action and nothing else."

    def reset(self, task_id: str) -> tuple[str, Info]:
        split, number = self.place(task_id)
        if number >= len(self.seeds[split]):
            raise KeyError(f"no task {task_id!r}")
        seen, info = self._world.reset(
            seed=self.seeds[split][number], gameFold=split, generateGoldPath=True
        )
        self._steps, self._score = 0, 0.0
        self._gold, self._on_path = list(self._world.getGoldActionSequence()), True
        instruction = str(info["taskDescription"])
        return f"{instruction}\n{self._words(seen, info)}", {"instruction": instruction}

    def step(self, text: str) -> StepResult:
        action = " ".join(harmless(text[:MAX_ACTION]).lower().split())
        self._on_path = self._on_path and self._gold[self._steps : self._steps + 1] == [action]
        seen, _, done, info = self._world.step(action)
        gain, self._score = float(info["score"]) - self._score, float(info["score"])
        ended = bool(done) and (info["tasksuccess"] or info["taskfailure"])
        bad = str(seen).startswith(UNKNOWN)
        said = {
            "valid": not bad, "success": bool(info["tasksuccess"]),
            "feedback_kind": FeedbackKind.INVALID_ACTION if bad else FeedbackKind.OK,
        }  # fmt: skip
        return self._words(seen, info), gain, bool(ended), self.cut(bool(ended)), said

    def oracle(self) -> str:
        """The next action of the package's gold path; off the path there is none to give."""
        rest = self._gold[self._steps :] if self._on_path else []
        return rest[0] if rest else "look around"

    def _words(self, seen: Any, info: Info) -> str:
        if not self.actions:
            return str(seen)
        return f"{seen}\n{available(sorted(info['validActions']))}"

    def close(self) -> None:
        self._world.close()
