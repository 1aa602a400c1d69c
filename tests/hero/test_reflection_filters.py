"""Both filters and the statistics. Oracles: what a person would call known; counts by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hero.config import ReflectionConfig, RolloutConfig
from hero.envs.shop import ShopEnv
from hero.episodes import Assignment, rollout
from hero.prompts import make_prompts
from hero.reflection import ReflectionStats, RuleReflector, make_reflector
from hero.reflection.filters import numbered_names, unknown_names
from hero.renderer import Renderer
from hero.scratch import build_tokenizer
from hero.targets import Scripted
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
        "reflection/specific_rate": 0,
        "reflection/naming_rate": 0,
        "reflection/retried": 0,
        "reflection/generated_tokens": 0,
    }


@pytest.mark.parametrize(
    ("hint", "action", "leaks"),
    [
        ("choose the colour", "click[turquoise]", True),  # nobody has seen turquoise
        ("choose the colour", "click[red]", False),  # the instruction says red
        ("choose the colour", "click[Pale Blue]", False),  # the page shows pale blue
        ("choose the colour", 'paint(color="turquoise")', True),
        ("choose the colour", '{"name": "paint", "color": "turquoise"}', True),
        ("choose the colour", "pay[buy now]", False),  # every task says buy now
        ("choose turquoise", "", False),  # a plain word: nothing says that it is the answer
        ("ask Mia Li first", "", True),  # learnt two turns later
        ("Ask first", "", False),
        ("first ask Sam", "", False),  # the page shows Sam
        ("answer in English", "", False),  # no name that the episode taught
        ("be kind", 'say "I am sorry that it took us so very long"', False),  # a sentence
        ("don't hurry, it's fine", "don't hurry, it's fine", False),
    ],
)
def test_names_without_a_digit_leak_too(
    renderer: Renderer, episode: Episode, hint: str, action: str, leaks: bool
) -> None:
    trajectory = episode(["paint: pale blue, Sam", "s", "s"], instruction="make it red")
    trajectory.turns[2].observation = "Mia Li called. Ask Sam."
    written = [Diagnosis(turn=0, hint=hint, corrected_action=action)]
    for switched_on in (True, False):
        config = ReflectionConfig(leak_filter=switched_on)
        shared = "pay buy now name paint color"
        reflector = RuleReflector(lambda _: written, renderer, config, shared)
        reflections = reflector.reflect([trajectory], seed=0)
        assert (reflections.diagnoses[0][0].hint == "") == (leaks and switched_on)
        assert reflections.stats.metrics()["reflection/specific_rate"] == float(leaks)


@pytest.mark.parametrize("hints", ["rule", "answer"])
def test_the_rules_of_the_shop_leak_nothing(hints: str) -> None:
    env, rng = ShopEnv("tiny", hints=hints), random.Random(0)
    renderer = Renderer(build_tokenizer(env.vocabulary()))

    def act() -> str:
        return env.random_action(rng) if rng.random() < 0.4 else env.oracle()

    tasks = env.tasks("train")[:60]
    played = rollout(
        [Assignment(id=task, group_id=task, task_id=task) for task in tasks],
        envs=[env], sampler=Scripted(act, renderer), renderer=renderer,
        config=RolloutConfig(max_turns=8), seed=0,
    )  # fmt: skip
    reflector = make_reflector(
        ReflectionConfig(reflector="rules"), env=env, sampler=Scripted(act, renderer),
        renderer=renderer, prompts=make_prompts("compact"), teacher_weights=nullcontext,
        context=1000,
    )  # fmt: skip
    stats = reflector.reflect(played, seed=0).stats
    assert stats.hinted > 60 and stats.leaked == stats.specific == 0
    assert stats.naming == (stats.hinted if hints == "answer" else 0)


def test_hints_that_name_the_answer_are_counted(renderer: Renderer, episode: Episode) -> None:
    written = [
        Diagnosis(turn=0, hint="now act is right", corrected_action="act"),
        Diagnosis(turn=1, hint="look first", corrected_action="act"),
        Diagnosis(turn=2, hint="look first"),
        Diagnosis(turn=3, corrected_action="act"),
    ]
    reflector = RuleReflector(lambda _: written, renderer, ReflectionConfig())
    metrics = reflector.reflect([episode(["s"] * 5)], seed=0).stats.metrics()
    assert metrics["reflection/naming_rate"] == pytest.approx(1 / 3)


def test_rates_of_nothing_are_zero() -> None:
    counts = dict.fromkeys(
        ["turns", "parsed", "non_empty", "leaked", "too_long", "retried", "generated_tokens"], 0
    )
    assert set(ReflectionStats(**counts, seconds=0.0).metrics().values()) == {0.0}
