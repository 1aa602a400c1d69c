"""Words as WebShop's search server compares them: Lucene's English analyser.

Cut at word boundaries (Unicode's UAX 29), possessive 's dropped, lower case, without stop words,
stemmed by Porter's algorithm.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

from hero.envs.shop.search import STOP_WORDS

PICTURES = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u231a\u231b\u2328\u2388\u23cf\u23e9-"
    "\u23f3\u23f8-\u23fa\u24c2\u25aa\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u2605\u2607-\u2612\u2614-"
    "\u2685\u2690-\u2705\u2708-\u2712\u2714\u2716\u271d\u2721\u2728\u2733\u2734\u2744\u2747\u274c\u274e"
    "\u2753-\u2755\u2757\u2763-\u2767\u2795-\u2797\u27a1\u27b0\u27bf\u2934\u2935\u2b05-\u2b07\u2b1b"
    "\u2b1c\u2b50\u2b55\u3030\u303d\u3297\u3299\U0001f000-\U0001f1e5\U0001f200-\U0001faff"
)
"""Unicode's Extended_Pictographic: each is a word."""
SIGNS = "\u3005\u3007\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
"""Ideographs and hiragana: each is a word."""
LETTER = rf"[^\W_{SIGNS}\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u218b\u2460-\u249b]"
INSIDE = (
    r"(?<=[^\W\d_])[:.'\u2018\u2019\u00b7\uff1a](?=[^\W\d_])|(?<=\d)[.,;'\u2018\u2019\u2044](?=\d)"
)
WORD = re.compile(rf"[{PICTURES}]\ufe0f?|[{SIGNS}]|(?<!_)_*{LETTER}(?:{LETTER}|_|{INSIDE})*")
"""Marks within a word hold it together: men's, 3.5, u.s.a, size:large."""
SYLLABLE = re.compile(r"[aeiouy][^aeiou]")
"""A vowel and a consonant, which Porter's rules ask of what comes before an ending."""
POSSESSIVE = re.compile(r"['\u2019]s$")


def stemmed_words(text: str) -> list[str]:
    """The stems of a text, without stop words."""
    words = (POSSESSIVE.sub("", word) for word in WORD.findall(text.lower()))
    return [stem(word) for word in words if word not in STOP_WORDS]


@lru_cache(maxsize=1_000_000)
def stem(word: str) -> str:
    """A word without its ending, by Porter's algorithm with his three later changes, as in Lucene.

    They are: short words stay, `logi` becomes `log`, and `bli` becomes `ble`.
    """
    if len(word) <= 2:
        return word
    found = str(_porter().stemWord(word))
    if found.endswith("bli") and SYLLABLE.search(found[:-3]):
        return stem(f"{found[:-1]}e")
    return found[:-1] if found.endswith("logi") and SYLLABLE.search(found[:-4]) else found


@cache
def _porter() -> Any:
    try:
        import Stemmer
    except ImportError as error:
        raise ValueError(
            "WebShop's search needs PyStemmer, not installed here. Run: "
            "pip install 'hero-kernels[webshop]'"
        ) from error
    return Stemmer.Stemmer("porter")
