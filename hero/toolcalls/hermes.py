"""Hermes and Qwen: `<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>`, any number."""

from __future__ import annotations

from collections.abc import Sequence

from hero.toolcalls.base import ToolCall, Unreadable, as_calls, read_json, spaces, to_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"
EXAMPLE = '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'


def read(text: str) -> tuple[list[ToolCall], str]:
    """Calls, and the text around them."""
    if text.lstrip().startswith("{"):
        raise Unreadable(f"a JSON object without {OPEN} around it")
    calls: list[ToolCall] = []
    said, position = [], 0
    while (start := text.find(OPEN, position)) >= 0:
        said.append(text[position:start])
        value, end = read_json(text, spaces(text, start + len(OPEN)))
        calls += as_calls(value)
        position = spaces(text, end)
        if not text.startswith(CLOSE, position):
            raise Unreadable(f"no {CLOSE} after the JSON")
        position += len(CLOSE)
    return calls, "".join([*said, text[position:]])


def write(calls: Sequence[ToolCall]) -> str:
    return "\n".join(f"{OPEN}\n{to_json(call)}\n{CLOSE}" for call in calls)
