"""The reader of diagnoses. Oracles: diagnoses written down by hand, and `json` as the writer."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hero.reflection import parse_diagnoses
from hero.reflection.parse import says_faultless
from hero.types import Diagnosis

GOOD = (
    '{"turn": 1, "necessary": true, "valid": false, '
    '"failure_cause": "c", "corrected_action": "a", "hint": "h"}'
)
PARSED = Diagnosis(turn=0, valid=False, failure_cause="c", corrected_action="a", hint="h")


def hints(text: str, num_turns: int = 9) -> dict[int, str]:
    return {d.turn: d.hint for d in parse_diagnoses(text, num_turns)}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(GOOD, id="json_line"),
        pytest.param(f"[{GOOD}]", id="array"),
        pytest.param(f'{{"diagnoses": [{GOOD}]}}', id="list_in_object"),
        pytest.param(f'{{"result": {{"turns": [{GOOD}]}}, "n": 1}}', id="nested_deeper"),
        pytest.param(f"Sure!\n```json\n{GOOD}\n```\nI hope {{this}} helps.", id="fence_and_prose"),
        pytest.param(f'<think>maybe {{"turn": 1, "hint": "draft"}}</think>\n{GOOD}', id="thoughts"),
        pytest.param(
            f'maybe {{"turn": 1, "hint": "draft"}} </think> {GOOD}', id="thoughts_opened_in_prompt"
        ),
        pytest.param(json.dumps(json.loads(GOOD), indent=2), id="indented"),
        pytest.param(
            GOOD.replace('"', '" ').replace('" :', ' ":'), id="spaces_of_a_word_tokenizer"
        ),
        pytest.param(
            GOOD.replace('"', "'").replace("true", "True").replace("false", "False"), id="python"
        ),
        pytest.param(GOOD.replace(', "valid"', ' "valid"'), id="missing_comma"),
        pytest.param(GOOD.replace('"hint": "h"}', '"hint": "h",}'), id="trailing_comma"),
        pytest.param(re.sub('"(.*?)"', "“\\1”", GOOD), id="typographic_quotes"),
        pytest.param(GOOD[:-1] + ', "confidence": 0.9, "sub": {"x": 1}}', id="unknown_keys"),
        pytest.param(GOOD[:-1], id="missing_last_brace"),
        pytest.param(
            GOOD.replace("{", "{\n").replace("true", '"yes"').replace("false", '"No."'), id="words"
        ),
        pytest.param(
            GOOD.replace("true", "1").replace("false", "0").replace(": 1,", ': "1",', 1),
            id="coerced",
        ),
        pytest.param(
            GOOD.replace('"turn": 1', '"Turn": "turn 1"').replace('"hint"', '"Hint"'), id="case"
        ),
    ],
)
def test_reads_one_diagnosis(text: str) -> None:
    assert parse_diagnoses(text, 1) == [PARSED]


def test_a_broken_object_costs_only_itself() -> None:
    lines = [
        '{"turn": 1, "hint": "one"}',
        '{"turn": 2, "hint": "the 5" screen", "valid": true}',  # an inner quote, repaired
        '{"turn": , "hint": "lost"}',
        '{"turn": 4, "hint": "four"',  # never closed
        '{"turn": 5, "hint": "five"}',
    ]
    assert hints("\n".join(lines)) == {0: "one", 1: 'the 5" screen', 3: "four", 4: "five"}
    assert hints("[" + ", ".join(lines) + "]") == {
        0: "one",
        1: 'the 5" screen',
        3: "four",
        4: "five",
    }


def test_line_breaks_in_a_text() -> None:
    assert hints('{"turn": 1, "hint": "look\nfirst"} as {said}') == {0: "look first"}


def test_an_action_with_a_turn_is_no_diagnosis() -> None:
    text = '{"turn": 1, "hint": "h", "corrected_action": {"turn": 2, "hint": "left"}}'
    assert hints(text) == {0: "h"}


def test_keys_in_another_order_and_after_nested_objects() -> None:
    text = '{"corrected_action": {"name": "find", "arguments": {"q": "é"}}, "hint": "h", "turn": 2}'
    (diagnosis,) = parse_diagnoses(text, 2)
    assert diagnosis.turn == 1
    assert json.loads(diagnosis.corrected_action) == {"name": "find", "arguments": {"q": "é"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            '{"turn": 1, "hint": "x"}\n{"turn": 2, "hint": "look the', {0: "x", 1: ""}, id="in_hint"
        ),
        pytest.param('{"turn": 1, "hint": "x"}\n{"turn": 2', {0: "x"}, id="in_turn_number"),
        pytest.param('{"turn": 1, "hint": "x"}\n{"tu', {0: "x"}, id="in_key"),
        pytest.param('<think>long thoughts {"turn": 1, "hint": "draft"}', {}, id="in_thoughts"),
    ],
)
def test_cut_off_texts_give_no_half_sentences(text: str, expected: dict[int, str]) -> None:
    assert hints(text) == expected


def test_range_and_duplicates() -> None:
    text = "".join(
        f'{{"turn": {t}, "hint": "{h}"}}\n' for t, h in [(0, "a"), (2, "b"), (2, "c"), (4, "d")]
    )
    assert parse_diagnoses(text + '{"turn": "x"}', 3) == [Diagnosis(turn=1, hint="b")]
    assert parse_diagnoses(text, 0) == []


@pytest.mark.parametrize("value", ["null", '"None"', '"n/a."', '" - "', "true", "false", '""'])
def test_ways_to_say_nothing(value: str) -> None:
    assert hints(f'{{"turn": 1, "hint": {value}}}') == {0: ""}


@pytest.mark.parametrize(
    "value", ["true", "null", "-1", "1.5", "[1]", "1e999", "NaN", '"one"', "9" * 5000]
)
def test_what_is_no_turn_number(value: str) -> None:
    assert parse_diagnoses(f'{{"turn": {value}, "hint": "h"}}', 9) == []


def test_lone_surrogates_do_not_reach_a_tokenizer() -> None:
    assert hints('{"turn": 1, "hint": "a\\ud800 b\\n c"}') == {0: "a b c"}


LIKE_JSON = st.lists(
    st.sampled_from(
        [*"{}[]\",:'\\ \n", '"turn"', '{"turn": 1', "1", "true", "x", "</think>", "```", "\\u12"]
    )
).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), LIKE_JSON), st.integers(0, 4))
def test_never_raises_and_keeps_its_promises(text: str, num_turns: int) -> None:
    diagnoses = parse_diagnoses(text, num_turns)
    turns = [d.turn for d in diagnoses]
    assert turns == sorted(set(turns))
    assert all(0 <= turn < num_turns for turn in turns)


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="{}<>"), max_size=20).map(
    lambda text: " ".join(f"so {text} then".split())
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(PLAIN, min_size=1, max_size=5), st.sampled_from(["lines", "array", "object"]), PLAIN
)
def test_reads_whatever_json_can_write(written: list[str], layout: str, prose: str) -> None:
    objects = [{"turn": i, "hint": hint} for i, hint in enumerate(written, 1)]
    text = {
        "lines": "\n".join(json.dumps(o, ensure_ascii=False) for o in objects),
        "array": json.dumps(objects, indent=1),
        "object": json.dumps({"diagnoses": objects}),
    }[layout]
    assert hints(f"{prose}\n{text}\n{prose}") == dict(enumerate(written))


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"turn": 0}', True), ('Fine.\n```json\n[{"Turn": "0"}]\n```', True), (GOOD, False),
     ("no fault", False), ('<think>{"turn": 0}</think>', False), ("", False)],
)  # fmt: skip
def test_that_no_turn_has_a_fault_is_said_by_turn_0(text: str, said: bool) -> None:
    assert says_faultless(text) == said
