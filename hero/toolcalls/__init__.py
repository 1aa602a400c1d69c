"""Tool calls in the text of an answer: a module a format reads and writes them.

`parse_calls` reads what a model wrote, in time linear in its length; `write_calls` writes the same
text that it would have written, for oracles and corrections; `format_of` finds the format that a
chat template speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from hero.toolcalls import hermes, llama, pythonic, react
from hero.toolcalls.base import (
    MAX_CALLS,
    Parsed,
    ToolCall,
    Unreadable,
    speech,
    strip_thoughts,
)
from hero.toolcalls.templates import format_of

__all__ = [
    "FORMATS", "Parsed", "ToolCall", "example", "format_of", "parse_calls", "unreadable",
    "write_calls",
]  # fmt: skip

FORMATS: dict[str, ModuleType] = {
    "hermes": hermes, "llama": llama, "pythonic": pythonic, "react": react,
}  # fmt: skip


def _module(format: str) -> ModuleType:
    if format not in FORMATS:
        raise ValueError(f"Unknown tool format {format!r}: expected one of {', '.join(FORMATS)}.")
    return FORMATS[format]


def parse_calls(text: str, format: str) -> Parsed:
    """Calls and speech of an answer.

    Args:
        text: what the model wrote, special tokens left out.
        format: "hermes", "llama", "pythonic" or "react".

    Returns:
        `parse_ok=False` if a call was meant and cannot be read; never raises for a text.

    Raises:
        ValueError: unknown format.
    """
    module = _module(format)
    try:
        calls, rest = module.read(strip_thoughts(text))
        if not (len(calls) <= MAX_CALLS):
            raise Unreadable(f"{len(calls)} calls in one answer; expected at most {MAX_CALLS}")
        return Parsed(calls=tuple(calls), text=speech(rest))
    except Unreadable as error:
        return Parsed(text=text, parse_ok=False, error=str(error))


def write_calls(calls: Sequence[ToolCall], format: str) -> str:
    """The text that `parse_calls` reads as these calls.

    Raises:
        ValueError: unknown format.
    """
    return str(_module(format).write(calls))


def example(format: str) -> str:
    """How a call looks, for a message about one that could not be read."""
    return str(_module(format).EXAMPLE)


def unreadable(parsed: Parsed, format: str) -> str:
    """What a world answers to a call that could not be read."""
    return f"Error: the call could not be read: {parsed.error}. Write {example(format)}"
