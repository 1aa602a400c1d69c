"""WebShop's reward on buying, as the official environment computes it.

    reward = type_factor * (n_attributes + n_options + [price <= limit])
             / (|attributes| + |options| + 1)

An attribute matches if it resembles one of the product's attributes (token_set_ratio > 85) or
occurs in its title, bullets or description. An option matches if a chosen value resembles it,
colours reduced to their base colour. `type_factor` is 1, or less for another kind of product.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from rapidfuzz import fuzz, utils

from hero.envs.shop.catalogue import Goal, Product
from hero.envs.shop.words import word_list

MATCH_ABOVE = 85
"""Scores of 0..100 above this count as a match."""

BASE_COLORS = word_list(
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze "
    "brown burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas "
    "coffee cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso "
    "fuchsia gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki "
    "lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha "
    "multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple "
    "rainbow red rose royal rust sand sapphire seashell silver skull slate steel stone "
    "stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine yellow"
)
"""WebShop's colours; the first that occurs in a value stands for it, so the order matters."""

LATIN_1_UPPER_HALF = dict.fromkeys(range(128, 256))


@dataclass(frozen=True, slots=True)
class Score:
    """What a purchase earned, part by part."""

    matched_attributes: int
    num_attributes: int
    matched_options: int
    num_options: int
    price_ok: bool
    type_factor: float

    @property
    def reward(self) -> float:
        matched = self.matched_attributes + self.matched_options + self.price_ok
        return matched / (self.num_attributes + self.num_options + 1) * self.type_factor


def score_purchase(product: Product, chosen: Iterable[str], goal: Goal, target: Product) -> Score:
    """Score buying `product` with the option values `chosen`.

    Args:
        product: what is bought.
        chosen: option values that were selected.
        goal: what was asked for.
        target: the product that the goal was made from.
    """
    values = tuple(chosen)
    return Score(
        matched_attributes=sum(
            attribute_matches(product, attribute) for attribute in goal.attributes
        ),
        num_attributes=len(goal.attributes),
        matched_options=sum(option_matches(name, value, values) for name, value in goal.options),
        num_options=len(goal.options),
        price_ok=product.price <= goal.price_upper,
        type_factor=type_factor(product, target),
    )


def attribute_matches(product: Product, attribute: str) -> bool:
    return any(similar(own, attribute) for own in product.attributes) or any(
        attribute in text for text in product.lower_texts
    )


def option_matches(name: str, value: str, chosen: Iterable[str]) -> bool:
    """Whether one of the `chosen` values earns the goal's option `name: value`.

    The official environment compares the values chosen with the *pair* (name, value). So a goal's
    colour is reduced to its base colour only if it is one, and `color 2005brown` cannot be matched
    by buying it: some goals of the real data do not reach 1. We keep that, for scores that can be
    compared.
    """
    if name:
        wanted = next((color for color in BASE_COLORS if color in (name, value)), f"{name} {value}")
    else:  # people named a value alone
        wanted = base_color(value)
    return any(similar(base_color(own), wanted) for own in chosen)


def type_factor(product: Product, target: Product) -> float:
    """1 for the same kind of product, 0.5, 0.1 or 0 for kinds that are ever less alike."""
    if not target.nouns:
        title_score = 0.2
    else:
        title_score = len(set(product.nouns) & set(target.nouns)) / len(target.nouns)
    if title_score == 0.0:
        return 0.0
    if title_score < 0.1:
        return 0.1
    same_kind = product.query == target.query or len(product.path & target.path) >= 2
    return 1.0 if same_kind or title_score > 0.2 else 0.5


def base_color(value: str) -> str:
    """The first base colour that occurs in `value`, or `value` itself."""
    return next((color for color in BASE_COLORS if color in value), value)


@lru_cache(maxsize=65_536)
def similar(one: str, other: str) -> bool:
    """`token_set_ratio > 85` as thefuzz has it: without U+0080..U+00FF, and rounded."""
    texts = (one.translate(LATIN_1_UPPER_HALF), other.translate(LATIN_1_UPPER_HALF))
    return round(fuzz.token_set_ratio(*texts, processor=utils.default_process)) > MATCH_ABOVE
