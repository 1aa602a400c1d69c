"""Seeded synthetic catalogues in WebShop's own JSON schema: (items, attributes, title nouns).

They pass through the same loader as WebShop's files, so everything downstream is tested on both.

- `full` follows the statistics of WebShop's catalogue: 58/24/17/1 % of the products have 0/1/2/3
  options, an option has 4 values in the median and 10 at the 90th percentile, prices have deciles
  9, 29 (median) and 199.
- `small` has short titles, one or two options and no long texts.
- `tiny` has two-word titles, `cotton shirt`, each once; every product has a colour and a size.

Families of near-duplicates (same kind, another attribute, price or option) make reading worthwhile.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

from hero.envs.shop.words import (
    BRANDS,
    CATEGORIES,
    COLORS,
    FILLERS,
    SIZES,
    TINY_ATTRIBUTES,
    TINY_COLORS,
    TINY_NOUNS,
    TINY_SIZES,
    Category,
)

RawCatalogue = tuple[list[dict[str, Any]], dict[str, dict[str, Any]], dict[str, list[str]]]
"""Items, {asin: attributes and instruction}, {asin: nouns of the title}."""

Options = dict[str, list[str]]

PATH_SEPARATOR = "\u203a"
"""Between the categories of a product's path: a single right-pointing angle quotation mark."""

NORMAL_P90 = 1.2816
"""90th percentile of the standard normal distribution."""


def build(profile: str, num_products: int, seed: int) -> RawCatalogue:
    """The raw catalogue of one profile, the same in every process."""
    rng = random.Random(f"{profile}-{num_products}-{seed}")
    catalogue = _Catalogue()
    if profile == "tiny":
        _fill_tiny(catalogue, num_products, rng)
    else:
        _Families(rng, small=profile == "small").fill(catalogue, num_products)
    return catalogue.items, catalogue.attributes, catalogue.nouns


def max_products(profile: str) -> int:
    """Largest `num_products` that a profile can fill with distinct ids and titles."""
    limits = {"tiny": len(TINY_ATTRIBUTES) * len(TINY_NOUNS), "small": 9000, "full": 1_000_000}
    return limits[profile]


class _Catalogue:
    """Grows product by product, in the form of WebShop's files."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.attributes: dict[str, dict[str, Any]] = {}
        self.nouns: dict[str, list[str]] = {}

    def add(
        self,
        asin: str,
        title: str,
        kind: str,
        *,
        description: str,
        bullets: list[str],
        price: float,
        options: Options,
        category: str,
        path: str,
        attributes: list[str],
        instruction: str | None,
        wanted: Sequence[str],
    ) -> None:
        """Add a product; without an instruction it is a distractor, which no goal asks for."""
        self.items.append(
            {
                "asin": asin,
                "name": title,
                "full_description": description,
                "small_description": bullets,
                "pricing": f"${price:.2f}",
                "product_category": path,
                "customization_options": {
                    name: [{"value": value} for value in values] for name, values in options.items()
                },
                "category": category,
                "query": kind,
            }
        )
        self.nouns[asin] = [kind]
        self.attributes[asin] = {"attributes": attributes}
        if instruction is not None:
            asked = {"instruction": instruction, "instruction_attributes": list(wanted)}
            self.attributes[asin] |= asked


def _fill_tiny(catalogue: _Catalogue, num_products: int, rng: random.Random) -> None:
    pairs = [(attribute, noun) for attribute in TINY_ATTRIBUTES for noun in TINY_NOUNS]
    numbers = rng.sample(range(100, 1000), num_products)
    for number, (attribute, noun) in zip(numbers, rng.sample(pairs, num_products), strict=True):
        title = f"{attribute} {noun}"
        options = {
            "color": rng.sample(TINY_COLORS, rng.choice((3, 4))),
            "size": rng.sample(TINY_SIZES, rng.choice((2, 3))),
        }
        catalogue.add(
            f"P{number}", title, noun, description=title, bullets=[title],
            price=float(rng.randint(10, 79)), options=options, category="tiny",
            path=f"shop {PATH_SEPARATOR} {noun}", attributes=[attribute], instruction=title,
            wanted=[attribute],
        )  # fmt: skip


class _Families:
    """Families of one to four siblings of one kind and brand, each unlike the one before.

    `small` draws from the small profile, else from the full one.
    """

    def __init__(self, rng: random.Random, small: bool) -> None:
        self.rng = rng
        self.small = small

    def fill(self, catalogue: _Catalogue, num_products: int) -> None:
        rng, small = self.rng, self.small
        asins = iter(self._asins(num_products))
        while len(catalogue.items) < num_products:
            category = rng.choice(CATEGORIES)
            kind, brand = rng.choice(category.kinds), rng.choice(BRANDS)
            own = rng.sample(
                category.attributes, rng.choice((2, 3)) if small else rng.randint(0, 8)
            )
            options = self._options(self._option_names(category), category)
            price = self._price()
            for sibling in range(min(rng.randint(1, 4), num_products - len(catalogue.items))):
                if sibling:
                    own, options, price = self._vary(own, options, price, category)
                asin = next(asins)
                description, bullets = self._texts(brand, own, kind)
                title = self._title(brand, own, kind)
                wanted = rng.sample(own, 2 if small else min(len(own), rng.randint(2, 4)))
                asked = f"Find me {', '.join(wanted)} {kind}" if len(wanted) >= 2 else None
                catalogue.add(
                    asin, title, kind, description=description, bullets=bullets, price=price,
                    options=options, category=category.name,
                    path=f"{category.path} {PATH_SEPARATOR} {kind.capitalize()}",
                    attributes=own, instruction=asked, wanted=wanted,
                )  # fmt: skip
        rng.shuffle(catalogue.items)

    def _vary(
        self, own: list[str], options: Options, price: float, category: Category
    ) -> tuple[list[str], Options, float]:
        """The next sibling: an attribute, the price or the values of the options differ."""
        change = self.rng.choice(("attribute", "price", "options"))
        if change == "attribute" and own:
            others = [attribute for attribute in category.attributes if attribute not in own]
            position = self.rng.randrange(len(own))
            own = [*own[:position], self.rng.choice(others), *own[position + 1 :]]
        elif change == "options" and options:
            options = self._options(options, category)
        else:
            price *= self.rng.uniform(1.1, 1.6) ** self.rng.choice((-1, 1))
            price = round(max(1.0, price), 2)
        return own, options, price

    def _asins(self, count: int) -> list[str]:
        if self.small:
            return [f"B{number}" for number in self.rng.sample(range(1000, 10_000), count)]
        letters = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
        unique: dict[str, None] = {}
        while len(unique) < count:
            unique["B0" + "".join(self.rng.choices(letters, k=8))] = None
        return list(unique)

    def _option_names(self, category: Category) -> list[str]:
        names = list(_option_pools(category))
        if self.small:
            return self.rng.sample(names[:2], self.rng.choice((1, 2)))
        return self.rng.sample(names, self.rng.choices((0, 1, 2, 3), weights=(58, 24, 17, 1))[0])

    def _options(self, names: Iterable[str], category: Category) -> Options:
        pools = _option_pools(category)
        return {name: self.rng.sample(pools[name], self._num_values(pools[name])) for name in names}

    def _num_values(self, pool: tuple[str, ...]) -> int:
        """Log-normal with median 4 and 90th percentile 10, cut at the size of the pool."""
        if self.small:
            return self.rng.choice((3, 4))
        drawn = self.rng.lognormvariate(math.log(4), math.log(2.5) / NORMAL_P90)
        return max(1, min(len(pool), round(drawn)))

    def _price(self) -> float:
        """Dollars, log-normal on either side of the median: deciles 9, 29 (median) and 199."""
        z = self.rng.gauss(0.0, 1.0)
        spread = math.log(199 / 29 if z > 0 else 29 / 9) / NORMAL_P90
        return round(max(1.0, 29 * math.exp(z * spread)), 2)

    def _title(self, brand: str, own: list[str], kind: str) -> str:
        if self.small:
            return f"{brand} {' '.join(own)} {kind}"
        length = self.rng.randint(11, 24)
        words = [brand, *" ".join(own[:4]).split(), kind]
        words += self.rng.sample(FILLERS, max(0, length - len(words)))
        return " ".join(word.capitalize() for word in words)

    def _texts(self, brand: str, own: list[str], kind: str) -> tuple[str, list[str]]:
        """Description and bullets."""
        if self.small:
            return f"{kind} by {brand}".capitalize(), [attribute.capitalize() for attribute in own]
        use = self.rng.sample(FILLERS, 5)
        description = (
            f"This {kind} by {brand} is {use[0]} and {use[1]}. It is made for {use[2]}: "
            f"{', '.join(own) if own else 'plain'}."
        )
        bullets = [f"{text.capitalize()}: a {self.rng.choice(FILLERS)} {kind}" for text in own[:4]]
        while len(bullets) < 5:
            bullets.append(f"{' '.join(self.rng.sample(FILLERS, 3)).capitalize()} {kind}")
        return description, bullets


def _option_pools(category: Category) -> dict[str, tuple[str, ...]]:
    third, values = category.third_option
    return {"color": COLORS, "size": SIZES, third: values}
