"""Tool calls in four formats: written and read back, refused where they cannot be read, and shown
by a chat template. Oracles: hand-written texts, `ast` and `json` of the standard library, jinja."""

from __future__ import annotations

import ast
import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hero.renderer import Renderer
from hero.toolcalls import FORMATS, ToolCall, format_of, parse_calls, write_calls

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,9}", fullmatch=True)
CALLS = st.lists(
    st.builds(
        ToolCall, name=NAMES, arguments=st.dictionaries(NAMES, JSON_VALUES, max_size=3)
    ),
    min_size=1, max_size=3,
)  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(calls=CALLS)
def test_what_is_written_is_read_back(format: str, calls: list[ToolCall]) -> None:
    parsed = parse_calls(write_calls(calls, format), format)
    assert parsed.parse_ok, parsed.error
    assert list(parsed.calls) == calls and parsed.text == ""


ONE = (ToolCall(name="find", arguments={"id": "#W1", "n": 2}),)
JSON = '{"name": "find", "arguments": {"id": "#W1", "n": 2}}'
GOOD = [
    ("hermes", f"<tool_call>\n{JSON}\n</tool_call>", ""),
    ("hermes", f"One moment.<tool_call>{JSON}</tool_call>", "One moment."),
    ("hermes", '<think>so {</think><tool_call>{"arguments": {"id": "#W1", "n": 2}, "name": "find"}'
     "</tool_call>", ""),
    ("llama", '{"name": "find", "parameters": {"id": "#W1", "n": 2}}', ""),
    ("llama", '<|python_tag|>{"name": "find", "parameters": {"id": "#W1", "n": 2}}', ""),
    ("llama", '{"type": "function", "name": "find", "parameters": {"id": "#W1", "n": 2}}', ""),
    ("pythonic", '[find(id="#W1", n=2)]', ""),
    ("pythonic", "\n[ find( n = 2 , id='#W1', ) ]\n", ""),
    ("react", 'Thought: look first\nAction: {"name": "find", "arguments": {"id": "#W1", "n": 2}}',
     "look first"),
    ("react", '```json\n{"name": "find", "arguments": {"n": 2, "id": "#W1"}}\n```', ""),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "said"), GOOD)
def test_texts_that_models_write(format: str, text: str, said: str) -> None:
    parsed = parse_calls(text, format)
    assert (parsed.calls, parsed.text, parsed.parse_ok) == (ONE, said, True)


BAD = {
    "hermes": [
        '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>',
        "[f(a=1)]",
        '<tool_call>{"name": "f"',
        "<tool_call>f()</tool_call>",
        '{"name": "f"}',
    ],
    "llama": ['{"name": "f"', '{"name": "f", "parameters": [1]}', '{"name": "f"} and then'],
    "pythonic": [
        "[f(1)]",
        "[f(a=-1e999)]",
        "[f(a=g())]",
        "[f(a=1)",
        "[f(a=1, a=2)]",
        "[f(a=1)] ok",
        "[1, 2]",
        "[]",
    ],
    "react": ["Action: find it", 'Action: {"name": "f", "arguments": "x"}', "{}"],
}
BAD_IN_ALL = [
    'Sure! {"name": "f", "arguments": {}}',
    "</tool_call>",
    "<think>and on",
    '<function=f>{"a": 1}</function>',
    '[TOOL_CALLS]{"name": "f"}',
    '{"name": "f", "arguments": {"a": NaN}}',
    'f(a="x", b=1)',
    "find_user.by_id( id = 3 )",
    "[" * 100_000,
    '{"a":' * 100_000,
]


@pytest.mark.parametrize("format", FORMATS)
def test_what_cannot_be_read_is_never_speech(format: str) -> None:
    deep = [text for text in BAD_IN_ALL if not text.startswith("[[") or format == "pythonic"]
    deep = [text for text in deep if not text.startswith('{"a"') or format != "pythonic"]
    for text in BAD[format] + deep:
        parsed = parse_calls(text, format)
        assert not parsed.parse_ok and not parsed.calls, text[:80]
        assert parsed.error and len(parsed.error) < 200 and parsed.text == text


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", ["Which order is it?", "", "Your total is {5} [net].", "a = f(x)",
                                  "That (id=3) is it.", "See help(me)."])  # fmt: skip
def test_speech_is_speech(format: str, text: str) -> None:
    parsed = parse_calls(text, format)
    assert (parsed.calls, parsed.text, parsed.parse_ok) == ((), text, True)


@settings(max_examples=150, deadline=None)
@given(value=JSON_VALUES)
def test_pythonic_literals_are_those_of_python(value: Any) -> None:
    text = f"[f(a={value!r})]"
    (call,) = parse_calls(text, "pythonic").calls
    tree = ast.parse(text, mode="eval").body.elts[0]  # type: ignore[attr-defined]
    assert call.arguments["a"] == ast.literal_eval(tree.keywords[0].value)


# ---- templates -----------------------------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "finds", "parameters": {"type": "object"}},
}
HEAD = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
)
TAIL = (
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL_PARTS = {
    "hermes": '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n'
    "</tool_call>",
    "llama": '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}',
    "pythonic": "[{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson }}"
    "{% endfor %})]",
    "react": "<function={{ f.name }}>{{ f.arguments }}</function>",  # one that is not known here
}


@pytest.fixture
def speaking(tiny_tokenizer: Any) -> Any:
    """Makes a renderer whose template writes calls in a format."""

    def make(format: str) -> Renderer:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = HEAD + CALL_PARTS[format] + TAIL
        return Renderer(tokenizer)

    return make


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_is_the_template_s(speaking: Any, format: str) -> None:
    assert speaking(format).tool_format == format


def test_a_template_without_tools_speaks_react(tiny_tokenizer: Any) -> None:
    assert format_of(tiny_tokenizer) == "react"


def test_a_native_template_shows_the_tools_itself(speaking: Any) -> None:
    renderer = speaking("hermes")
    messages = [{"role": "user", "content": "hello"}]
    expected = renderer.tokenizer.apply_chat_template(
        messages, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert renderer.tokenizer.decode(renderer.start(messages, [TOOL])) == expected
    assert '"finds"' in expected


def test_without_tools_in_the_template_they_stand_in_the_system_prompt(renderer: Renderer) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    text = renderer.tokenizer.decode(renderer.start(messages, [TOOL]))
    system, user = text.split("<|im_end|>")[:2]
    assert system.startswith("<|im_start|>system\nbe brief\n") and user.endswith("user\nhello")
    assert json.dumps(TOOL["function"]) in system and "\nAction: {" in system
    alone = renderer.tokenizer.decode(renderer.start(messages[1:], [TOOL]))
    assert alone.startswith("<|im_start|>system\n# Tools")


def test_a_template_that_refuses_tool_messages_shows_them_as_the_user_s(
    tiny_tokenizer: Any,
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    refuse = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no') }}{% endfor %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    renderer = Renderer(tokenizer)
    assert renderer.tool_role == "user"
    seen = renderer.observe([renderer.end_id], "tool", "two lamps")
    assert seen == renderer.observe([renderer.end_id], "user", "two lamps")
