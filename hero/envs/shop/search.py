"""BM25 over the catalogue, with ties in catalogue order so that every process ranks alike."""

from __future__ import annotations

import re
from collections.abc import Sequence

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


class SearchIndex:
    """Ranks documents for a query; words are compared as they are written, without stemming.

    The official server stems (Porter) before it ranks, so on real data a page may differ where
    only the inflection of a word does.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        self._bm25 = bm25s.BM25(k1=K1, b=B)
        self._bm25.index([words_of(document) for document in documents], show_progress=False)

    def search(self, query: str, limit: int) -> list[int]:
        """Positions of at most `limit` documents that share a word with `query`, best first."""
        words = words_of(query)
        if not words:
            return []
        scores = self._bm25.get_scores(words)
        ranked = np.argsort(-scores, kind="stable")[:limit]
        return [int(position) for position in ranked if scores[position] > 0]


def words_of(text: str) -> list[str]:
    return [word for word in re.findall(r"[^\W_]+", text.lower()) if word not in STOP_WORDS]
