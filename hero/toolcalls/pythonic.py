"""Pythonic (Llama 3.2 and 4, Olmo 3): the whole answer is `[f(a=1, b=["x"]), g()]`.

Only literals are read, by an own reader: that of Python is neither linear nor safe from deep nests.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

from hero.toolcalls.base import ToolCall, Unreadable

EXAMPLE = '[name(argument="value")]'
MAX_DEPTH = 64
START = re.compile(r"\s*\[\s*(?:\]|[A-Za-z_])")
TOKEN = re.compile(
    r"""\s*(?:
    (?P<name>[A-Za-z_][\w.\-]*)
    |(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<string>"(?:[^"\\\n]|\\[\s\S])*"|'(?:[^'\\\n]|\\[\s\S])*')
    |(?P<mark>[\[\](){},:=])
    )""",
    re.VERBOSE,
)
CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


class _Reader:
    """Recursive descent over tokens; `kind` and `token` are the present one's."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0
        self.kind, self.token = "", ""
        self.next()

    def next(self) -> str:
        """Take the present token."""
        taken = self.token
        match = TOKEN.match(self.text, self.position)
        if match and match.lastgroup:
            self.kind, self.token = match.lastgroup, match[match.lastgroup]
            self.position = match.end()
        elif self.text[self.position : self.position + 200].strip():
            raise Unreadable(f"no Python literal at character {self.position}")
        else:
            self.kind, self.token = "end", ""
        return taken

    def take(self, mark: str) -> bool:
        """Take a mark if it stands here."""
        if self.kind != "mark" or self.token != mark:
            return False
        self.next()
        return True

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise Unreadable(f"expected {mark!r}, got {self.token[:40]!r}")

    def items(self, closing: str, item: Any) -> list[Any]:
        """Items up to `closing`, commas between them."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("the call is nested too deeply")
        found = []
        while not self.take(closing):
            found.append(item())
            if not self.take(","):
                self.expect(closing)
                break
        self.depth -= 1
        return found

    def call(self) -> ToolCall:
        name = self.name()
        self.expect("(")
        pairs = self.items(")", self.argument)
        if len(arguments := dict(pairs)) < len(pairs):
            raise Unreadable("an argument is named twice")
        return ToolCall(name=name, arguments=arguments)

    def name(self) -> str:
        if self.kind != "name":
            raise Unreadable(f"expected a name, got {self.token[:40]!r}")
        return self.next()

    def argument(self) -> tuple[str, Any]:
        name = self.name()
        self.expect("=")
        return name, self.value()

    def entry(self) -> tuple[str, Any]:
        key = self.value()
        if not isinstance(key, str):
            raise Unreadable("a key is no text")
        self.expect(":")
        return key, self.value()

    def value(self) -> Any:
        if self.take("["):
            return self.items("]", self.value)
        if self.take("("):
            return self.items(")", self.value)
        if self.take("{"):
            return dict(self.items("}", self.entry))
        if self.kind in ("string", "number"):
            return _literal(self.next())
        if self.kind == "name" and self.token in CONSTANTS:
            return CONSTANTS[self.next()]
        raise Unreadable(f"expected a literal, got {self.token[:40]!r}")


def _literal(token: str) -> Any:
    try:
        value = ast.literal_eval(token)
    except (ValueError, SyntaxError, MemoryError):
        raise Unreadable(f"{token[:40]!r} is no Python literal") from None
    if value in (math.inf, -math.inf):
        raise Unreadable(f"{token[:40]!r} is too large for a number")
    return value


def read(text: str) -> tuple[list[ToolCall], str]:
    """Calls, or the text: an answer is either."""
    if not START.match(text):
        if re.match(r"\s*[\[{]", text):
            raise Unreadable("a list or object that is not [name(argument=value)]")
        return [], text
    reader = _Reader(text)
    reader.expect("[")
    calls: list[ToolCall] = reader.items("]", reader.call)
    if reader.kind != "end":
        raise Unreadable("text follows the calls")
    if not calls:
        raise Unreadable("an empty list")
    return calls, ""


def write(calls: Sequence[ToolCall]) -> str:
    written = [
        f"{c.name}({', '.join(f'{key}={value!r}' for key, value in c.arguments.items())})"
        for c in calls
    ]
    return f"[{', '.join(written)}]"
