"""Llama 3: the whole answer is `{"name": "f", "parameters": {"a": 1}}`; `;` between several.

The special token <|python_tag|> before them is dropped when an answer is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

from hero.toolcalls.base import ToolCall, Unreadable, as_call, read_json, spaces, to_json

TAG = "<|python_tag|>"
EXAMPLE = '{"name": ..., "parameters": {...}}'


def read(text: str) -> tuple[list[ToolCall], str]:
    """Calls, or the text: an answer is either."""
    text = text.strip().removeprefix(TAG)
    position = spaces(text, 0)
    if text[position : position + 1] != "{":
        return [], text
    calls = []
    while True:
        value, end = read_json(text, position)
        calls.append(as_call(value, "parameters"))
        end = spaces(text, end)
        if end == len(text):
            return calls, ""
        if text[end] not in ";{":
            raise Unreadable("text follows the JSON")
        position = spaces(text, end + (text[end] == ";"))


def write(calls: Sequence[ToolCall]) -> str:
    return "; ".join(to_json(call, "parameters") for call in calls)
