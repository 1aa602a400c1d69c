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
    "FORMATS", "Parsed", "ToolCall", "check_format", "example", "format_of", "parse_calls",
    "write_calls",
]  # fmt: skip

FORMATS: dict[str, ModuleType] = {
    "hermes": hermes, "llama": llama, "pythonic": pythonic, "react": react,
}  # fmt: skip


def check_format(name: str) -> str:
    """`name`; raises ValueError unless it is a format."""
    if name not in FORMATS:
        raise ValueError(f"Unknown tool format {name!r}: expected one of {', '.join(FORMATS)}.")
    return name


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
    module = FORMATS[check_format(format)]
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
    return str(FORMATS[check_format(format)].write(calls))


def example(format: str) -> str:
    """How a call looks, for a message about one that could not be read."""
    return str(FORMATS[check_format(format)].EXAMPLE)
