"""Words as WebShop's search server compares them: Lucene's English analyser.

Cut at word boundaries (Unicode's UAX 29), possessive 's dropped, lower case, without stop words,
stemmed by Porter's algorithm.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

from hero.envs.shop.search import STOP_WORDS

WORD = re.compile(
    r"\w(?:\w|(?<=[^\W\d_])[:.'\u2019\u00b7](?=[^\W\d_])|(?<=\d)[.,;'\u2019](?=\d))*", re.UNICODE
)
"""Marks within a word hold it together: men's, 3.5, u.s.a, size:large."""
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
    if found.endswith("bli"):
        return stem(f"{found[:-1]}e")
    return found[:-1] if found.endswith("logi") else found


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
