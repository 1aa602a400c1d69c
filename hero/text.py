"""Text from elsewhere: harmless for tokenizer, terminal and files, and not without end."""

from __future__ import annotations

import re
from collections.abc import Mapping

ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # titles, links
    r"|\x1b[ -/]*[0-~]"
)
LINE_BREAKS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
FORBIDDEN = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, directions that reorder a line, and halves of surrogate pairs."""


def harmless(text: str) -> str:
    """`text` without escape sequences; other characters that no text needs become U+FFFD.

    Line breaks of every kind become a newline; tabs stay.
    """
    if text.isascii() and text.isprintable():  # the usual case
        return text
    return FORBIDDEN.sub("\ufffd", LINE_BREAKS.sub("\n", ESCAPES.sub("", text)))


def shorten(text: str, limit: int) -> str:
    """`text`, or its first two thirds and its end with what was cut said between them."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    tail = limit - head
    return f"{text[:head]}\n[{len(text) - limit} characters cut]\n{text[len(text) - tail :]}"


def in_words(world: Mapping[str, str]) -> str:
    """Facts of a world (`HasFacts`) as one line."""
    return "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in world.items())
