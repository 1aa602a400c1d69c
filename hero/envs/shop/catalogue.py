"""Products and goals, read from WebShop's JSON schema by the official rules."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hero.envs.shop.synthetic import PATH_SEPARATOR, RawCatalogue

PRICE_LIMITS = tuple(10.0 * step for step in range(1, 100))
NO_PRICE_LIMIT = 1_000_000.0
DEFAULT_PRICE = 100.0
MAX_ASIN_LENGTH = 10
Options = tuple[tuple[str, str], ...]
"""(name, value) of the options that a goal asks for."""


@dataclass(frozen=True, slots=True)
class Product:
    """One article of the catalogue."""

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    price: float
    """Dollars; drawn from the range if the catalogue names one."""
    price_tag: str
    options: dict[str, tuple[str, ...]]
    """Values of each option, lower case, in the order of the page."""
    attributes: tuple[str, ...]
    query: str
    path: frozenset[str]
    """Names of the categories it stands under."""
    nouns: tuple[str, ...]
    """Nouns of the title, lower case, duplicates kept."""
    lower_texts: tuple[str, str, str]
    """Title, bullets and description in lower case: where the reward looks for attributes."""

    @property
    def search_text(self) -> str:
        """What the search index holds: title, description, first bullet and options."""
        options = ", and ".join(
            f"{name}: {', '.join(values)}" for name, values in self.options.items()
        )
        first_bullet = self.bullets[0] if self.bullets else ""
        return " ".join((self.title, self.description, first_bullet, options)).lower()


@dataclass(frozen=True, slots=True)
class Goal:
    """What one episode asks for."""

    asin: str
    """The product the goal was made from; others may satisfy it too."""
    instruction: str
    request: str
    """The instruction without options and price."""
    attributes: tuple[str, ...]
    options: Options
    """(name, value); the name is "" where people wrote the goal."""
    price_upper: float
    """Dollars."""


def load_products(raw: RawCatalogue, rng: random.Random) -> list[Product]:
    """Products in catalogue order; ids that are too long or come twice are left out."""
    items, annotations, title_nouns = raw
    unique: dict[str, dict[str, Any]] = {}
    for item in items:
        if is_sold(item["asin"]):
            unique.setdefault(item["asin"], item)
    return [
        read_product(item, annotations.get(asin, {}), title_nouns.get(asin, []), rng)
        for asin, item in unique.items()
    ]


def is_sold(asin: str) -> bool:
    """Whether a product of this id is loaded: the official server leaves longer ids out."""
    return asin != "nan" and len(asin) <= MAX_ASIN_LENGTH


@contextmanager
def reading(asin: str) -> Iterator[None]:
    """What a file says of a product is not what WebShop's files say: a mistake of the user."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"What the files say of the product {asin!r} is not as in WebShop's: "
            f"{type(error).__name__}: {error}. Mend or remove it."
        ) from error


def read_product(
    item: dict[str, Any], annotation: dict[str, Any], nouns: list[str], rng: random.Random
) -> Product:
    """A product from its entries in the three files.

    Raises:
        ValueError: they are not as in WebShop's.
    """
    with reading(item["asin"]):
        return _read_product(item, annotation, nouns, rng)


def _read_product(
    item: dict[str, Any], annotation: dict[str, Any], nouns: list[str], rng: random.Random
) -> Product:
    bullets = item["small_description"]
    bullets = tuple(bullets) if isinstance(bullets, list) else (bullets,)
    prices = _prices(item.get("pricing"))
    return Product(
        asin=item["asin"],
        title=item["name"],
        description=item["full_description"],
        bullets=bullets,
        price=prices[0] if len(prices) == 1 else rng.uniform(*prices),
        price_tag=" to ".join(f"${price}" for price in prices),
        options=_options(item["customization_options"]),
        attributes=tuple(annotation.get("attributes", ("DUMMY_ATTR",))),
        query=item["query"].lower().strip(),
        path=frozenset(part.strip() for part in item["product_category"].split(PATH_SEPARATOR)),
        nouns=tuple(nouns),
        lower_texts=(
            item["name"].lower(),
            " ".join(bullets).lower(),
            item["full_description"].lower(),
        ),
    )


def _prices(pricing: str | None) -> list[float]:
    """The price, or the two ends of its range."""
    if not pricing:
        return [DEFAULT_PRICE]
    return [float(re.sub(r"[^\d.]", "", part)) for part in pricing.split("$")[1:]][:2]


def _options(
    customization: dict[str, list[dict[str, Any]] | None] | str,
) -> dict[str, tuple[str, ...]]:
    if isinstance(customization, str):
        return {}
    return {
        name.lower(): tuple(entry["value"].strip().replace("/", " | ").lower() for entry in entries)
        for name, entries in customization.items()
        if entries is not None
    }


def build_goals(
    products: list[Product], annotations: dict[str, dict[str, Any]], terse: bool, rng: random.Random
) -> list[Goal]:
    """One goal for each instruction and combination of option values, in catalogue order.

    Args:
        products: the catalogue.
        annotations: for each asin its instruction and the attributes that it names.
        terse: `cotton shirt color red max 30` in place of WebShop's sentence.
        rng: draws the price limits.
    """
    goals = []
    for product in products:
        annotation = annotations.get(product.asin, {})
        if annotation.get("instruction") is None:
            continue
        limit = price_limit(product.price, rng)
        for options in combinations(product):
            goals.append(synthetic_goal(product, annotation, options, limit, terse))
    return goals


def combinations(product: Product) -> Iterator[Options]:
    """Every choice of one value for each option."""
    names = sorted(product.options)
    for values in itertools.product(*(product.options[name] for name in names)):
        yield tuple(zip(names, values, strict=True))


def synthetic_goal(
    product: Product, annotation: dict[str, Any], options: Options, limit: float | None, terse: bool
) -> Goal:
    """The goal of an instruction and a choice of options."""
    with reading(product.asin):
        request = annotation["instruction"]
        return Goal(
            asin=product.asin,
            instruction=_instruction(request, options, limit, terse),
            request=request,
            attributes=tuple(annotation["instruction_attributes"]),
            options=options,
            price_upper=NO_PRICE_LIMIT if limit is None else limit,
        )


def human_goals(
    product: Product, written: Iterable[dict[str, Any]], limits: Callable[[float], float | None]
) -> Iterator[Goal]:
    """Goals that people wrote for a product; those without attributes are left out.

    Their options are values without a name. `limits` gives the price limit for a price.
    """
    for entry in written:
        attributes = tuple(entry["instruction_attributes"])
        if not attributes:
            continue
        limit = limits(product.price)
        request = entry["instruction"].strip(".")
        yield Goal(
            asin=product.asin,
            instruction=_instruction(request, (), limit, terse=False),
            request=request,
            attributes=attributes,
            options=tuple(("", value) for value in entry["instruction_options"]),
            price_upper=NO_PRICE_LIMIT if limit is None else limit,
        )


def price_limit(price: float, rng: random.Random) -> float | None:
    """The larger of two draws from the next four multiples of ten above the price."""
    above = [limit for limit in PRICE_LIMITS if limit > price][:4]
    return max(rng.sample(above, 2)) if len(above) >= 2 else None


def _instruction(request: str, options: Options, limit: float | None, terse: bool) -> str:
    if terse:
        words = [request, *(f"{name} {value}" for name, value in options)]
        return " ".join(words if limit is None else [*words, f"max {limit:.0f}"])
    text = request
    if options:
        text += " with " + ", and ".join(f"{name}: {value}" for name, value in options)
    return text if limit is None else f"{text}, and price lower than {limit:.2f} dollars"
