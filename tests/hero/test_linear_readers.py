"""Readers of texts from elsewhere: twice the text costs about twice the time.

Oracle: the clock. A quadratic reader takes four times as long, three times are allowed.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from functools import partial
from timeit import timeit

import pytest

from hero.config import ReflectionConfig, redacted
from hero.envs.gym import COLOUR
from hero.envs.shop.protocol import Action, parse_action
from hero.envs.webshop.words import stemmed_words
from hero.reflection.filters import HintFilter, Verdict
from hero.reflection.parse import parse_diagnoses
from hero.renderer import Renderer
from hero.text import harmless
from hero.toolcalls import FORMATS, parse_calls
from hero.types import Diagnosis, Trajectory

PIECES = [
    "{", "}", "[", "]", "a[", '"', '{"turn": 9', '"turn": 9', "9", "{,", '","', "\n",
    '{"turn": 1, "hint": [', '[{"turn":', '{"turn":1,"\\"', '{"turn":1 x ',
    "{turn:}", '{"a":', "<think>", "</think>", "```{", "} ", "```", "`", "<tool_call>", "\\", " ",
    "\x1b[", "\x1b]", "\x9b", "é", "1 ", "a1", "search[", "W1 ",
    "<tool_call>{}</tool_call>", "[f(", "[f(a=1)", "Action:",
    "f(a=1),", '"a",', "```json ",
    "</think", "<think", "\\'", "'", "://", "://a:", "?key", "&", "authorization", "bearer ", "@",
    "_", "\x1b[1m", "x\x1b[0m",
]  # fmt: skip
READERS: dict[str, Callable[[str], object]] = {
    "reflection": lambda text: parse_diagnoses(text, 9),
    "open reflection": lambda text: parse_diagnoses('{"turn": 1, "hint": "' + text, 9),
    "shop": lambda text: (parse_action(text, True), parse_action("a[" + text, False)),
    "harmless": harmless,
    "redacted": redacted,
    "colours": partial(COLOUR.sub, ""),
    "search": stemmed_words,
    **{f"{name} calls": partial(parse_calls, format=name) for name in FORMATS},
    "open call": lambda text: parse_calls(
        '<tool_call>{"name": "f", "arguments": {"' + text, "hermes"
    ),
    "open list": lambda text: parse_calls("[f(a=[" + text, "pythonic"),
}


def seconds(read: Callable[[str], object], text: str) -> float:
    """Of the processor, without garbage collections of what other tests left."""
    return timeit(partial(read, text), number=1, timer=time.process_time)


def assert_linear(read: Callable[[str], object], piece: str, size: int = 400_000) -> None:
    """Three times the time for twice the text is allowed, and a quarter of a second for nothing."""
    half = seconds(read, piece * (size // len(piece) // 2))
    assert seconds(read, piece * (size // len(piece))) < 3 * half + 0.25, piece


@pytest.mark.parametrize("reader", READERS)
def test_readers_are_linear(reader: str) -> None:
    for piece in PIECES:
        assert_linear(READERS[reader], piece)


def test_readers_are_linear_in_mixtures() -> None:
    rng = random.Random(0)
    for _ in range(15):
        piece = "".join(rng.choices(PIECES, k=3))
        for read in READERS.values():
            assert_linear(read, piece, 100_000)


def test_a_long_answer_is_read_from_its_start() -> None:
    lines = "".join(f'{{"turn": {turn}, "hint": "h{turn}"}}\n' for turn in range(1, 129))
    found = parse_diagnoses(lines + "{" * 10_000_000, 128)
    assert [d.hint for d in found] == [f"h{turn}" for turn in range(1, 129)]


def test_many_ids_are_a_leak_and_long_hints_are_dropped_first(
    renderer: Renderer, episode: Callable[..., Trajectory]
) -> None:
    ids = " ".join(f"W{i}" for i in range(10_000))
    trajectory = episode([f"a W1 {ids[:20_000]}"])
    hint_filter = HintFilter(renderer, ReflectionConfig(max_hint_tokens=50))
    started = time.process_time()  # another program costs none
    kept, verdict = hint_filter.apply(Diagnosis(turn=0, hint=ids), trajectory)
    assert (kept.hint, verdict) == ("", Verdict.TOO_LONG)
    kept, verdict = hint_filter.apply(
        Diagnosis(turn=0, hint="go on", corrected_action=ids), trajectory
    )
    assert (kept.hint, kept.corrected_action, verdict) == ("", "", Verdict.LEAKED)
    assert time.process_time() - started < 5
    # A hint that is both loses its corrected action too.
    both = Diagnosis(turn=0, hint=ids, corrected_action="open Q77")
    kept, verdict = hint_filter.apply(both, trajectory)
    assert (kept.hint, kept.corrected_action, verdict) == ("", "", Verdict.LEAKED)


def test_the_shop_reads_what_its_official_pattern_matches() -> None:
    official, rng = re.compile(r"(.+)\[(.+)\]"), random.Random(0)
    words = ["search", "click", "[", "]", "x", " ", "\n", "a"]
    read = 0
    for _ in range(20_000):
        text = "".join(rng.choices(["search[", "click[", "["])) + "".join(
            rng.choices(words, k=rng.randrange(8))
        )
        match = official.match(text)
        verb, argument = match.groups() if match else ("", "")
        expected = Action(verb, argument.lower()) if verb in ("search", "click") else None
        assert parse_action(text, tolerant=False) == expected
        read += expected is not None
    assert read > 1000
