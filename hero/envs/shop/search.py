"""Search as WebShop's server has it: BM25 over words, at most fifty results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import bm25s
import numpy as np

from hero.envs.shop.words import word_list

K1, B = 0.9, 0.4
"""The search server's parameters."""
STOP_WORDS = frozenset(
    word_list(
        "a an and are as at be but by for if in into is it no not of on or such that the their "
        "then there these they this to was will with"
    )
)
MAX_RESULTS = 50
Words = Callable[[str], list[str]]
"""From a text to the words that are compared."""


def plain_words(text: str) -> list[str]:
    """Words as they are written, without stop words."""
    return [word for word in re.findall(r"[^\W_]+", text.lower()) if word not in STOP_WORDS]


class Search:
    """An index of texts.

    Args:
        bm25: bm25s' index, which may lie on disk.
        words: how the texts were cut into words, and queries are.
    """

    def __init__(self, bm25: bm25s.BM25, words: Words) -> None:
        self.bm25, self.words = bm25, words

    @classmethod
    def of_texts(cls, texts: Iterable[str], words: Words) -> Search:
        bm25 = bm25s.BM25(k1=K1, b=B)
        bm25.index([words(text) for text in texts], show_progress=False)
        return cls(bm25, words)

    def best(self, query: str) -> tuple[int, ...]:
        """Positions of the texts that share a word with the query, best first, at most 50.

        Ties are in the order of the texts, so that every process ranks alike.
        """
        words = [word for word in self.words(query) if word in self.bm25.vocab_dict]
        if not words:
            return ()
        scores = self.bm25.get_scores(words)
        least = 0.0
        if len(scores) > MAX_RESULTS:
            least = np.partition(scores, -MAX_RESULTS)[-MAX_RESULTS]
        found = np.flatnonzero((scores >= least) & (scores > 0))
        ranked = found[np.argsort(-scores[found], kind="stable")]
        return tuple(int(position) for position in ranked[:MAX_RESULTS])
