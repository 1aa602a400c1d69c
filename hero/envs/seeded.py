"""What the worlds of other packages share: a task is a seed, and seeds of splits never meet."""

from __future__ import annotations

from typing import Any

SPLITS = {"test": 0, "dev": 1, "train": 2}
SEEDS = 1_000_000
"""Seeds of one split: it begins at its number in SPLITS times this."""


class Seeded:
    """Tasks `train-0`, `train-1`, …; each is a seed of the game.

    Args:
        max_steps: actions after which an episode is truncated.
        num_train, num_dev, num_test: tasks of each split.
    """

    def __init__(
        self, *, max_steps: int, num_train: int = 1000, num_dev: int = 100, num_test: int = 100
    ) -> None:
        self.sizes = {"train": num_train, "dev": num_dev, "test": num_test}
        for name, value in {"max_steps": max_steps, **self.sizes}.items():
            if not 1 <= value <= SEEDS:
                raise ValueError(f"{name}={value}; expected 1 to {SEEDS}.")
        self.max_steps, self._steps = max_steps, 0

    def tasks(self, split: str) -> list[str]:
        if split not in self.sizes:
            raise ValueError(f"split={split!r}; expected one of {', '.join(self.sizes)}.")
        return [f"{split}-{number}" for number in range(self.sizes[split])]

    def place(self, task_id: str) -> tuple[str, int]:
        """Split and number of a task; raises KeyError for an unknown one."""
        split, _, number = task_id.partition("-")
        if not number.isdecimal() or len(number) > 7 or int(number) >= self.sizes.get(split, 0):
            raise KeyError(f"no task {task_id!r}; tasks(split) lists them, e.g. 'train-0'")
        return split, int(number)

    def seed_of(self, task_id: str) -> int:
        split, number = self.place(task_id)
        return SPLITS[split] * SEEDS + number

    def cut(self, terminated: bool) -> bool:
        """Count an action; whether the episode is truncated behind it."""
        self._steps += 1
        return not terminated and self._steps >= self.max_steps


def chosen(text: str, actions: list[str]) -> str | None:
    """The action that an answer names: alone, or at its end; None if there is none."""
    said = " ".join(text.lower().split()).strip(" .`'\"[]")
    if said in actions:
        return said
    return max((a for a in actions if said.endswith(f" {a}")), key=len, default=None)


def available(actions: list[str]) -> str:
    """A line that lists them."""
    return f"Actions: {', '.join(actions)}."


Info = dict[str, Any]
