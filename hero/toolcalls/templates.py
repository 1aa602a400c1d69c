"""Which format of calls a tokenizer's chat template speaks, found by asking it to write one."""

from __future__ import annotations

from typing import Any

from hero.toolcalls import hermes, llama, pythonic
from hero.toolcalls.base import ToolCall, Unreadable

PROBE = ToolCall(name="heroprobe", arguments={"herokey": "herovalue"})
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE.name,
        "description": "herodescription",
        "parameters": {
            "type": "object",
            "properties": {"herokey": {"type": "string", "description": "a key"}},
            "required": ["herokey"],
        },
    },
}
NATIVE = {"hermes": hermes, "llama": llama, "pythonic": pythonic}


def format_of(tokenizer: Any) -> str:
    """The native format whose reader reads what the template writes for a call; else "react".

    "react" stands for templates that show no tools, and for those that speak another format.
    """
    question = {"role": "user", "content": "."}
    function = {"name": PROBE.name, "arguments": PROBE.arguments}
    call = {"type": "function", "id": "call00001", "function": function}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        shown = _render(tokenizer, [question], add_generation_prompt=True)
        written = _render(tokenizer, [question, answer])
    except Exception:  # templates raise what they like: this one knows no calls
        return "react"
    if "herodescription" not in shown or not written.startswith(shown[: shown.rfind(".")]):
        return "react"
    prompt = _render(tokenizer, [question])
    text = written[len(prompt) :] if written.startswith(prompt) else ""
    for start in (text.find(mark) for mark in ("<tool_call>", "{", "[")):
        for name, module in NATIVE.items() if start >= 0 else ():
            if _reads(module, tokenizer, text[start:]):
                return name
    return "react"


def _render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages, tools=[PROBE_TOOL], tokenize=False, enable_thinking=False, **options
        )
    )


def _reads(module: Any, tokenizer: Any, text: str) -> bool:
    """Whether a reader finds exactly the probe, special tokens left out as when decoding."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    try:
        calls, _ = module.read(text.strip())
    except Unreadable:
        return False
    return bool(calls == [PROBE])
