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
from collections.abc import Iterable
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
    if profile == "tiny":
        return _build_tiny(num_products, rng)
    return _build_families(num_products, rng, small=profile == "small")


def max_products(profile: str) -> int:
    """Largest `num_products` that a profile can fill with distinct ids and titles."""
    limits = {"tiny": len(TINY_ATTRIBUTES) * len(TINY_NOUNS), "small": 9000, "full": 1_000_000}
    return limits[profile]


def _build_tiny(num_products: int, rng: random.Random) -> RawCatalogue:
    pairs = [(attribute, noun) for attribute in TINY_ATTRIBUTES for noun in TINY_NOUNS]
    numbers = rng.sample(range(100, 1000), num_products)
    items, attributes, nouns = [], {}, {}
    for number, (attribute, noun) in zip(numbers, rng.sample(pairs, num_products), strict=True):
        asin, title = f"P{number}", f"{attribute} {noun}"
        options = {
            "color": rng.sample(TINY_COLORS, rng.choice((3, 4))),
            "size": rng.sample(TINY_SIZES, rng.choice((2, 3))),
        }
        items.append(
            _item(
                asin=asin,
                title=title,
                description=title,
                bullets=[title],
                price=float(rng.randint(10, 79)),
                options=options,
                category="tiny",
                path=f"shop {PATH_SEPARATOR} {noun}",
                query=noun,
            )
        )
        attributes[asin] = _annotation([attribute], title, [attribute])
        nouns[asin] = [noun]
    return items, attributes, nouns


def _build_families(num_products: int, rng: random.Random, small: bool) -> RawCatalogue:
    """Families of one to four siblings of one kind and brand, each unlike the one before."""
    asins = iter(_asins(num_products, rng, small))
    items: list[dict[str, Any]] = []
    attributes: dict[str, dict[str, Any]] = {}
    nouns: dict[str, list[str]] = {}
    while len(items) < num_products:
        category = rng.choice(CATEGORIES)
        kind, brand = rng.choice(category.kinds), rng.choice(BRANDS)
        own = rng.sample(category.attributes, rng.choice((2, 3)) if small else rng.randint(0, 8))
        options = _options(_option_names(category, rng, small), category, rng, small)
        price = _price(rng)
        for sibling in range(min(rng.randint(1, 4), num_products - len(items))):
            if sibling:
                own, options, price = _vary(own, options, price, category, rng, small)
            asin = next(asins)
            description, bullets = _texts(brand, own, kind, rng, small)
            items.append(
                _item(
                    asin=asin,
                    title=_title(brand, own, kind, rng, small),
                    description=description,
                    bullets=bullets,
                    price=price,
                    options=options,
                    category=category.name,
                    path=f"{category.path} {PATH_SEPARATOR} {kind.capitalize()}",
                    query=kind,
                )
            )
            wanted = rng.sample(own, 2 if small else min(len(own), rng.randint(2, 4)))
            text = f"Find me {', '.join(wanted)} {kind}" if len(wanted) >= 2 else None
            attributes[asin] = _annotation(own, text, wanted)
            nouns[asin] = [kind]
    rng.shuffle(items)
    return items, attributes, nouns


def _vary(
    own: list[str],
    options: Options,
    price: float,
    category: Category,
    rng: random.Random,
    small: bool,
) -> tuple[list[str], Options, float]:
    """The next sibling: an attribute, the price or the values of the options differ."""
    change = rng.choice(("attribute", "price", "options"))
    if change == "attribute" and own:
        others = [attribute for attribute in category.attributes if attribute not in own]
        position = rng.randrange(len(own))
        own = [*own[:position], rng.choice(others), *own[position + 1 :]]
    elif change == "options" and options:
        options = _options(options, category, rng, small)
    else:
        price = round(max(1.0, price * rng.uniform(1.1, 1.6) ** rng.choice((-1, 1))), 2)
    return own, options, price


def _asins(count: int, rng: random.Random, small: bool) -> list[str]:
    if small:
        return [f"B{number}" for number in rng.sample(range(1000, 10_000), count)]
    letters = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
    unique: dict[str, None] = {}
    while len(unique) < count:
        unique["B0" + "".join(rng.choices(letters, k=8))] = None
    return list(unique)


def _option_names(category: Category, rng: random.Random, small: bool) -> list[str]:
    names = list(_option_pools(category))
    if small:
        return rng.sample(names[:2], rng.choice((1, 2)))
    return rng.sample(names, rng.choices((0, 1, 2, 3), weights=(58, 24, 17, 1))[0])


def _option_pools(category: Category) -> dict[str, tuple[str, ...]]:
    third, values = category.third_option
    return {"color": COLORS, "size": SIZES, third: values}


def _options(names: Iterable[str], category: Category, rng: random.Random, small: bool) -> Options:
    pools = _option_pools(category)
    return {
        name: rng.sample(
            pools[name], rng.choice((3, 4)) if small else _num_values(len(pools[name]), rng)
        )
        for name in names
    }


def _num_values(limit: int, rng: random.Random) -> int:
    """Log-normal with median 4 and 90th percentile 10, cut at the size of the pool."""
    return max(1, min(limit, round(rng.lognormvariate(math.log(4), math.log(2.5) / NORMAL_P90))))


def _price(rng: random.Random) -> float:
    """Dollars, log-normal on either side of the median: deciles 9, 29 (median) and 199."""
    z = rng.gauss(0.0, 1.0)
    spread = math.log(199 / 29 if z > 0 else 29 / 9) / NORMAL_P90
    return round(max(1.0, 29 * math.exp(z * spread)), 2)


def _title(brand: str, own: list[str], kind: str, rng: random.Random, small: bool) -> str:
    if small:
        return f"{brand} {' '.join(own)} {kind}"
    length = rng.randint(11, 24)
    named = own[: min(len(own), 4)]
    words = [brand, *" ".join(named).split(), kind]
    words += rng.sample(FILLERS, max(0, length - len(words)))
    return " ".join(word.capitalize() for word in words)


def _texts(
    brand: str, own: list[str], kind: str, rng: random.Random, small: bool
) -> tuple[str, list[str]]:
    if small:
        return f"{kind} by {brand}".capitalize(), [attribute.capitalize() for attribute in own]
    listed = ", ".join(own) if own else "plain"
    use = rng.sample(FILLERS, 5)
    description = (
        f"This {kind} by {brand} is {use[0]} and {use[1]}. It is made for {use[2]}: {listed}."
    )
    bullets = [f"{attribute.capitalize()}: a {rng.choice(FILLERS)} {kind}" for attribute in own[:4]]
    while len(bullets) < 5:
        bullets.append(f"{' '.join(rng.sample(FILLERS, 3)).capitalize()} {kind}")
    return description, bullets


def _annotation(own: list[str], instruction: str | None, wanted: list[str]) -> dict[str, Any]:
    """Products without an instruction are distractors: no goal asks for them."""
    if instruction is None:
        return {"attributes": own}
    return {"attributes": own, "instruction": instruction, "instruction_attributes": wanted}


def _item(
    *,
    asin: str,
    title: str,
    description: str,
    bullets: list[str],
    price: float,
    options: Options,
    category: str,
    path: str,
    query: str,
) -> dict[str, Any]:
    """One entry of WebShop's `items_shuffle.json`."""
    return {
        "asin": asin,
        "name": title,
        "full_description": description,
        "small_description": bullets,
        "pricing": f"${price:.2f}",
        "images": [""],
        "product_category": path,
        "average_rating": "",
        "customization_options": {
            name: [{"value": value, "image": None} for value in values]
            for name, values in options.items()
        },
        "category": category,
        "query": query,
        "page": 1,
    }
