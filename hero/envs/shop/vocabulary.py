"""Every word that the `tiny` profile can show: what a word-level tokenizer is built from."""

from __future__ import annotations

import re

from hero.envs.shop.hints import HINTS, Cause
from hero.envs.shop.protocol import BACK, BUY, DETAILS, NEXT, PREV
from hero.envs.shop.words import TINY_ATTRIBUTES, TINY_COLORS, TINY_NOUNS, TINY_SIZES

TOKEN_PATTERN = re.compile(r"[a-z]+|\d|[^\sa-z\d]")
"""A run of letters, one digit, or one other character, on lower-case text."""

PAGE_WORDS = (
    "goal results item done score chosen color size price max p ; invalid no steps left attributes "
    "options of ok too high search click [ ] . , : 0 1 2 3 4 5 6 7 8 9"
)


def tiny_vocabulary() -> list[str]:
    """Words of observations, actions, causes and hints in compact style, sorted, each once."""
    hints = [wording.format(action="") for wordings in HINTS.values() for wording in wordings]
    texts = [PAGE_WORDS, *hints, *Cause, BUY, BACK, NEXT, PREV, *DETAILS]
    texts += [*TINY_ATTRIBUTES, *TINY_NOUNS, *TINY_COLORS, *TINY_SIZES]
    return sorted({word for text in texts for word in TOKEN_PATTERN.findall(str(text).lower())})
