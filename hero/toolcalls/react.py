"""ReAct with JSON, for templates without tools: `Action: {"name": "f", "arguments": {"a": 1}}`.

A thought may stand before it. The schemas stand in the system prompt, and so does the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from hero.toolcalls.base import ToolCall, read_calls, to_json

ACTION = re.compile(r"^[ \t]*Action:", re.MULTILINE)
THOUGHT = re.compile(r"^[ \t]*Thought:", re.MULTILINE)
FENCE = "```"
EXAMPLE = 'Action: {"name": ..., "arguments": {...}}'
RULES = """\

# Tools

You may call these tools; each line is the JSON schema of one:
{schemas}

To call a tool, write one line and nothing after it:
Action: {{"name": "the tool's name", "arguments": {{"argument": "value"}}}}
Whatever you write without "Action:" is said to the user."""


def read(text: str) -> tuple[list[ToolCall], str]:
    """Calls, and what is said where there is none; a JSON object alone is a call too."""
    if action := ACTION.search(text):
        calls, before = text[action.end() :], text[: action.start()]
        return read_calls(_unfenced(calls)), THOUGHT.sub("", before)
    alone = text.strip()
    if alone.startswith(("{", FENCE)):
        return read_calls(_unfenced(alone)), ""
    return [], THOUGHT.sub("", text, count=1)


def _unfenced(text: str) -> str:
    """`text` without the Markdown fence around it."""
    text = text.strip()
    if not text.startswith(FENCE):
        return text
    return text.removeprefix(FENCE).removeprefix("json").removesuffix(FENCE)


def write(calls: Sequence[ToolCall]) -> str:
    if len(calls) == 1:
        return f"Action: {to_json(calls[0])}"
    return f"Action: [{', '.join(to_json(call) for call in calls)}]"


def rules(tools: Sequence[dict[str, Any]]) -> str:
    """What a system prompt says of the tools (OpenAI schemas) and of how they are called."""
    lines = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools]
    return RULES.format(schemas="\n".join(lines))


def with_rules(
    messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]]
) -> list[dict[str, str]]:
    """`messages` with the tools' rules at the end of the system prompt, or as a new one."""
    first, rest = ("", list(messages))
    if messages[0]["role"] == "system":
        first, rest = messages[0]["content"], list(messages[1:])
    return [{"role": "system", "content": f"{first}\n{rules(tools)}".strip()}, *rest]
