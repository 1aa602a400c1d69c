"""The shop that is made of WebShop's files: in memory, or served from an index on disk."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path

from hero.envs.shop.search import Search
from hero.envs.shop.store import PROFILES, Shop, shop_of
from hero.envs.webshop.disk import open_index
from hero.envs.webshop.files import (
    HUMAN,
    ITEMS,
    NOTES,
    NOUNS,
    check_item,
    check_nouns,
    entries,
    find,
)
from hero.envs.webshop.index import Builder
from hero.envs.webshop.words import stemmed_words

GOALS = ("synthetic", "human")
MAX_IN_MEMORY = 1_000_000_000
"""Bytes of a catalogue that is read whole: about ten times as much memory."""


@lru_cache(maxsize=4)
def open_webshop(
    data_dir: str, num_products: int | None, seed: int, goals: str, index_dir: str | None
) -> Shop:
    """The shop of these files, made once in each process.

    Raises:
        ValueError: files are missing, several of a kind, or not WebShop's.
    """
    if not data_dir:
        raise ValueError(
            "webshop needs WebShop's files: --env.options.data-dir DIR (docs/environments/"
            "webshop.md says how to get them). `--env.name shop` needs none."
        )
    folder = Path(data_dir)
    items = find(folder, ITEMS)
    if index_dir is not None:
        return open_index(folder, Path(index_dir), num_products, seed, goals)
    size = items.stat().st_size
    if size > MAX_IN_MEMORY and num_products is None:
        raise ValueError(
            f"{items} has {size / 1e9:.1f} GB, too much to be read into memory: give "
            "--env.options.index-dir DIR for an index on disk, which is built once."
        )
    products = [check_item(item, items) for item in islice(entries(items), num_products)]
    notes, nouns = (dict(entries(find(folder, kind), "{")) for kind in (NOTES, NOUNS))
    human = dict(entries(find(folder, HUMAN), "{")) if goals == "human" else None
    for product in products:
        check_nouns(product["asin"], nouns, folder)
    return shop_of((products, notes, nouns), PROFILES["full"], seed, _index, human)


def _index(texts: Iterable[str]) -> Search:
    builder = Builder()
    for text in texts:
        builder.add(stemmed_words(text))
    return Search(builder.finish(), stemmed_words)
