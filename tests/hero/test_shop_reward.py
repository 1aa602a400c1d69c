"""WebShop's reward, by hand.

Oracle: the formula of the official environment, worked out in the comments.
"""

from __future__ import annotations

import itertools

import pytest

from hero.envs.shop.catalogue import Goal, Product
from hero.envs.shop.reward import base_color, option_matches, score_purchase, similar
from hero.envs.shop.words import (
    CATEGORIES,
    COLORS,
    FLAVORS,
    SIZES,
    STYLES,
    TINY_ATTRIBUTES,
    TINY_NOUNS,
)


def product(**changes: object) -> Product:
    title = str(changes.pop("title", "Cotton Shirt"))
    fields: dict[str, object] = {
        "asin": "B1",
        "title": title,
        "description": "",
        "bullets": (),
        "price": 20.0,
        "price_tag": "$20.0",
        "options": {},
        "attributes": ("long sleeve",),
        "query": "shirts",
        "path": frozenset({"Clothing", "Men", "Shirts"}),
        "nouns": ("cotton", "shirt"),
        "lower_texts": (title.lower(), "machine wash only", "soft collar"),
    }
    return Product(**{**fields, **changes})  # type: ignore[arg-type]


def goal(**changes: object) -> Goal:
    fields: dict[str, object] = {
        "asin": "B1",
        "instruction": "",
        "request": "",
        "attributes": ("long sleeve", "machine wash"),
        "options": (("color", "navy blue"), ("size", "large")),
        "price_upper": 30.0,
    }
    return Goal(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bought, chosen, wanted, reward",
    [
        # (2 attributes + 2 options + price) / 5
        (product(), ["navy blue", "large"], goal(), 5 / 5),
        (product(), ["large"], goal(), 4 / 5),
        (product(), [], goal(), 3 / 5),
        # 'long sleeve' is neither an attribute nor in a text; 'machine wash' is in the bullets
        (product(attributes=("short",)), ["large"], goal(), 3 / 5),
        # an attribute that the description names counts
        (product(), [], goal(attributes=("soft collar",), options=()), 2 / 2),
        # too expensive
        (product(price=30.01), ["navy blue", "large"], goal(), 4 / 5),
        (product(price=30.0), ["navy blue", "large"], goal(), 5 / 5),
        # another word order is the same option
        (product(), ["blue navy", "large"], goal(), 5 / 5),
    ],
    ids=["full", "one option", "no option", "attribute", "description", "price", "limit", "order"],
)  # fmt: skip
def test_formula(bought: Product, chosen: list[str], wanted: Goal, reward: float) -> None:
    score = score_purchase(bought, chosen, wanted, target=product())
    assert score.reward == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize(
    "bought, target_nouns, factor",
    [
        (product(), ("cotton", "shirt"), 1.0),
        (product(nouns=("hat",)), ("cotton", "shirt"), 0.0),  # no shared noun
        (product(nouns=("hat",)), (), 1.0),  # 0.2 by definition, and the query is the same
        (product(nouns=("hat",), query="hats", path=frozenset({"Hats"})), (), 0.5),
        # 1 of 5 nouns is 0.2, not above it: other query, one shared category
        (product(nouns=("a",), query="hats", path=frozenset({"Men"})), tuple("abcde"), 0.5),
        (product(nouns=("a",), query="h", path=frozenset({"Men", "Shirts"})), tuple("abcde"), 1.0),
        (product(nouns=("a",), query="hats", path=frozenset()), tuple("abcd"), 1.0),
        (product(nouns=("a",)), tuple("abcdefghijk"), 0.1),  # 1 of 11, in spite of the query
        (product(nouns=("a",), query="hats", path=frozenset()), ("a", "a", "a", "b"), 1.0),
        (product(nouns=("b",), query="hats", path=frozenset()), ("a", "a", "a", "a", "b"), 0.5),
    ],
)  # fmt: skip
def test_type_factor(bought: Product, target_nouns: tuple[str, ...], factor: float) -> None:
    score = score_purchase(bought, [], goal(), target=product(nouns=target_nouns))
    assert score.type_factor == factor


@pytest.mark.parametrize(
    "name, wanted, chosen, matches",
    [
        ("color", "navy", "dark navy stripes", False),  # 'dark' comes before 'navy'
        ("color", "navy", "stripes navy", True),
        ("color", "blue", "sky blue", True),
        ("color", "2005brown", "2005brown", False),  # 'brown' against 'color 2005brown'
        ("size", "x-large", "x-large", True),
        ("size", "x-large", "large", True),  # every word of 'large' is in 'size x-large'
        ("size", "large", "x-large", False),
        ("size", "10", "10.5", False),
        ("flavor name", "caf\u00e9 noir", "caf noir", True),  # letters of Latin-1 are dropped
    ],
)
def test_option_matching(name: str, wanted: str, chosen: str, matches: bool) -> None:
    assert option_matches(name, wanted, [chosen]) is matches


@pytest.mark.parametrize(
    "values", [COLORS, SIZES, STYLES, FLAVORS], ids=["color", "size", "style", "flavor"]
)
def test_synthetic_option_values_match_themselves_only(values: tuple[str, ...]) -> None:
    for wanted, chosen in itertools.product(values, values):
        assert base_color(wanted) == wanted
        for name in ("color", "size", "style", "scent", "flavor name"):
            assert option_matches(name, wanted, [chosen]) is (wanted == chosen), (wanted, chosen)


@pytest.mark.parametrize(
    "attributes",
    [TINY_ATTRIBUTES, *(category.attributes for category in CATEGORIES)],
    ids=["tiny", *(category.name for category in CATEGORIES)],
)
def test_synthetic_attributes_match_themselves_only(attributes: tuple[str, ...]) -> None:
    assert len(set(attributes)) == len(attributes)
    for one, other in itertools.permutations(attributes, 2):
        assert not similar(one, other) and one not in other, (one, other)


def test_no_tiny_attribute_hides_in_a_noun() -> None:
    assert not [(a, n) for a in TINY_ATTRIBUTES for n in TINY_NOUNS if a in n]
