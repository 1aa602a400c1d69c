"""A small agent from nothing: a word-level tokenizer over an environment's vocabulary and a small
Llama.

Words are tokens of their own, never glued to the space before them: gluing made copying from the
context fail in small models. The fixed parts of a diagnosis' JSON are one token each, so that a
diagnosis costs a handful of tokens and always parses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hero.config import ScratchConfig
from hero.types import Diagnosis

SPECIAL = ["<|end|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
JSON_PIECES = [
    '{"turn": ',
    ', "necessary": true, "valid": true, "failure_cause": "", "corrected_action": "", "hint": ""}',
    *(
        f', "necessary": {necessary}, "valid": {valid}, "failure_cause": "'
        for necessary in ("true", "false")
        for valid in ("true", "false")
    ),
    '", "corrected_action": "',
    '", "hint": "',
    '"}',
]
PROMPT_WORDS = (
    "demo unread then reward success failed cause hint better again "
    "review turn done truncated max turns tokens | . -"
)
WORD = r"p\d\d\d|[a-z]+|\d|[^\sa-z\d]"
"""What counts as one word: a product id, letters, one digit, one other character."""


def diagnosis_json(diagnosis: Diagnosis) -> str:
    """One line of a reflection, in the fields' order of the reflection prompt."""
    flags = [json.dumps(flag) for flag in (diagnosis.necessary, diagnosis.valid)]
    texts = [
        json.dumps(text, ensure_ascii=False)
        for text in (diagnosis.failure_cause, diagnosis.corrected_action, diagnosis.hint)
    ]
    return (
        f'{{"turn": {diagnosis.turn + 1}, "necessary": {flags[0]}, "valid": {flags[1]}, '
        f'"failure_cause": {texts[0]}, "corrected_action": {texts[1]}, "hint": {texts[2]}}}'
    )


def build_tokenizer(vocabulary: Iterable[str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the vocabulary's words, with chat template and JSON pieces."""
    words = sorted(
        {w for text in (*vocabulary, PROMPT_WORDS) for w in re.findall(WORD, text.lower())}
    )
    words += [d for d in "0123456789" if d not in words]
    tokens = SPECIAL + JSON_PIECES + words
    tokenizer = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<|unk|>")
    )
    pieces = "|".join(re.escape(piece) for piece in sorted(JSON_PIECES, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(f"{pieces}|{WORD}"), "removed", invert=True
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("^"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(r" ?\[ ?"), "["),
            decoders.Replace(" ]", "]"),
            decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", unk_token="<|unk|>",
        additional_special_tokens=SPECIAL[2:], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(config: ScratchConfig, tokenizer: Any) -> LlamaForCausalLM:
    """A Llama with tied embeddings, for the tokenizer."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.width * 8 // 3,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context,
            initializer_range=config.init_std,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
