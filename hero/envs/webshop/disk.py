"""A catalogue of any size: read once as a stream, then served from a folder.

    catalogue.sqlite   a row for each product: what WebShop's files say of it, and its price
    scores, texts, first .npy and words.txt   the search index
    goals.npy   a row for each goal, shuffled: product, choice of options, price limit
    index.json   what it was made from

Products and goals are those of the same files read into memory, price by price.
"""

from __future__ import annotations

import json
import math
import os
import random
import sqlite3
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hero.envs.shop.catalogue import (
    NO_PRICE_LIMIT,
    Goal,
    Product,
    combinations,
    human_goals,
    is_sold,
    price_limit,
    read_product,
    reading,
    synthetic_goal,
)
from hero.envs.shop.search import Search
from hero.envs.shop.store import GOAL_SHUFFLE_SEED, PROFILES, Shop
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
from hero.envs.webshop.index import Builder, load_index
from hero.envs.webshop.words import stemmed_words

VERSION = 1
"""Of the folder's form."""
GOAL = np.dtype([("product", "<i4"), ("choice", "<i4"), ("limit", "<f4")])
"""`choice` counts combinations of options, or goals that people wrote; no limit is NaN."""
KEPT_PRODUCTS = 20_000
"""Products that a process keeps parsed."""
Say = Callable[[str], None]


def open_index(
    data_dir: Path, folder: Path, num_products: int | None, seed: int, goals: str
) -> Shop:
    """The shop of an index, which is built if the folder is empty or missing.

    Raises:
        ValueError: the folder holds something else, or an index of other data.
    """
    items = find(data_dir, ITEMS)
    made_from = {
        "version": VERSION, "items": items.name, "bytes": items.stat().st_size,
        "num_products": num_products, "seed": seed, "goals": goals,
    }  # fmt: skip
    if not (folder / "index.json").is_file():
        build_index(data_dir, folder, made_from)
    facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    other = {name: facts.get(name) for name in made_from if facts.get(name) != made_from[name]}
    if other:
        raise ValueError(
            f"index_dir={str(folder)!r} is an index of other data: {other}, expected "
            f"{ {name: made_from[name] for name in other} }. Name another folder."
        )
    return DiskShop(folder)


def build_index(
    data_dir: Path, folder: Path, made_from: dict[str, Any], say: Say = lambda text: None
) -> None:
    """Read WebShop's files as streams into a new folder.

    Raises:
        ValueError: the folder is not empty, or the files are not WebShop's.
    """
    from hero.files import new_folder

    with new_folder(folder) as new:
        database = sqlite3.connect(new / "catalogue.sqlite")
        database.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;"
            "CREATE TABLE notes (asin TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID;"
            "CREATE TABLE nouns (asin TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID;"
            "CREATE TABLE written (asin TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID;"
            "CREATE TABLE products (position INTEGER PRIMARY KEY, asin TEXT UNIQUE, record TEXT);"
        )
        human = made_from["goals"] == "human"
        kinds = {"notes": NOTES, "nouns": NOUNS} | ({"written": HUMAN} if human else {})
        for table, pattern in kinds.items():
            pairs = entries(find(data_dir, pattern), "{")
            rows = ((asin, json.dumps(value)) for asin, value in pairs)
            database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", rows)
        say("notes and nouns read")
        rng = random.Random(made_from["seed"])
        count = _add_products(database, find(data_dir, ITEMS), made_from, rng, new)
        say(f"{count} products indexed")
        goals = np.fromiter(_goals(database, human, rng), dtype=GOAL)
        order = list(range(len(goals)))
        random.Random(GOAL_SHUFFLE_SEED).shuffle(order)
        np.save(new / "goals.npy", goals[order])
        say(f"{len(goals)} goals made")
        for table in ("notes", "nouns", "written"):
            database.execute(f"DROP TABLE {table}")
        database.commit()
        database.execute("VACUUM")
        database.close()
        facts = made_from | {"products": count, "total_goals": len(goals)}
        (new / "index.json").write_text(json.dumps(facts), encoding="utf-8")


def _add_products(
    database: sqlite3.Connection, path: Path, made_from: dict[str, Any], rng: random.Random,
    folder: Path,
) -> int:  # fmt: skip
    """Fill the table of products and the search index."""
    index, count = Builder(folder), 0
    for item in islice(entries(path), made_from["num_products"]):
        asin = check_item(item, path)["asin"]
        if not is_sold(asin):
            continue
        record: dict[str, Any] = {
            "item": {name: value for name, value in item.items() if name != "images"}
        }
        for table in ("notes", "nouns", "written"):
            row = database.execute(f"SELECT text FROM {table} WHERE asin = ?", (asin,)).fetchone()
            if table == "nouns":
                check_nouns(asin, {asin} if row else (), path.parent)
            record[table] = json.loads(row[0]) if row else ({} if table == "notes" else [])
        if database.execute("SELECT 1 FROM products WHERE asin = ?", (asin,)).fetchone():
            continue
        product = _product(record, rng)
        record["price"] = product.price
        database.execute("INSERT INTO products VALUES (?, ?, ?)", (count, asin, json.dumps(record)))
        index.add(stemmed_words(product.search_text))
        count += 1
    index.finish()
    words = "\n".join(index.vocabulary)
    (folder / "words.txt").write_text(words, encoding="utf-8")
    return count


def _goals(
    database: sqlite3.Connection, human: bool, rng: random.Random
) -> Iterator[tuple[int, int, float]]:
    """(product, choice, limit) in catalogue order; an equal goal gets the choice of the first."""
    for position, text in database.execute("SELECT position, record FROM products ORDER BY 1"):
        record = json.loads(text)
        product = _product(record)
        known: dict[Hashable, int] = {}
        if human:
            for number, entry in enumerate(record["written"]):
                for goal in human_goals(product, [entry], partial(price_limit, rng=rng)):
                    limit = goal.price_upper if goal.price_upper < NO_PRICE_LIMIT else math.nan
                    yield position, known.setdefault(goal.instruction, number), limit
        elif record["notes"].get("instruction") is not None:
            with reading(product.asin):
                tuple(record["notes"]["instruction_attributes"])
            limit = price_limit(product.price, rng) or math.nan
            for number, options in enumerate(combinations(product)):
                yield position, known.setdefault(options, number), limit


def _product(record: dict[str, Any], rng: random.Random | None = None) -> Product:
    """The product of a row; its price is drawn by `rng` at first, then it is the row's."""
    product = read_product(
        record["item"], record["notes"], record["nouns"], rng or random.Random(0)
    )
    return product if rng else replace(product, price=record["price"])


class DiskShop(Shop):
    """A shop whose products, goals and index lie in a folder; safe in threads and after a fork."""

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        records = Records(folder / "catalogue.sqlite")
        words = (folder / "words.txt").read_text(encoding="utf-8").split("\n")
        vocabulary = {word: number for number, word in enumerate(words)}
        index = load_index(folder, vocabulary, facts["products"])
        self.rows = np.load(folder / "goals.npy", mmap_mode="r")
        goals = Goals(self.rows, records, facts["goals"] == "human")
        super().__init__(
            PROFILES["full"], records, Asins(records, facts["products"]), goals,
            Search(index, stemmed_words),
        )  # fmt: skip

    @cached_property
    def repeated(self) -> frozenset[int]:
        keys = self.rows["product"].astype(np.int64) << 32 | self.rows["choice"]
        starts = list(self.first.values())
        found: set[int] = set()
        for start, end in zip(starts[1:], [*starts[2:], len(keys)], strict=True):
            again = np.isin(keys[start:end], keys[:start])
            found |= {int(i) + start for i in np.flatnonzero(again)}
        return frozenset(found)


class Records(Mapping[str, Product]):
    """Products by asin, read from the database when asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self._local = path, threading.local()
        self._product = lru_cache(maxsize=KEPT_PRODUCTS)(
            lambda asin: _product(self.record("asin", asin))
        )

    def record(self, column: str, key: str | int) -> dict[str, Any]:
        row = self.query(f"SELECT record FROM products WHERE {column} = ?", key)
        return dict(json.loads(row[0]))

    def query(self, text: str, *values: str | int) -> tuple[Any, ...]:
        """The first row; KeyError if there is none."""
        if getattr(self._local, "process", None) != os.getpid():
            address = f"{self.path.as_uri()}?mode=ro&immutable=1"
            self._local.database = sqlite3.connect(address, uri=True, check_same_thread=False)
            self._local.process = os.getpid()
        row = self._local.database.execute(text, values).fetchone()
        if row is None:
            raise KeyError(*values)
        return tuple(row)

    def __getitem__(self, asin: str) -> Product:
        return self._product(asin)

    def __len__(self) -> int:
        return int(self.query("SELECT count(*) FROM products")[0])

    def __iter__(self) -> Iterator[str]:
        return (self.query("SELECT asin FROM products WHERE position = ?", position)[0]
                for position in range(len(self)))  # fmt: skip


class Asins(Sequence[str]):
    """Ids of the products, by position."""

    def __init__(self, records: Records, size: int) -> None:
        self.size = size
        self._asin = lru_cache(maxsize=KEPT_PRODUCTS)(
            lambda at: records.query("SELECT asin FROM products WHERE position = ?", at)[0]
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, at: Any) -> Any:
        return self._asin(range(self.size)[at])


class Goals(Sequence[Goal]):
    """Goals by position, made when asked for."""

    def __init__(self, rows: np.ndarray, records: Records, human: bool) -> None:
        self.rows, self.records, self.human = rows, records, human

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: Any) -> Any:
        position, choice, price = self.rows[at].item()
        limit = None if math.isnan(price) else price
        record = self.records.record("position", position)
        product = _product(record)
        if self.human:
            return next(human_goals(product, [record["written"][choice]], lambda _: limit))
        options = next(islice(combinations(product), choice, None))
        return synthetic_goal(product, record["notes"], options, limit, terse=False)
