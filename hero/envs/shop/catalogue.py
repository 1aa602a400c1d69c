"""Products and goals, read from WebShop's JSON schema by the official rules."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hero.envs.shop.synthetic import PATH_SEPARATOR, RawCatalogue

PRICE_LIMITS = tuple(10.0 * step for step in range(1, 100))
NO_PRICE_LIMIT = 1_000_000.0
DEFAULT_PRICE = 100.0
MAX_ASIN_LENGTH = 10


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
    options: tuple[tuple[str, str], ...]
    price_upper: float
    """Dollars."""


def read_webshop_files(data_dir: Path) -> RawCatalogue:
    """Read WebShop's files from a folder of the user.

    Raises:
        ValueError: the folder, or one of its files, is missing or there is more than one of a kind.
    """
    return (
        json.loads(_only_file(data_dir, "items_shuffle*.json").read_text(encoding="utf-8")),
        json.loads(_only_file(data_dir, "items_ins_v2*.json").read_text(encoding="utf-8")),
        json.loads(_only_file(data_dir, "title_nouns.json").read_text(encoding="utf-8")),
    )


def _only_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = [path.name for path in found]
        raise ValueError(
            f"data_dir={str(folder)!r} holds {names} for {pattern!r}; expected exactly one file. "
            "It needs WebShop's items_shuffle*.json and items_ins_v2*.json, and title_nouns.json, "
            "which maps each asin to the lower-case nouns of its title."
        )
    return found[0]


def load_products(raw: RawCatalogue, rng: random.Random) -> list[Product]:
    """Products in catalogue order; ids that are too long or come twice are left out."""
    items, annotations, title_nouns = raw
    unique: dict[str, dict[str, Any]] = {}
    for item in items:
        if item["asin"] != "nan" and len(item["asin"]) <= MAX_ASIN_LENGTH:
            unique.setdefault(item["asin"], item)
    return [
        _product(item, annotations.get(asin, {}), title_nouns.get(asin, []), rng)
        for asin, item in unique.items()
    ]


def _product(
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
        request = annotation.get("instruction")
        if request is None:
            continue
        limit = _price_limit(product.price, rng)
        names = sorted(product.options)
        for values in itertools.product(*(product.options[name] for name in names)):
            options = tuple(zip(names, values, strict=True))
            goals.append(
                Goal(
                    asin=product.asin,
                    instruction=_instruction(request, options, limit, terse),
                    request=request,
                    attributes=tuple(annotation["instruction_attributes"]),
                    options=options,
                    price_upper=NO_PRICE_LIMIT if limit is None else limit,
                )
            )
    return goals


def _price_limit(price: float, rng: random.Random) -> float | None:
    """The larger of two draws from the next four multiples of ten above the price."""
    above = [limit for limit in PRICE_LIMITS if limit > price][:4]
    return max(rng.sample(above, 2)) if len(above) >= 2 else None


def _instruction(
    request: str, options: tuple[tuple[str, str], ...], limit: float | None, terse: bool
) -> str:
    if terse:
        words = [request, *(f"{name} {value}" for name, value in options)]
        return " ".join(words if limit is None else [*words, f"max {limit:.0f}"])
    text = request
    if options:
        text += " with " + ", and ".join(f"{name}: {value}" for name, value in options)
    return text if limit is None else f"{text}, and price lower than {limit:.2f} dollars"
