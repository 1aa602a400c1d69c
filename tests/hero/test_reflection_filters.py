"""Both filters and the statistics. Oracles: what a person would call known; counts by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hero.config import ReflectionConfig
from hero.reflection import ReflectionStats, RuleReflector
from hero.reflection.filters import numbered_names, unknown_names
from hero.renderer import Renderer
from hero.types import Diagnosis, Trajectory

Episode = Callable[..., Trajectory]


@pytest.mark.parametrize(
    ("hint", "known", "leaks"),
    [
        ("look order #W123 up", "my order is W123", False),
        ("look order #W123 up", "my order is W1234", True),
        ("look order w-123 up", "ORDER #W123.", False),
        ("open p42", "| p 4 2 | p 4 3", False),
        ("open p42", "| p 4 2 0 | p 1 4 2", True),
        ("open p 4 2", "results: p42, p43", False),
        ("open p 4 2", "results: p24", True),
        ("choose size 8", "sizes 7 8 9", False),
        ("choose size 10", "sizes 7 8 9", True),
        ("pay 1,200 dollars", "price: $1200", False),
        ("pay $12.99", "it costs 12 . 99 now", False),
        ("pay $12.99", "12 pieces, 99 left", True),
        ("pay 1299", "it costs 12.99", True),
        ("pay $12.99", "1299 points", True),
        ("take 42", "142 in stock", True),
        ("on 2024-05-01", "2024/05/01", False),
        ("click B07XYZ9", "b 0 7 xyz 9", False),
        ("click B07XYZ9", "b07xyz8", True),
        ("use user_496", "mia_li_496", False),
        ("look the order up first", "", False),
        ("\uff14\uff12", "42", False),
    ],
)
def test_leaks_are_ids_and_numbers_that_were_unknown(hint: str, known: str, leaks: bool) -> None:
    assert bool(unknown_names(numbered_names(hint), known)) is leaks


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_text_never_leaks_against_itself(text: str, more: str) -> None:
    assert not unknown_names(numbered_names(text), f"{more}\n{text}\n{more}")


def test_filters_and_statistics_by_hand(renderer: Renderer, episode: Episode) -> None:
    trajectory = episode(["s", "s W1", "s W1 9", "s", "s", "s W1 8"], instruction="get item 77")
    written = [
        Diagnosis(turn=0, hint="open W1", failure_cause="c"),  # W1 is seen only from turn 1 on
        Diagnosis(turn=1, hint="open W1 for 77"),
        Diagnosis(turn=2, hint="go back", corrected_action="buy 8"),  # leaks in the action only
        Diagnosis(turn=3, hint="x" * 21),
        Diagnosis(turn=4, corrected_action="buy"),  # no hint: masked, whatever else it says
    ]
    config = ReflectionConfig(reflector="rules", max_hint_tokens=20)
    reflections = RuleReflector(lambda _: written, renderer, config).reflect([trajectory], seed=0)
    (diagnoses,) = reflections.diagnoses
    assert diagnoses == [
        Diagnosis(turn=0, failure_cause="c", source="rules"),
        Diagnosis(turn=1, hint="open W1 for 77", source="rules"),
        Diagnosis(turn=2, source="rules"),
        Diagnosis(turn=3, source="rules"),
        Diagnosis(turn=4, corrected_action="buy", source="rules"),
        Diagnosis(turn=5),
    ]
    metrics = reflections.stats.metrics()
    assert metrics.pop("reflection/seconds") >= 0
    assert metrics == {
        "reflection/turns": 6,
        "reflection/parsed_rate": pytest.approx(5 / 6),
        "reflection/non_empty_rate": pytest.approx(1 / 6),
        "reflection/leaked_rate": pytest.approx(2 / 6),
        "reflection/too_long_rate": pytest.approx(1 / 6),
        "reflection/retried": 0,
        "reflection/generated_tokens": 0,
    }


def test_the_leak_filter_can_be_switched_off(renderer: Renderer, episode: Episode) -> None:
    config = ReflectionConfig(leak_filter=False, max_hint_tokens=7)
    reflector = RuleReflector(lambda _: [Diagnosis(turn=0, hint="open W1")], renderer, config)
    reflections = reflector.reflect([episode(["s"])], seed=0)
    assert reflections.diagnoses[0][0].hint == "open W1"  # 7 characters, 7 tokens: not too long


def test_rates_of_nothing_are_zero() -> None:
    counts = dict.fromkeys(
        ["turns", "parsed", "non_empty", "leaked", "too_long", "retried", "generated_tokens"], 0
    )
    assert set(ReflectionStats(**counts, seconds=0.0).metrics().values()) == {0.0}
