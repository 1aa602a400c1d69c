"""The shop's records: products, users and orders, drawn once from fixed seeds.

Every split has users and orders of its own, cut from one list without repetition; the catalogue
is shared. Each user owns four orders (one pending, one shipped, two delivered) and no product
twice, so "the order with the kettle" names exactly one and every task family fits every user.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

SPLIT_USERS = {"train": 120, "dev": 30, "test": 30}

# fmt: off
FIRST_NAMES = (
    "Ada", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas",
    "Kira", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Yusuf",
)
LAST_NAMES = (
    "Adler", "Brown", "Costa", "Diaz", "Evans", "Fischer", "Garcia", "Hansen",
    "Ito", "Jensen", "Kovacs", "Lopez", "Meyer", "Novak", "Rossi",
)
STREETS = (
    "Oak Street", "Linden Road", "Mill Lane", "Park Avenue", "Harbour Way", "Station Road",
    "Rose Court",
)
CITIES = ("Ashford", "Brookfield", "Clayton", "Dunmore", "Eastvale", "Fairview", "Greenport")

OPTION_VALUES = {
    "color": ("black", "white", "red", "blue", "green"),
    "size": ("small", "medium", "large"),
    "material": ("oak", "steel", "bamboo"),
    "version": ("basic", "deluxe"),
}
PRODUCTS = {
    ("color", "size"): (
        "jacket", "backpack", "t-shirt", "raincoat", "tent", "yoga mat", "helmet", "sweater",
    ),
    ("color", "material"): (
        "desk lamp", "bookshelf", "bedside table", "clock", "mirror", "stool", "picture frame",
        "tray",
    ),
    ("color", "version"): (
        "kettle", "toaster", "blender", "headphones", "keyboard", "speaker", "camera",
        "vacuum cleaner",
    ),
}
"""Names of the products by the two options they come in."""
# fmt: on


class Address(NamedTuple):
    street: str
    city: str
    zip: str

    def __str__(self) -> str:
        return ", ".join(self)


@dataclass(frozen=True, slots=True)
class Item:
    """One variant of a product; what an order contains."""

    item_id: str
    product_id: str
    name: str
    options: dict[str, str]
    cents: int
    available: bool


@dataclass(frozen=True, slots=True)
class User:
    user_id: str
    name: str
    email: str


@dataclass(frozen=True, slots=True)
class Order:
    """Frozen: a change replaces the order, so a copy of the database is one shallow `dict`."""

    order_id: str
    user_id: str
    status: str
    """pending, shipped, delivered; after a change cancelled, return or exchange requested."""
    item_ids: tuple[str, ...]
    address: Address
    tracking: str
    """Empty while the order is pending."""
    cancel_reason: str = ""
    returned: tuple[str, ...] = ()
    exchanged: tuple[str, ...] = ()
    """(old item id, new item id)"""


@dataclass(slots=True)
class Database:
    """The desk's records in one state."""

    users: dict[str, User]
    items: dict[str, Item]
    orders: dict[str, Order]
    transfers: tuple[str, ...] = ()
    """Ids of the users handed over to a human, in order."""

    def copy(self) -> Database:
        return replace(self, orders=dict(self.orders))

    def orders_of(self, user_id: str) -> list[Order]:
        return [order for order in self.orders.values() if order.user_id == user_id]

    def variants(self, product_id: str) -> list[Item]:
        return [item for item in self.items.values() if item.product_id == product_id]

    def total_cents(self, order: Order) -> int:
        return sum(self.items[item_id].cents for item_id in order.item_ids)


def money(cents: int) -> str:
    """`8450` -> `"84.50"`."""
    return f"{cents // 100}.{cents % 100:02d}"


def draw_address(rng: random.Random) -> Address:
    street = f"{rng.randint(1, 199)} {rng.choice(STREETS)}"
    return Address(street, rng.choice(CITIES), str(rng.randint(10000, 99999)))


@lru_cache(maxsize=1)
def _catalogue() -> dict[str, Item]:
    """24 products in 2 x 2 variants, of which one is sold out.

    So every variant has an available neighbour that differs in one option: an exchange is always
    possible.
    """
    rng = random.Random("desk catalogue")
    kinds = [(name, options) for options, names in PRODUCTS.items() for name in names]
    item_numbers = iter(rng.sample(range(1000, 10000), 4 * len(kinds)))
    product_numbers = rng.sample(range(100, 1000), len(kinds))
    items: dict[str, Item] = {}
    for number, (name, options) in zip(product_numbers, kinds, strict=True):
        values = [rng.sample(OPTION_VALUES[option], 2) for option in options]
        sold_out = rng.randrange(4)
        base = rng.randint(900, 9000)
        surcharges = rng.sample(range(2000), 4)
        for index, pair in enumerate(product(*values)):
            item_id = f"I{next(item_numbers)}"
            chosen = dict(zip(options, pair, strict=True))
            cents = base + surcharges[index]
            items[item_id] = Item(item_id, f"P{number}", name, chosen, cents, index != sold_out)
    return items


@lru_cache(maxsize=1)
def _people() -> dict[str, tuple[dict[str, User], dict[str, Order]]]:
    """Users and orders by split, cut from one list: no name, email or id is in two splits."""
    rng = random.Random("desk people")
    count = sum(SPLIT_USERS.values())
    names = rng.sample([(first, last) for first in FIRST_NAMES for last in LAST_NAMES], count)
    user_numbers = iter(rng.sample(range(1000, 10000), count))
    order_numbers = iter(rng.sample(range(1000, 10000), 4 * count))
    tracking_numbers = iter(rng.sample(range(10000, 100000), 4 * count))
    by_product: dict[str, list[Item]] = {}
    for item in _catalogue().values():
        by_product.setdefault(item.product_id, []).append(item)

    remaining = iter(names)
    people: dict[str, tuple[dict[str, User], dict[str, Order]]] = {}
    for split, size in SPLIT_USERS.items():
        users: dict[str, User] = {}
        orders: dict[str, Order] = {}
        for _ in range(size):
            first, last = next(remaining)
            user_id = f"U{next(user_numbers)}"
            email = f"{first}.{last}@example.com".lower()
            users[user_id] = User(user_id, f"{first} {last}", email)
            home = draw_address(rng)
            products = iter(rng.sample(sorted(by_product), 12))
            statuses = ["pending", "shipped", "delivered", "delivered"]
            rng.shuffle(statuses)
            for status in statuses:
                size_of_order = rng.randint(2, 3) if status == "delivered" else rng.randint(1, 2)
                chosen = tuple(
                    rng.choice(by_product[next(products)]).item_id for _ in range(size_of_order)
                )
                order_id = f"W{next(order_numbers)}"
                tracking = "" if status == "pending" else f"T{next(tracking_numbers)}"
                orders[order_id] = Order(order_id, user_id, status, chosen, home, tracking)
        people[split] = users, orders
    return people


def initial_database(split: str) -> Database:
    """A fresh copy of the records every task of `split` starts from."""
    users, orders = _people()[split]
    return Database(users=users, items=_catalogue(), orders=dict(orders))
