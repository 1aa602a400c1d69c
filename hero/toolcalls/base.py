"""The nouns of tool calls, and what the readers of all formats share."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

MAX_CALLS = 64
"""Calls in one answer: more are a loop of the model, not a plan."""


class Unreadable(Exception):
    """Text that was meant as a call and cannot be read as one."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ToolCall:
    """One call: a name and its arguments as JSON values."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, frozen=True, slots=True)
class Parsed:
    """What an answer says.

    An answer that cannot be read has `parse_ok=False`, no calls, the reason in `error`, and all of
    its text in `text`, which then is not speech: nobody may be told it as if it were.
    """

    calls: tuple[ToolCall, ...] = ()
    text: str = ""
    """What is said besides the calls, without thoughts."""
    parse_ok: bool = True
    error: str = ""


def read_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value at `start` and where it ends.

    Raises:
        Unreadable: there is none; NaN and infinities are none either.
    """
    try:
        return DECODER.raw_decode(text, start)
    except RecursionError:
        raise Unreadable("the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Unreadable(
            f"the JSON breaks off: {error.msg}, character {error.pos - start}"
        ) from None
    except ValueError as error:  # NaN, numbers of thousands of digits
        raise Unreadable(f"the JSON holds {str(error)[:80]}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is no JSON value")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits[:20]}, which is too large for a number")
    return number


DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def as_call(value: Any, key: str = "arguments") -> ToolCall:
    """A call of `{"name": ..., key: {...}}`; without `key` it has no arguments."""
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        raise Unreadable(f'expected an object with "name" and "{key}"')
    if unknown := sorted(set(value) - {"name", key, "id", "type"}):
        raise Unreadable(f'expected "name" and "{key}" alone, got {unknown[0][:40]!r} too')
    arguments = value.get(key, {})
    if not isinstance(arguments, dict):
        raise Unreadable(f'"{key}" is no JSON object')
    return ToolCall(name=name, arguments=arguments)


def read_calls(text: str, key: str = "arguments") -> list[ToolCall]:
    """The calls of a text that is one JSON object, or a list of them, and nothing else."""
    text = text.strip()
    value, end = read_json(text)
    if text[end:].strip():
        raise Unreadable("text follows the JSON")
    return as_calls(value, key)


def as_calls(value: Any, key: str = "arguments") -> list[ToolCall]:
    """A call, or a list of at least one."""
    found = [as_call(item, key) for item in (value if isinstance(value, list) else [value])]
    if not found:
        raise Unreadable("an empty list")
    return found


SPACE = re.compile(r"\s*")
MARKS = re.compile(
    r"</?tool_call>|<function|\[TOOL_CALLS\]|<\|python_tag\|>"
    r'|"name"\s*:\s*"|^[ \t]*Action:',
    re.MULTILINE,
)
"""What only calls hold: in speech it is a call that its format does not allow there."""
CALL = re.compile(r"\[?\w[\w.]*\(\s*(\w+\s*=.*)?\)\]?", re.DOTALL)
"""A call as Python has it: nobody speaks so."""


def strip_thoughts(text: str) -> str:
    """`text` after its last `</think>`."""
    before, end, after = text.rpartition("</think>")
    if "<think>" in after:
        raise Unreadable("a thought that does not end")
    return after if end else before + after


def speech(text: str) -> str:
    """`text` as what is said to somebody; raises Unreadable if it holds a call."""
    if mark := MARKS.search(text) or CALL.fullmatch(text.strip()):
        raise Unreadable(f"{mark[0].strip()[:40]!r} stands where no call can be read")
    return text.strip()


def to_json(call: ToolCall, key: str = "arguments") -> str:
    return json.dumps({"name": call.name, key: call.arguments}, ensure_ascii=False)


def spaces(text: str, position: int) -> int:
    """The first place from `position` on that is no white space."""
    match = SPACE.match(text, position)
    assert match is not None
    return match.end()
