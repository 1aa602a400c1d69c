"""Word pools of the synthetic catalogues.

Values that the reward compares fuzzily (attributes among themselves, option values among
themselves) are chosen so that no two of them match: whoever picks the wrong one is not paid for
it.
"""

from __future__ import annotations

from dataclasses import dataclass


def word_list(text: str) -> tuple[str, ...]:
    """The words of a line, split at white space."""
    return tuple(text.split())


def phrase_list(text: str) -> tuple[str, ...]:
    """The phrases of a line, split at commas."""
    return tuple(phrase.strip() for phrase in text.split(","))


TINY_ATTRIBUTES = word_list(
    "cotton linen wool silk leather velvet canvas bamboo rubber nylon striped floral quilted "
    "knitted printed waterproof"
)
TINY_NOUNS = word_list(
    "shirt hat coat scarf dress jacket sock glove belt bag pillow blanket towel curtain rug "
    "apron robe skirt vest tent"
)
COLORS = word_list(
    "red blue green black white yellow purple orange brown pink gray navy teal olive maroon "
    "silver ivory beige coral khaki"
)
TINY_COLORS = COLORS[:10]
SIZES = word_list("small medium large petite tall wide narrow regular mini jumbo slim loose")
TINY_SIZES = SIZES[:3]
STYLES = word_list(
    "classic modern vintage minimal sporty casual formal urban tropical nautical bohemian gothic"
)
FLAVORS = word_list(
    "vanilla peanut cinnamon honey ginger cherry mango lime pepper garlic hazelnut raspberry"
)
BRANDS = word_list(
    "Alvera Borrin Cadwyn Delmora Estoril Fennick Galdor Hestia Ivarra Jorvik Kelmont Lumira "
    "Marlow Nordell Orsino Pellara Quenby Rivelle Sandor Tavish Umbria Velmar Wexley Yarrow "
    "Zendel"
)
FILLERS = word_list(
    "premium everyday deluxe essential portable compact lightweight durable elegant practical "
    "soft sturdy handy stylish comfortable reliable simple useful original improved gift home "
    "travel office outdoor indoor men women kids adults friends family summer winter spring "
    "autumn"
)


@dataclass(frozen=True, slots=True)
class Category:
    """One department: what it sells, and by which options and attributes things differ."""

    name: str
    path: str
    kinds: tuple[str, ...]
    """Product kinds: the `query` of WebShop, and the last nouns of a title."""
    third_option: tuple[str, tuple[str, ...]]
    """Name and values of the option beside colour and size."""
    attributes: tuple[str, ...]


CATEGORIES = (
    Category(
        name="fashion",
        path="Clothing, Shoes & Jewelry",
        kinds=phrase_list(
            "pullover, sandals, loafers, raincoat, cardigan, leggings, polo, blazer, swimsuit, "
            "pajamas"
        ),
        third_option=("style", STYLES),
        attributes=phrase_list(
            "long sleeve, slim fit, machine wash, rubber sole, elastic waist, button closure, "
            "arch support, quick drying, tummy control, relaxed fit, hand washable, moisture "
            "wicking, drawstring pocket, memory foam, faux leather, day comfort, zipper front, "
            "polyester spandex, ankle strap, wash cold"
        ),
    ),
    Category(
        name="beauty",
        path="Beauty & Personal Care",
        kinds=phrase_list(
            "shampoo, lipstick, moisturizer, hairbrush, perfume, mascara, sunscreen, "
            "toothbrush, lotion, soap"
        ),
        third_option=("scent", FLAVORS),
        attributes=phrase_list(
            "cruelty free, sensitive skin, tea tree, coconut oil, paraben safe, fine lines, "
            "dark circles, natural ingredients, dead skin, damaged hair, travel size, argan "
            "extract, hyaluronic acid, dry scalp, alcohol exempt, easy carry, lip balm, nail "
            "polish, oral hygiene, rose petals"
        ),
    ),
    Category(
        name="grocery",
        path="Grocery & Gourmet Food",
        kinds=phrase_list(
            "granola, popcorn, coffee, jerky, crackers, pasta, chocolate, almonds, syrup, tea"
        ),
        third_option=("flavor name", FLAVORS),
        attributes=phrase_list(
            "gluten free, low sodium, plant based, non gmo, soy exempt, high protein, keto "
            "friendly, artificial colors, individually wrapped, resealable bag, ready eat, fat "
            "reduced, old fashioned, freeze dried, kosher certified, perfect gift, dairy safe, "
            "nut blend, sugar added, usda organic"
        ),
    ),
    Category(
        name="electronics",
        path="Electronics",
        kinds=phrase_list(
            "headphones, charger, speaker, tripod, keyboard, projector, earbuds, camera, "
            "antenna, router"
        ),
        third_option=("style", STYLES),
        attributes=phrase_list(
            "noise cancelling, fast charging, plug play, stereo sound, high definition, "
            "wireless bluetooth, aluminum alloy, water resistant, carbon fiber, optical zoom, "
            "gold plated, hands free, dust proof, usb port, batteries included, remote control, "
            "power amplifier, light weight, tempered glass, easy install"
        ),
    ),
    Category(
        name="garden",
        path="Home & Kitchen",
        kinds=phrase_list(
            "bookcase, nightstand, armchair, lamp, mattress, barstool, ottoman, mirror, vase, "
            "cushion"
        ),
        third_option=("style", STYLES),
        attributes=phrase_list(
            "solid wood, stainless steel, mid century, spot clean, storage space, living room, "
            "coated finish, assembly required, steel frame, engineered bamboo, super soft, "
            "heavy duty, dining table, contemporary design, eco certified, wall mounted, lumbar "
            "cushioning, king bed, metal legs, white marble"
        ),
    ),
)
