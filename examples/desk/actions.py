"""What the agent wrote: one tool call, or words for the customer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_OPEN = re.compile(r"<tool_call>|```(?:json)?\s*(?=\{)")
_CLOSE_TAG, _CLOSE_FENCE = re.compile(r"</tool_call>"), re.compile(r"(?<=\})\s*```")


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "arguments": self.arguments})


@dataclass(frozen=True, slots=True)
class Action:
    """One turn of the agent. With `call` it is a tool call, else `text` goes to the customer."""

    text: str
    call: ToolCall | None = None
    parse_ok: bool = True
    """False where a tool call was evidently meant but cannot be read."""


def parse_action(text: str) -> Action:
    """Read one turn; never raises.

    A call is one JSON object `{"name": str, "arguments": object}`, bare, in a code fence or in a
    `<tool_call>` tag; words around a fence or tag are ignored, two calls in one turn are an error.
    """
    text = _THOUGHT.sub("", text).strip()
    inside = wrapped(text)
    candidates = inside or [text]
    calls = [call for call in map(_read_call, candidates) if call is not None]
    if len(calls) == len(candidates) == 1:
        return Action(text, call=calls[0])
    looks_like_call = bool(inside) or text.startswith("{")
    looks_like_call |= any(sign in text for sign in ('"name"', '"arguments"', "<tool_call>"))
    return Action(text, parse_ok=not looks_like_call)


def wrapped(text: str) -> list[str]:
    """What stands in tags and fences. Each part of the text is looked at once, however it goes on:
    where one opening is never closed, none after it is."""
    found: list[str] = []
    at = 0
    closed = {"<": _CLOSE_TAG, "`": _CLOSE_FENCE}
    for opening in _OPEN.finditer(text):
        kind = opening[0][0]
        if opening.start() < at or kind not in closed:
            continue
        # A fence holds at least its two braces.
        closing = closed[kind].search(text, opening.end() + (kind == "`"))
        if closing is None:
            del closed[kind]
        else:
            found.append(text[opening.end() : closing.start()])
            at = closing.end()
    return found


def _read_call(text: str) -> ToolCall | None:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        return None
    if not isinstance(data, dict) or set(data) != {"name", "arguments"}:
        return None
    name, arguments = data["name"], data["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments)
