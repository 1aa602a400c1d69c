"""A shop that is ready to serve: catalogue, search (BM25), goals and their split."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

from hero.envs.shop.catalogue import (
    Goal,
    Product,
    build_goals,
    human_goals,
    load_products,
    price_limit,
)
from hero.envs.shop.search import Search, plain_words
from hero.envs.shop.synthetic import RawCatalogue, build, max_products

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
    """A catalogue and its goals; immutable, and shared by all environments of a process."""

    def __init__(
        self,
        profile: Profile,
        products: Mapping[str, Product],
        asins: Sequence[str],
        goals: Sequence[Goal],
        search: Search,
    ) -> None:
        self.profile, self.products, self.asins, self.goals = profile, products, asins, goals
        self._search = lru_cache(maxsize=8192)(search.best)
        held_out = profile.num_test + profile.num_dev
        if len(goals) <= held_out:
            raise ValueError(
                f"The catalogue has {len(goals)} goals; expected more than {held_out}, which are "
                "held out for test and dev. Raise num_products; of files of your own, see that all "
                "are of the same products."
            )
        self.first = {"test": 0, "dev": profile.num_test, "train": held_out}

    def tasks(self, split: str, repeated: bool = False) -> list[str]:
        """Ids of a split, counted from 0; goals are shuffled, then cut into test, dev and train.

        Args:
            split: "train", "dev" or "test".
            repeated: list goals too that an earlier split already has (an option that is listed
                twice gives the same goal twice).
        """
        check_choice("split", split, self.first)
        first, end = self._range(split)
        out = () if repeated else self.repeated
        return [f"{split}-{i - first}" for i in range(first, end) if i not in out]

    def _range(self, split: str) -> tuple[int, int]:
        starts = [*self.first.values(), len(self.goals)]
        number = list(self.first).index(split)
        return starts[number], starts[number + 1]

    @cached_property
    def repeated(self) -> frozenset[int]:
        """Positions of goals that an earlier split already has."""
        seen: set[Hashable] = set()
        found = set()
        for split in self.first:
            keys = [(i, self._key(i)) for i in range(*self._range(split))]
            found |= {i for i, key in keys if key in seen}
            seen.update(key for _, key in keys)
        return frozenset(found)

    def _key(self, position: int) -> Hashable:
        goal = self.goals[position]
        return goal.asin, goal.instruction

    def goal(self, task_id: str) -> Goal:
        """The goal of a task; raises KeyError naming the task if there is none of that id."""
        split, _, number = task_id.partition("-")
        if split in self.first and number[:12].isdecimal() and number == str(int(number[:12])):
            first, end = self._range(split)
            if first + int(number) < end:
                return self.goals[first + int(number)]
        raise KeyError(
            f"No task {task_id!r} in this shop; tasks(split) lists them, e.g. 'train-0'."
        )

    def search(self, query: str) -> tuple[str, ...]:
        """Asins that share a word with the query, best first, at most 50."""
        return tuple(self.asins[position] for position in self._search(query))

    def results_page(self, query: str, number: int) -> list[str]:
        """Asins on the results page `number`, counted from 1; empty beyond the last."""
        size = self.profile.page_size
        page = self._search(query)[(number - 1) * size : number * size]
        if self.profile.pages_in_catalogue_order:
            page = tuple(sorted(page))
        return [self.asins[position] for position in page]


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {sorted(choices)}.")


@lru_cache(maxsize=8)
def open_shop(profile: str, num_products: int | None, seed: int) -> Shop:
    """The synthetic shop of these parameters, built once in each process."""
    size = PROFILES[profile].num_products if num_products is None else num_products
    limit = max_products(profile)
    if not 1 <= size <= limit:
        raise ValueError(f"num_products={size} for profile {profile!r}; expected 1 to {limit}.")
    return shop_of(
        build(profile, size, seed),
        PROFILES[profile],
        seed,
        partial(Search.of_texts, words=plain_words),
    )


def shop_of(
    raw: RawCatalogue,
    profile: Profile,
    seed: int,
    index: Callable[[Iterable[str]], Search],
    human: dict[str, list[dict[str, Any]]] | None = None,
) -> Shop:
    """A shop in memory, from files as WebShop has them; goals are the `human` ones if given."""
    rng = random.Random(seed)
    products = load_products(raw, rng)
    if human is None:
        goals = build_goals(products, raw[1], profile.terse, rng)
    else:
        limits = partial(price_limit, rng=rng)
        goals = [goal for p in products for goal in human_goals(p, human.get(p.asin, ()), limits)]
    random.Random(GOAL_SHUFFLE_SEED).shuffle(goals)
    search = index(product.search_text for product in products)
    named = {product.asin: product for product in products}
    return Shop(profile, named, list(named), goals, search)
