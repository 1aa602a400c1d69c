"""A world for tests of workers; processes import it, so it imports next to nothing."""

from __future__ import annotations

import builtins
import os
import threading
import time
from typing import Any


class World:
    """Two turns and the end; a task is named by what its second step does."""

    system_prompt = ""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.task, self.turn = "", 0

    def tasks(self, split: str) -> list[str]:
        return ["fine"]

    def reset(self, task_id: str) -> Any:
        self.task, self.turn = task_id, 0
        return f"{os.getpid()} {self.thread == threading.get_ident()}", {"instruction": "go"}

    def step(self, text: str) -> Any:
        self.turn += 1
        if self.turn == 2 and "raise" in self.task:
            raise ValueError("broke")
        if self.turn == 2 and "hang" in self.task:
            time.sleep(60)
        if self.turn == 2 and "die" in self.task:
            os._exit(3)
        if "interrupt" in self.task:
            raise KeyboardInterrupt
        return "seen", 0.5, self.turn == 2, False, {"success": self.turn == 2}

    def lock(self) -> Any:
        """What cannot be pickled."""
        return threading.Lock()

    def close(self) -> None:
        if self.task.startswith("close "):  # and the file that it writes
            with open(self.task[6:], "a") as file:
                file.write("closed\n")
        if "stay" in self.task:
            raise OSError("stuck")


class Unmade(World):
    """Raises when it is made."""

    def __init__(self, error: str) -> None:
        raise getattr(builtins, error)("no disk")


class Unready(World):
    """Is made for a minute."""

    def __init__(self) -> None:
        time.sleep(60)
