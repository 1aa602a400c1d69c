"""A plain Python class as a world: its public methods are the tools of the agent.

The shape is that of TRL's `environment_factory`: `reset(**row)` returns the first words to the
agent, or None; docstrings and type hints of the other methods become the schemas of tools. What
ends an episode and what it pays stands in docs/environments/generic.md.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from hero.envs.base import StepResult, raised
from hero.envs.registry import World, load
from hero.envs.rows import SPLITS, read_rows
from hero.toolcalls import ToolCall, parse_calls, unreadable
from hero.types import FeedbackKind

NO_TOOLS = ("reset", "tasks", "close", "done", "reward", "success", "system_prompt")


class ToolsEnv:
    """An object of a class of yours; picklable if it is.

    Args:
        factory: the class, or `module:Class`.
        data: JSON lines, a row for each task: keywords of `reset`, and optionally `prompt`, `split`
            ("train", "dev", "test"; else each tenth row is test, the one behind it dev). Without
            it the class has `tasks`, rows of each split.
        max_steps: answers after which the episode is truncated.
        options: further options go to the class.

    Raises:
        ValueError: the class cannot be used so; with what is missing.
    """

    def __init__(
        self, factory: str | Callable[..., Any] = "", *, data: str = "", max_steps: int = 15,
        **options: Any,
    ) -> None:  # fmt: skip
        if not factory:
            raise ValueError("tools needs a class: --env.options.factory module:Class.")
        self.max_steps, self.tool_format = max_steps, "react"
        self._world = load(World(factory=factory))(**options)
        rows = read_rows(data) if data else getattr(self._world, "tasks", None)
        if not isinstance(rows, Mapping) or set(rows) != set(SPLITS):
            raise ValueError(
                f"{factory} needs `tasks`, a dict of rows for train, dev and test, or the option "
                f"data=FILE.jsonl; got {type(rows).__name__}."
            )
        self._rows = {f"{split}-{i}": row for split in SPLITS for i, row in enumerate(rows[split])}
        self._ended, self._steps = True, 0
        self.tools()  # a method without a docstring is said at once

    @property
    def system_prompt(self) -> str:
        return str(getattr(self._world, "system_prompt", "") or "")

    def tasks(self, split: str) -> list[str]:
        return [task for task in self._rows if task.startswith(f"{split}-")]

    def tools(self) -> list[dict[str, Any]]:
        """OpenAI schemas of the public methods, from docstrings and type hints."""
        from transformers.utils import get_json_schema

        found = []
        for name, method in self._methods().items():
            try:
                schema = get_json_schema(method)
            except Exception as error:
                raise ValueError(
                    f"The tool {name} of {type(self._world).__name__} needs a type hint for each "
                    f"argument and a docstring with `Args:`. {raised(error)}"
                ) from error
            schema["function"].pop("return", None)  # which OpenAI's schemas do not have
            found.append(schema)
        return found

    def _methods(self) -> dict[str, Callable[..., Any]]:
        names = [name for name, _ in inspect.getmembers(type(self._world), inspect.isfunction)]
        return {name: getattr(self._world, name) for name in names
                if not name.startswith("_") and name not in NO_TOOLS}  # fmt: skip

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        row = dict(self._rows[task_id])
        prompt = row.pop("prompt", "")
        said = self._world.reset(**row)
        self._ended, self._steps = False, 0
        first = "\n".join(text for text in (prompt, said) if text)
        return first, {"task_id": task_id, "instruction": prompt or first}

    def step(self, text: str) -> StepResult:
        """Take calls; an answer without one ends the episode.

        Raises:
            RuntimeError: there is no episode, or it has ended; call reset first.
        """
        if self._ended:
            raise RuntimeError("No episode is under way; call reset(task_id) first.")
        self._steps += 1
        parsed = parse_calls(text, self.tool_format)
        if not parsed.parse_ok:
            seen = unreadable(parsed, self.tool_format)
            kinds = [FeedbackKind.PARSE_ERROR]
        else:
            answers = [self._call(call) for call in parsed.calls]
            seen = "\n".join(answer for answer, _ in answers)
            kinds = [kind for _, kind in answers]
        over = parsed.parse_ok and not parsed.calls
        terminated = over or bool(self._value("done", False))
        truncated = not terminated and self._steps >= self.max_steps
        self._ended = terminated or truncated
        reward = float(self._value("reward", 0.0)) if self._ended else 0.0
        kind = next((kind for kind in kinds if kind is not FeedbackKind.OK), FeedbackKind.OK)
        info = {
            "feedback_kind": kind, "valid": kind is FeedbackKind.OK, "parse_ok": parsed.parse_ok,
            "role": "tool", "executed_action": text if parsed.calls else None,
            "success": bool(self._value("success", reward >= 1.0)) if self._ended else False,
        }  # fmt: skip
        return seen or "The episode is over.", reward, terminated, truncated, info

    def _call(self, call: ToolCall) -> tuple[str, FeedbackKind]:
        methods = self._methods()
        if call.name not in methods:
            said = f"Error: no tool {call.name!r}; there are {', '.join(methods)}."
            return said, FeedbackKind.INVALID_ACTION
        try:
            answer = methods[call.name](**call.arguments)
        except Exception as error:  # what a tool refuses is for the agent to read
            return f"Error: {type(error).__name__}: {error}", FeedbackKind.INVALID_ACTION
        if isinstance(answer, str):
            return answer, FeedbackKind.OK
        return json.dumps(answer, ensure_ascii=False, default=str), FeedbackKind.OK

    def _value(self, name: str, default: Any) -> Any:
        value = getattr(self._world, name, default)
        return value() if callable(value) else value

    def close(self) -> None:
        getattr(self._world, "close", lambda: None)()
