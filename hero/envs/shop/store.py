"""A shop that is ready to serve: catalogue, search (BM25), goals and their split."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import bm25s
import numpy as np

from hero.envs.shop.catalogue import Goal, build_goals, load_products, read_webshop_files
from hero.envs.shop.synthetic import build, max_products
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
GOAL_SHUFFLE_SEED = 233


@dataclass(frozen=True, slots=True)
class Profile:
    """The size of a world. Goals are shuffled, then cut into test, dev and train, in this order."""

    num_products: int
    page_size: int
    max_steps: int
    observation: str
    num_test: int
    num_dev: int
    terse: bool = False
    """Instructions of a few words in place of WebShop's sentence."""
    pages_in_catalogue_order: bool = False
    """Order within a results page by catalogue, not by score: the first is not always best."""


PROFILES = {
    "full": Profile(1000, 10, 15, "text", num_test=500, num_dev=1000),
    "small": Profile(200, 5, 8, "text", num_test=200, num_dev=200),
    "tiny": Profile(
        200, 3, 8, "compact", num_test=200, num_dev=200, terse=True, pages_in_catalogue_order=True
    ),
}


class Shop:
    """Immutable once built, and shared by all environments of a process (`open_shop`)."""

    def __init__(
        self, profile: str, num_products: int | None, seed: int, data_dir: str | None
    ) -> None:
        self.profile = PROFILES[profile]
        if data_dir is None:
            raw = build(profile, self._size(profile, num_products), seed)
        else:
            items, annotations, title_nouns = read_webshop_files(Path(data_dir))
            raw = (items[:num_products], annotations, title_nouns)
        rng = random.Random(seed)
        products = load_products(raw, rng)
        self.products = {product.asin: product for product in products}
        self.asins = list(self.products)
        self.goals = build_goals(products, raw[1], self.profile.terse, rng)
        random.Random(GOAL_SHUFFLE_SEED).shuffle(self.goals)
        self.splits = split_goals(self.goals, self.profile.num_test, self.profile.num_dev)
        self._goal_of = {
            task: goal for tasks in self.splits.values() for task, goal in tasks.items()
        }
        self._position = {asin: position for position, asin in enumerate(self.asins)}
        self._bm25 = bm25s.BM25(k1=K1, b=B)
        self._bm25.index([words_of(p.search_text) for p in products], show_progress=False)
        self.search = lru_cache(maxsize=8192)(self._search)

    def _size(self, profile: str, num_products: int | None) -> int:
        size = self.profile.num_products if num_products is None else num_products
        limit = max_products(profile)
        if not 1 <= size <= limit:
            raise ValueError(f"num_products={size} for profile {profile!r}; expected 1 to {limit}.")
        return size

    def goal(self, task_id: str) -> Goal:
        """The goal of a task; raises KeyError naming the task if there is none of that id."""
        if task_id not in self._goal_of:
            raise KeyError(
                f"No task {task_id!r} in this shop; tasks(split) lists them, e.g. 'train-0'."
            )
        return self._goal_of[task_id]

    def _search(self, query: str) -> tuple[str, ...]:
        """Asins that share a word with the query, best first, at most 50.

        Ties are in catalogue order, so that every process ranks alike. Words are compared as they
        are written; the official server stems them (Porter), so on real data a page may differ
        where only the inflection of a word does.
        """
        words = words_of(query)
        if not words:
            return ()
        scores = self._bm25.get_scores(words)
        ranked = np.argsort(-scores, kind="stable")[:MAX_RESULTS]
        return tuple(self.asins[position] for position in ranked if scores[position] > 0)

    def results_page(self, query: str, number: int) -> list[str]:
        """Asins on the results page `number`, counted from 1; empty beyond the last."""
        size = self.profile.page_size
        page = list(self.search(query)[(number - 1) * size : number * size])
        if self.profile.pages_in_catalogue_order:
            page.sort(key=self._position.__getitem__)
        return page


def words_of(text: str) -> list[str]:
    return [word for word in re.findall(r"[^\W_]+", text.lower()) if word not in STOP_WORDS]


def split_goals(goals: list[Goal], num_test: int, num_dev: int) -> dict[str, dict[str, Goal]]:
    """Cut shuffled goals into {split: {task id: goal}}; ids count from 0 in each split.

    A goal that an earlier split already has (an option listed twice gives the same goal twice) is
    left out, and the ids of the others stay.

    Raises:
        ValueError: nothing would be left for train.
    """
    held_out = num_test + num_dev
    if len(goals) <= held_out:
        raise ValueError(
            f"The catalogue has {len(goals)} goals; expected more than {held_out}, which are held "
            "out for test and dev. Raise num_products."
        )
    cuts = {"test": goals[:num_test], "dev": goals[num_test:held_out], "train": goals[held_out:]}
    seen: set[tuple[str, str]] = set()
    splits = {}
    for split, part in cuts.items():
        keys = [(goal.asin, goal.instruction) for goal in part]
        splits[split] = {
            f"{split}-{index}": goal
            for index, (goal, key) in enumerate(zip(part, keys, strict=True))
            if key not in seen
        }
        seen.update(keys)
    return splits


@lru_cache(maxsize=8)
def open_shop(profile: str, num_products: int | None, seed: int, data_dir: str | None) -> Shop:
    """The shop of these parameters, built once in each process."""
    return Shop(profile, num_products, seed, data_dir)
