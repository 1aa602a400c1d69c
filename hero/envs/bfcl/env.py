"""BFCL's multi-turn tasks as an environment: function calling over several requests of a user.

What differs from the package's own runner stands in docs/environments/bfcl.md.
"""

from __future__ import annotations

import json
from typing import Any

from hero.envs.base import StepResult
from hero.envs.bfcl.package import (
    CATEGORIES,
    DEV_DIGITS,
    TASKS,
    TEST_DIGITS,
    VERSION,
    load_package,
)
from hero.envs.bfcl.world import World
from hero.toolcalls import Parsed, ToolCall, parse_calls, unreadable, write_calls
from hero.types import FeedbackKind

FINISHED = "Everything you asked for is done."
OVER = "The conversation is over."


class BfclEnv:
    """BFCL v4 multi-turn; picklable, also within an episode.

    The user's requests are scripted. An answer without a call ends a request, and the next one
    follows. The reward is the package's verdict, 0 or 1, paid when the last request has ended.

    Args:
        category: "base", "miss_func", "miss_param", "long_context", or "all".
        data_dir: folder of the unpacked package; "" is where `hero envs get bfcl` puts it.

    Raises:
        ValueError: another category, or the package is missing.
    """

    workers = "processes"  # power(7, 8000000) holds Python for seconds, mpmath has one precision

    def __init__(self, category: str = "base", *, data_dir: str = "") -> None:
        if category not in (*CATEGORIES, "all"):
            raise ValueError(f"category={category!r}; expected {', '.join(CATEGORIES)} or all.")
        self.category, self.data_dir, self.tool_format = category, data_dir, "react"
        self._package = load_package(data_dir)
        self._world: World | None = None
        self._said: list[str] = []
        self._planned = False

    @property
    def system_prompt(self) -> str:
        return self._package.rules

    def facts(self) -> dict[str, str]:
        return {"environment": f"bfcl multi-turn {self.category}, bfcl-eval {VERSION}",
                "user_simulator": "scripted by the data"}  # fmt: skip

    def tasks(self, split: str) -> list[str]:
        """Train, dev and test have 100, 20 and 80 scenarios, the same ones in each category."""
        if split not in ("train", "dev", "test"):
            raise ValueError(f"split={split!r}; expected train, dev or test.")
        numbers = [n for n in range(TASKS) if _split(n) == split]
        chosen = CATEGORIES if self.category == "all" else (self.category,)
        return [f"multi_turn_{name}_{n}" for name in chosen for n in numbers]

    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the task's APIs, without functions that are still to come; [] before one."""
        if self._world is None:
            return []
        task = self._world.task
        hidden = {name for names in task.get("missed_function", {}).values() for name in names}
        return [tool for tool in self._schemas() if tool["function"]["name"] not in hidden]

    def _schemas(self) -> list[dict[str, Any]]:
        assert self._world is not None
        apis = self._world.task["involved_classes"]
        return [tool for api in apis for tool in self._package.schemas[api]]

    # ---- an episode -----------------------------------------------------------------------------

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        """Start a task: the user's first request."""
        if task_id not in self._package.tasks:
            raise KeyError(f"bfcl has no task {task_id!r}; e.g. 'multi_turn_base_0'")
        self._world = World(self._package, self._package.tasks[task_id])
        self._said, self._planned = [], False
        first = self._request()
        return first, {"task_id": task_id, "instruction": first, **self.facts()}

    def _request(self) -> str:
        """The user's next words: a request, or functions that are there from now on."""
        assert self._world is not None
        task, turn = self._world.task, self._world.turn
        if names := task.get("missed_function", {}).get(str(turn)):
            new = [
                tool["function"] for tool in self._schemas() if tool["function"]["name"] in names
            ]
            return f"{json.dumps(new)}\n{self._package.more_functions}"
        return "\n".join(message["content"] for message in task["question"][turn])

    def step(self, text: str) -> StepResult:
        """Take the agent's turn: calls, or an answer that ends the request.

        Raises:
            RuntimeError: there is no episode, or it has ended; call reset first.
        """
        world = self._world
        if world is None or world.turn == len(world.task["question"]):
            raise RuntimeError("No episode is under way; call reset(task_id) first.")
        self._said.append(text)
        world.steps += 1
        parsed = parse_calls(text, self.tool_format)
        role = "tool"
        if not parsed.parse_ok:
            kind, seen = FeedbackKind.PARSE_ERROR, unreadable(parsed, self.tool_format)
        elif parsed.calls:
            kind, seen = self._call(parsed)
        else:
            kind, seen, role = self._end(world)
        done = world.turn == len(world.task["question"])
        cut = world.steps > self._package.max_steps
        if cut:
            world.turn = len(world.task["question"])
        success = done and not world.fault
        info = {
            "valid": kind in (FeedbackKind.OK, FeedbackKind.DONE), "parse_ok": parsed.parse_ok,
            "feedback_kind": FeedbackKind.BUDGET if cut else kind, "role": role,
            "success": success, "executed_action": text.strip() if parsed.parse_ok else None,
        }  # fmt: skip
        return seen, float(success), done, cut, info

    def _call(self, parsed: Parsed) -> tuple[FeedbackKind, str]:
        assert self._world is not None
        answers = self._world.call(parsed.calls)
        failed = any(answer.startswith(("Error during", '{"error":')) for answer in answers)
        kind = FeedbackKind.INVALID_ACTION if failed else FeedbackKind.OK
        return kind, "\n".join(answers)

    def _end(self, world: World) -> tuple[FeedbackKind, str, str]:
        world.end_turn()
        self._planned = False
        if world.turn < len(world.task["question"]):
            return FeedbackKind.OK, self._request(), "user"
        if world.fault:
            return FeedbackKind.INSUFFICIENT, f"{OVER} {world.fault}", "tool"
        return FeedbackKind.DONE, OVER, "tool"

    def oracle(self) -> str:
        """The gold calls of the present request, then words that end it."""
        if self._world is None:
            raise RuntimeError("No episode has begun; call reset(task_id) first.")
        gold = self._world.task["gold"][self._world.turn]
        if self._planned or not gold:
            return FINISHED
        self._planned = True
        calls: list[ToolCall] = [self._world.own.as_call(expression) for expression in gold]
        return write_calls(calls, self.tool_format)

    def close(self) -> None:
        """Leave the episode."""
        self._world = None

    def __getstate__(self) -> dict[str, Any]:
        """An episode is what was said in it: the APIs are deterministic and do not travel."""
        kept = {**self.__dict__, "_package": None}
        return {**kept, "_world": self._world.task["id"] if self._world else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._package = load_package(self.data_dir)
        task, said, planned = state["_world"], state["_said"], state["_planned"]
        self._world = None
        if task:
            self.reset(task)
            for text in said:
                self.step(text)
            self._planned = planned


def _split(number: int) -> str:
    digit = str(number)[-1]
    return "test" if digit in TEST_DIGITS else "dev" if digit in DEV_DIGITS else "train"
