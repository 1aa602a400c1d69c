"""Messages to token ids, one piece at a time, so that ids once made are never made again.

A chat template is used as four pieces of ids for each role: what stands before a message's content,
what stands between its content and the first token of the answer, and the token that ends an
answer. A prompt grows only at its end:

    prompt_0 = open . content . close            (close holds the generation prompt)
    prompt_1 = prompt_0 + action_0 + open' . observation . close

so every turn's prompt extends the last one's prompt and action, and the privileged context can be
spliced in before `close` without touching a token of the student's own context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Any

from hero.toolcalls import format_of, react
from hero.types import Message

CONTENT = "HEROCONTENTMARK"
ANSWER = "HEROANSWERMARK"
MAX_UNKNOWN = 1000
"""Different unknown words that are remembered."""
SHOWN = 8
"""Of them, named in one sentence."""
SHORT, REMEMBERED = 1000, 4096
"""Characters of texts whose ids are kept, and how many texts: an observation is asked for by the
next prompt, the reflector and the teacher."""

Pieces = tuple[tuple[int, ...], tuple[int, ...], int]
"""(open, close, end)."""


class Renderer:
    """Token ids of chat messages by a tokenizer's own chat template.

    Raises:
        ValueError: the tokenizer has no chat template, or one that cannot be taken apart.
    """

    template_options: Mapping[str, Any] = {"enable_thinking": False}
    """Keywords of `apply_chat_template`."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "The tokenizer has no chat template: use an instruction-tuned model, or set "
                "tokenizer.chat_template and save it with the model."
            )
        self.tokenizer = tokenizer
        self._pieces = lru_cache(maxsize=None)(self._make_pieces)
        self._plain_again = lru_cache(maxsize=REMEMBERED)(self._plain)
        self.end_id = self._pieces("user")[2]
        """Id of the token that ends an answer."""
        eos = tokenizer.eos_token_id
        self.stop_ids = sorted({self.end_id} | ({eos} if eos is not None else set()))
        """Ids that end a sampled turn."""
        unknown = tokenizer.unk_token_id
        self.unknown_id: int | None = None if unknown in self.stop_ids else unknown
        """Id of a word that the vocabulary lacks; None if it can spell every text."""
        self.unknown: Counter[str] = Counter()
        """How often each such word was met."""
        self._named: set[str] = set()

    def encode(self, text: str) -> list[int]:
        """Ids of a message's content: special tokens spelt out in it stay plain text.

        An observation that holds `<|im_end|>` must not be able to end the message it stands in.
        """
        ids = self._plain(text) if len(text) > SHORT else list(self._plain_again(text))
        if self.unknown_id is not None and self.unknown_id in ids:
            self._note_unknown(text, ids)
        return ids

    def _plain(self, text: str) -> list[int]:
        return list(
            self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )

    def _note_unknown(self, text: str, ids: list[int]) -> None:
        words = ["?"] * len(ids)  # a tokenizer in Python knows no offsets
        if self.tokenizer.is_fast:
            places = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True,
                return_offsets_mapping=True,
            )["offset_mapping"]  # fmt: skip
            words = [text[start:end] for start, end in places]
        for word, token in zip(words, ids, strict=True):
            if token == self.unknown_id and (
                word in self.unknown or len(self.unknown) < MAX_UNKNOWN
            ):
                self.unknown[word] += 1

    def newly_unknown(self) -> str:
        """A sentence on the unknown words that were not named before; "" if there are none."""
        new = [word for word, _ in self.unknown.most_common() if word not in self._named]
        if not new:
            return ""
        self._named |= set(new)
        times = sum(self.unknown[word] for word in new)
        more = f" and {len(new) - SHOWN} more" if len(new) > SHOWN else ""
        return (
            f"Not in the model's vocabulary, and read as {self.tokenizer.unk_token} {times} times: "
            f"{', '.join(map(repr, new[:SHOWN]))}{more}. It cannot tell these words apart."
        )

    def _encode_template(self, text: str) -> list[int]:
        """Ids of the template's own text, special tokens and all."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each token as it reads in its place, special tokens shown: for people."""
        texts = [str(self.tokenizer.decode(list(ids[:i]))) for i in range(len(ids) + 1)]
        alone = [str(self.tokenizer.decode([token])) for token in ids]
        return [
            after[len(before) :] if after.startswith(before) else token
            for before, after, token in zip(texts[:-1], texts[1:], alone, strict=True)
        ]

    @cached_property
    def tool_format(self) -> str:
        """The format of tool calls: the template's own where it has one that can be read."""
        return format_of(self.tokenizer)

    @cached_property
    def tool_role(self) -> str:
        """The role that shows a tool's answer: "user" if the template has no message of a tool."""
        return "tool" if "tool" in self._last else "user"

    @cached_property
    def _last(self) -> dict[str, Pieces]:
        """Of the roles that a prompt may end with, those that the template has."""
        found = {}
        for role in ("user", "tool"):
            with suppress(ValueError):
                found[role] = self._pieces(role)
        return found

    def start(self, messages: list[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of a conversation that ends with a user or tool message, ready for the answer.

        Schemas of `tools` (OpenAI's) are shown by the template, or in the system prompt if it
        shows none.
        """
        if tools and self.tool_format == "react":
            messages, tools = react.with_rules(messages, tools), ()
        last = messages[-1]
        before, _ = self._split([*messages[:-1], {**last, "content": CONTENT}], CONTENT, tools)
        close = self._pieces(last["role"])[1]
        return self._encode_template(before) + self.encode(last["content"]) + list(close)

    def observe(self, action_ids: Sequence[int], role: str, text: str) -> list[int]:
        """Ids that follow a sampled action: the end token if it lacks one, then the observation."""
        open_ids, close, end_id = self._pieces(self.tool_role if role == "tool" else role)
        ended = bool(action_ids) and action_ids[-1] in self.stop_ids
        return ([] if ended else [end_id]) + list(open_ids) + self.encode(text) + list(close)

    def observed(self, action_ids: Sequence[int], ids: Sequence[int]) -> tuple[int, int]:
        """Where the observation's own tokens start and end in `ids`, which `observe` made."""
        end = self.branch_at(ids)
        ended = bool(action_ids) and action_ids[-1] in self.stop_ids
        for open_ids, close, end_id in self._last.values():
            before = [*([] if ended else [end_id]), *open_ids]
            if list(ids[: len(before)]) == before and list(ids[end:]) == list(close):
                return len(before), end
        raise ValueError("The ids after an action do not begin with a message of this template.")

    def branch_at(self, prompt_ids: Sequence[int]) -> int:
        """Where the content of a prompt's last message ends: hindsight can be spliced in there."""
        for _, close, _ in self._last.values():
            if tuple(prompt_ids[-len(close) :]) == close:
                return len(prompt_ids) - len(close)
        raise ValueError(
            "The prompt does not end with a user or tool message of this chat template."
        )

    def clip(self, text: str, max_tokens: int) -> str:
        """`text`, or its head and tail around an ellipsis if it has more than `max_tokens`."""
        ids = self.encode(text)
        if len(ids) <= max_tokens:
            return text
        head = max_tokens * 2 // 3
        tail = max_tokens - head
        return f"{self.decode(ids[:head])} … {self.decode(ids[-tail:]) if tail else ''}".strip()

    def _make_pieces(self, role: str) -> Pieces:
        """Of a message of `role` that follows an answer."""
        messages = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": ANSWER},
            {"role": role, "content": CONTENT},
        ]
        before, after = self._split(messages, CONTENT)
        if ANSWER not in before:
            raise ValueError(
                "The chat template drops earlier answers: multi-turn training needs them kept."
            )
        between = self._encode_template(before.split(ANSWER, 1)[1])
        if not between or between[0] not in self.tokenizer.all_special_ids:
            raise ValueError(
                "The chat template does not end an answer with a special token: the end of a turn "
                "cannot be sampled."
            )
        return tuple(between[1:]), tuple(self._encode_template(after)), between[0]

    def _split(
        self, messages: list[Message], mark: str, tools: Sequence[dict[str, Any]] = ()
    ) -> tuple[str, str]:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, tools=list(tools) or None,
                **self.template_options,
            )  # fmt: skip
        except Exception as error:  # templates raise jinja2 errors of their own wording
            raise ValueError(
                f"The chat template refuses the roles {[m['role'] for m in messages]}: {error}"
            ) from error
        before, found, after = text.partition(mark)
        if not found or mark in after:
            raise ValueError("The chat template does not show a message's content exactly once.")
        return before, after
