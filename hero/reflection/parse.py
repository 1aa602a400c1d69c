"""From what a model wrote to diagnoses: tolerant of everything, trusting nothing.

Objects are read one by one wherever they stand: in JSON lines, in an array, inside another object,
between Markdown fences, before or after prose. One that is no valid JSON is repaired alone, so that
a slip costs one turn and not the episode.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from hero.types import Diagnosis

MAX_CHARS = 100_000
"""Of an answer without its thoughts: nothing after them is read."""
MAX_BRACES = 2000
"""Opening braces that are tried: every turn of a long episode has a handful."""
MAX_OBJECT_CHARS = 4096
"""No diagnosis is longer; bounds what one opening brace can cost."""

THINK_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
THINK_BEGIN = re.compile(r"\s*<think(?:ing)?>", re.IGNORECASE)
DIAGNOSIS_BEGIN = re.compile(r"\{(?:[^{}]*?,)?[\s\"'“”]*turn[\s\"'“”]*:", re.IGNORECASE)
"""An opening brace and, before any other brace, the key `turn`: however its quotes came out."""
TURN_NUMBER = re.compile(r"(?:turn)?[\s#]*([0-9]{1,6})(?:\.0+)?", re.IGNORECASE)

TRUE_WORDS = frozenset({"true", "yes", "y", "1", "1.0"})
FALSE_WORDS = frozenset({"false", "no", "n", "0", "0.0"})
EMPTY_WORDS = frozenset({"none", "null", "nil", "n/a", "na", "empty", "-"})
"""What models write where they were asked to leave a text empty."""

DECODER = json.JSONDecoder(strict=False)  # line breaks inside strings are let through


def parse_diagnoses(text: str, num_turns: int) -> list[Diagnosis]:
    """Read the diagnoses of one episode out of a model's answer. Never raises, whatever the text.

    Turns are numbered from 1 in the text and from 0 in the result. Turns out of range are dropped,
    of several diagnoses of one turn the first is kept, unknown keys are ignored. Turns without a
    fault may be left out or written with empty fields.

    Args:
        text: the answer, thoughts included.
        num_turns: number of turns of the episode.

    Returns:
        The diagnoses in the order of their turns, without `source`.
    """
    found: dict[int, Diagnosis] = {}
    for item in _objects(_without_thoughts(text)[:MAX_CHARS]):
        turn = _turn_number(item["turn"])
        if turn is not None and 1 <= turn <= num_turns and turn - 1 not in found:
            found[turn - 1] = Diagnosis(
                turn=turn - 1,
                necessary=_flag(item.get("necessary")),
                valid=_flag(item.get("valid")),
                failure_cause=" ".join(_text(item.get("failure_cause")).split()),
                corrected_action=_text(item.get("corrected_action")),
                hint=" ".join(_text(item.get("hint")).split()),
            )
    return [found[turn] for turn in sorted(found)]


def says_faultless(text: str) -> bool:
    """Whether an answer says, as the request asks it to, that no turn has a fault: turn 0."""
    objects = _objects(_without_thoughts(text)[:MAX_CHARS])
    return any(_turn_number(item["turn"]) == 0 for item in objects)


def _without_thoughts(text: str) -> str:
    """What follows the last closing thinking tag; nothing if a leading thought never ended."""
    *_, answer = THINK_END.split(text)
    return "" if THINK_BEGIN.match(answer) else answer


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Objects with a key `turn`, keys in lower case, in order of appearance.

    An opening brace costs at most `MAX_OBJECT_CHARS`, and no more than `MAX_BRACES` are tried.
    """
    at = 0
    for _ in range(MAX_BRACES):
        if (start := text.find("{", at)) < 0:
            return
        window = text[start : start + MAX_OBJECT_CHARS]
        try:
            value, length = DECODER.raw_decode(window)
        except (ValueError, RecursionError):
            value = None
        if value is not None:
            at = start + 1  # an object around diagnoses: go on inside it
            item = _normalise_keys(value)
            if "turn" in item:
                at = start + length
                yield item
        elif DIAGNOSIS_BEGIN.match(window):
            following = DIAGNOSIS_BEGIN.search(text, start + 1)
            at = following.start() if following else len(text)
            item = _repair(text[start : min(at, start + MAX_OBJECT_CHARS)])
            if "turn" in item:
                yield item
        else:
            at = start + 1


def _repair(piece: str) -> dict[str, Any]:
    """Read a broken object up to its last closing brace; empty if it is beyond repair."""
    import json_repair

    end = piece.rfind("}") + 1
    piece = (piece[:end] if end else piece).rstrip(" \n\t,]`")
    try:
        value = json_repair.loads(piece)
    except Exception:  # the parser guesses, and the text is arbitrary: this object is lost
        return {}
    if not isinstance(value, dict):
        return {}
    if value and not piece.endswith(("}", '"', "'")):
        value.popitem()  # cut off in its last field: half a sentence is no hint
    return _normalise_keys(value)


def _normalise_keys(item: dict[Any, Any]) -> dict[str, Any]:
    """Word tokenizers decode keys with spaces around them."""
    return {str(key).strip().lower(): value for key, value in item.items()}


def _turn_number(value: Any) -> int | None:
    """The number of a turn as it was written; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    match = TURN_NUMBER.fullmatch(str(value).strip())
    return int(match.group(1)) if match else None


def _flag(value: Any) -> bool:
    """True unless something clearly says no."""
    word = str(value).strip().lower()
    return word in TRUE_WORDS or re.split(r"\W", word, maxsplit=1)[0] not in FALSE_WORDS


def _text(value: Any) -> str:
    """A text field; actions written as nested JSON are put back into text."""
    if value is None or isinstance(value, bool):
        return ""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):
        return ""
    text = text.encode("utf-8", "ignore").decode("utf-8").strip()  # JSON may hold lone surrogates
    return "" if text.lower().rstrip(".") in EMPTY_WORDS else text
