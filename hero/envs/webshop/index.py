"""BM25 as Lucene computes it, from a stream of texts, in memory or on disk.

    score = sum over words of idf * tf / (tf + k1 * (1 - b + b * length / mean length))

Lucene keeps a text's length in one byte; the same rounding here gives the same ranks.
"""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from hero.envs.shop.search import K1, B

PART = 1 << 23
"""Postings that are gathered before they go to disk: about 100 MB."""
EXACT_LENGTHS = 24
"""Lucene's byte holds lengths up to this as they are, and four binary digits of the rest."""


class Builder:
    """Takes texts one by one; `finish` makes the index.

    Args:
        folder: where postings wait and the index will lie; None keeps all in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.vocabulary: dict[str, int] = {}
        self.lengths, self._distinct = array("i"), array("i")
        self._words, self._counts = array("i"), array("i")
        self._parts: list[Any] = []

    def add(self, words: list[str]) -> None:
        """The words of the next text."""
        known = self.vocabulary
        counts = Counter(words)
        self._words.extend([known.setdefault(word, len(known)) for word in counts])
        self._counts.extend(counts.values())
        self._distinct.append(len(counts))
        self.lengths.append(len(words))
        if self.folder is not None and len(self._words) >= PART:
            self._flush()

    def _flush(self) -> None:
        """The postings so far: word, text and count of each, sorted by word."""
        words = np.frombuffer(self._words, dtype=np.int32)
        first = len(self.lengths) - len(self._distinct)
        texts = np.repeat(np.arange(first, len(self.lengths), dtype=np.int32), self._distinct)
        order = np.argsort(words, kind="stable")
        part = np.stack([words[order], texts[order], np.frombuffer(self._counts, np.int32)[order]])
        if self.folder is not None:
            path = self.folder / f"part-{len(self._parts)}.npy"
            np.save(path, part)
            self._parts.append(path)
        else:
            self._parts.append(part)
        self._words, self._counts, self._distinct = array("i"), array("i"), array("i")

    def finish(self) -> bm25s.BM25:
        """The index; with a folder its arrays lie there."""
        self._flush()
        lengths = np.asarray(self.lengths, dtype=np.int64)
        norms = (K1 * (1 - B + B * rounded(lengths) / lengths.mean())).astype(np.float32)
        size = len(self.vocabulary)
        numbers = sum(np.bincount(part[0], minlength=size) for part in self._read())
        first = np.concatenate([[0], np.cumsum(numbers)]).astype(np.int64)
        rarity = np.log1p((len(lengths) - numbers + 0.5) / (numbers + 0.5)).astype(np.float32)
        scores = self._array("scores", np.float32, first[-1])
        texts = self._array("texts", np.int32, first[-1])
        free = first[:-1].copy()
        for words, found, counts in self._read():
            here = np.bincount(words, minlength=size)
            rank = np.arange(len(words)) - np.repeat(np.cumsum(here) - here, here)
            place = free[words] + rank
            scores[place] = rarity[words] * counts / (counts + norms[found])
            texts[place] = found
            free += here
        for path in self._parts if self.folder is not None else ():
            path.unlink()
        if self.folder is not None:
            np.save(self.folder / "first.npy", first)
        return index_of(self.vocabulary, scores, texts, first, len(lengths))

    def _read(self) -> Any:
        return (np.load(part, mmap_mode="r") if self.folder is not None else part
                for part in self._parts)  # fmt: skip

    def _array(self, name: str, dtype: Any, size: int) -> np.ndarray:
        if self.folder is None:
            return np.empty(size, dtype)
        path = self.folder / f"{name}.npy"
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(int(size),))


def rounded(lengths: np.ndarray) -> np.ndarray:
    """Lengths as Lucene's norms hold them (SmallFloat.intToByte4 and back)."""
    rest = np.maximum(lengths - EXACT_LENGTHS, 0)
    digits = np.frexp(rest)[1]  # of the binary number
    shift = np.maximum(digits - 4, 0)
    return np.where(rest > 0, EXACT_LENGTHS + (rest >> shift << shift), lengths)


def load_index(folder: Path, vocabulary: dict[str, int], num_texts: int) -> bm25s.BM25:
    """The index that a `Builder` left in `folder`; its arrays stay on disk."""
    scores = np.load(folder / "scores.npy", mmap_mode="r")
    texts = np.load(folder / "texts.npy", mmap_mode="r")
    return index_of(vocabulary, scores, texts, np.load(folder / "first.npy"), num_texts)


def index_of(
    vocabulary: dict[str, int], scores: np.ndarray, texts: np.ndarray, first: np.ndarray, size: int
) -> bm25s.BM25:
    """bm25s' searcher over scores [P] of texts [P], sorted by word; those of a word begin at
    `first` [V + 1]."""
    found = bm25s.BM25(k1=K1, b=B)
    found.nonoccurrence_array = None
    found.scores = {"data": scores, "indices": texts, "indptr": first, "num_docs": size}
    found.vocab_dict = vocabulary
    return found
