"""The tasks: what a customer wants, what he tells when asked, and the gold actions.

Task `"{split}-{index}"` takes user `index % users` and family `(index + index // users) % 8`, so no
user meets a family twice. A goal names an order (or, for a transfer, a user), each order has one
user and each user one split: goals are disjoint between splits by construction.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import lru_cache

from desk.database import (
    SPLIT_USERS,
    Database,
    Item,
    Order,
    draw_address,
    initial_database,
    money,
)
from desk.tools import CANCEL_REASONS, Session, call, execute
from hero.toolcalls import ToolCall
from hero.types import StrEnum

TASK_IDS = {
    split: [f"{split}-{index}" for index in range(count)]
    for split, count in (("train", 240), ("dev", 60), ("test", 60))
}
FAMILIES = (
    "cancel",
    "return",
    "exchange",
    "address",
    "tell",
    "forbidden",
    "transfer",
    "two_steps",
)


class Mention(StrEnum):
    """How the customer speaks of his order."""

    NUMBER = "number"  # names the number at once
    ASKED = "asked"  # knows the number and tells it when asked
    ITEM = "item"  # has forgotten it: "the order with the kettle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One thing the customer wants."""

    kind: str
    """cancel, return, exchange, address, tell or transfer."""
    wish: str
    """His words, beginning in lower case."""
    order_id: str = ""
    mention: Mention = Mention.NUMBER
    item_name: str = ""
    """The item he describes the order by."""
    details: dict[str, str] = field(default_factory=dict)
    """What he tells when asked: reason, items, options or address; the very words of the reply."""
    product_id: str = ""
    """The product whose variants must be looked up; "" for none."""
    call: ToolCall | None = None
    """The gold action; None if there is only something to tell."""
    fact: str = ""
    """What he must be told: an amount or a tracking number."""
    fact_name: str = ""

    @property
    def forbidden(self) -> bool:
        """He asks for a change that the policy rules out."""
        return self.call is None and self.kind != "tell"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    id: str
    split: str
    family: str
    user_id: str
    requests: tuple[Request, ...]

    def gold_database(self) -> Database:
        """The records after the gold actions, run through the tools: they obey the policy."""
        session = Session(initial_database(self.split), user_id=self.user_id)
        for request in self.requests:
            if request.call is not None:
                session.confirmed = True
                execute(session, request.call)
        return session.database


@lru_cache(maxsize=512)
def load_task(task_id: str) -> Task:
    """Draw the task of that id; raises KeyError if there is none."""
    split = task_id.partition("-")[0]
    if task_id not in TASK_IDS.get(split, ()):
        ranges = ", ".join(f"{ids[0]} to {ids[-1]}" for ids in TASK_IDS.values())
        raise KeyError(f"No task {task_id!r}: expected one of {ranges}.")
    index, users = TASK_IDS[split].index(task_id), SPLIT_USERS[split]
    database = initial_database(split)
    user_id = list(database.users)[index % users]
    family = FAMILIES[(index + index // users) % len(FAMILIES)]
    requests = _Author(random.Random(f"desk task {task_id}"), database, user_id).write(family)
    return Task(id=task_id, split=split, family=family, user_id=user_id, requests=tuple(requests))


class _Author:
    """Writes the requests of one task. Each takes another order of the user."""

    def __init__(self, rng: random.Random, database: Database, user_id: str) -> None:
        self.rng = rng
        self.database = database
        self.orders = database.orders_of(user_id)

    def write(self, family: str) -> list[Request]:
        if family == "two_steps":
            pairs = [
                (self.cancel, self.return_),
                (self.return_, self.address),
                (self.exchange, self.tell),
                (self.tell, self.cancel),
                (self.address, self.exchange),
            ]
            return [write() for write in self.rng.choice(pairs)]
        writers = {
            "cancel": self.cancel,
            "return": self.return_,
            "exchange": self.exchange,
            "address": self.address,
            "tell": self.tell,
            "forbidden": self.forbidden,
            "transfer": self.transfer,
        }
        return [writers[family]()]

    def cancel(self, *statuses: str) -> Request:
        order = self._take(*statuses or ("pending",))
        mention, item, phrase = self._refer(order)
        reason = self.rng.choice(CANCEL_REASONS)
        why = self.rng.choice(["", f" ({reason})"])
        wish = self.rng.choice(
            [f"I would like to cancel {phrase}{why}.", f"please cancel {phrase}{why}."]
        )
        return Request(
            kind="cancel",
            wish=wish,
            order_id=order.order_id,
            mention=mention,
            item_name=item.name,
            details={"reason": reason},
            call=call("cancel_order", order_id=order.order_id, reason=reason),
        )

    def return_(self, *statuses: str) -> Request:
        order = self._take(*statuses or ("delivered",))
        mention, item, phrase = self._refer(order)
        others = [other for other in order.item_ids if other != item.item_id]
        chosen = [item.item_id, *self.rng.sample(others, self.rng.randint(0, len(others)))]
        names = " and the ".join(self.database.items[item_id].name for item_id in chosen)
        # "something from the order with the kettle" would read as if he had said what goes back.
        vague = mention is not Mention.ITEM and self.rng.random() < 0.5
        goods = "something" if vague else f"the {names}"
        phrase = _without_item(phrase, mention)
        wish = self.rng.choice(
            [
                f"I would like to return {goods} from {phrase}.",
                f"I want to send back {goods} from {phrase}.",
            ]
        )
        return Request(
            kind="return",
            wish=wish,
            order_id=order.order_id,
            mention=mention,
            item_name=item.name,
            details={"items": f"the {names}"},
            call=call("return_items", order_id=order.order_id, item_ids=sorted(chosen)),
        )

    def exchange(self, *statuses: str) -> Request:
        order = self._take(*statuses or ("delivered",))
        mention, item, phrase = self._refer(order)
        phrase = _without_item(phrase, mention)
        new, option = self._neighbour(item)
        options = f"{new.options[option]} instead of {item.options[option]}"
        wish = self.rng.choice(
            [
                f"I would like to exchange the {item.name} from {phrase}.",
                f"I would like to exchange the {item.name} from {phrase}: {options}.",
                f"can I have the {item.name} from {phrase} in another {option}: {options}?",
            ]
        )
        arguments = {"item_id": item.item_id, "new_item_id": new.item_id}
        return Request(
            kind="exchange",
            wish=wish,
            order_id=order.order_id,
            mention=mention,
            item_name=item.name,
            details={"options": options},
            product_id=item.product_id,
            call=call("exchange_item", order_id=order.order_id, **arguments),
        )

    def address(self, *statuses: str) -> Request:
        order = self._take(*statuses or ("pending",))
        mention, item, phrase = self._refer(order)
        address = draw_address(self.rng)
        where = self.rng.choice(["another address", str(address)])
        wish = self.rng.choice(
            [f"please send {phrase} to {where}.", f"I have moved, {phrase} should go to {where}."]
        )
        return Request(
            kind="address",
            wish=wish,
            order_id=order.order_id,
            mention=mention,
            item_name=item.name,
            details={"address": str(address)},
            call=call("change_address", order_id=order.order_id, **address._asdict()),
        )

    def tell(self) -> Request:
        subject = self.rng.choice(["total", "tracking", "price"])
        order = self._take(*(("shipped",) if subject == "tracking" else ("shipped", "delivered")))
        mention, item, phrase = self._refer(order)
        new, option = self._neighbour(item)
        value = new.options[option]
        wish, fact, fact_name = {
            "total": (
                f"how much did I pay in total for {phrase}?",
                money(self.database.total_cents(order)),
                "the total",
            ),
            "tracking": (
                f"what is the tracking number of {phrase}?",
                order.tracking,
                "the tracking number",
            ),
            "price": (
                f"I like the {item.name} from {_without_item(phrase, mention)}. "
                f"What does the same in {value} cost?",
                money(new.cents),
                f"the price of the same {item.name} in {value}",
            ),
        }[subject]
        return Request(
            kind="tell",
            wish=wish,
            order_id=order.order_id,
            mention=mention,
            item_name=item.name,
            product_id=item.product_id if subject == "price" else "",
            fact=fact,
            fact_name=fact_name,
        )

    def forbidden(self) -> Request:
        """A change that the order's status rules out; he then wants a fact that takes a look-up."""
        write, status = self.rng.choice(
            [
                (self.cancel, "shipped"),
                (self.address, "shipped"),
                (self.return_, "shipped"),
                (self.exchange, "shipped"),
                (self.return_, "pending"),
                (self.exchange, "pending"),
            ]
        )
        request = write(status)
        order = self.database.orders[request.order_id]
        tracking = bool(order.tracking) and self.rng.random() < 0.5
        fact = order.tracking if tracking else money(self.database.total_cents(order))
        fact_name = "the tracking number" if tracking else "the total of that order"
        wish = f"{request.wish} If that is not possible, tell me {fact_name}."
        return replace(request, wish=wish, call=None, fact=fact, fact_name=fact_name)

    def transfer(self) -> Request:
        wish, reason = self.rng.choice(
            [
                ("I want compensation for a parcel that the courier damaged.", "compensation"),
                ("I would like to delete my account and all my data.", "account deletion"),
                ("I want to pay my next purchase by invoice.", "payment by invoice"),
                ("there are charges on my card that I do not recognise.", "unknown charges"),
            ]
        )
        due = call("transfer_to_human", reason=reason)
        return Request(kind="transfer", wish=wish, call=due)

    def _take(self, *statuses: str) -> Order:
        order = self.rng.choice([order for order in self.orders if order.status in statuses])
        self.orders.remove(order)
        return order

    def _refer(self, order: Order) -> tuple[Mention, Item, str]:
        """How he mentions the order, the item he has in mind, and the phrase for the order."""
        mention = self.rng.choice(list(Mention))
        item = self.database.items[self.rng.choice(order.item_ids)]
        phrase = {
            Mention.NUMBER: f"order {order.order_id}",
            Mention.ASKED: "one of my orders",
            Mention.ITEM: f"the order with the {item.name}",
        }[mention]
        return mention, item, phrase

    def _neighbour(self, item: Item) -> tuple[Item, str]:
        """An available variant that differs in one option, and that option's name."""
        choices = [
            (other, differing[0])
            for other in self.database.variants(item.product_id)
            if other.available and len(differing := _differing_options(item, other)) == 1
        ]
        return self.rng.choice(choices)


def _differing_options(item: Item, other: Item) -> list[str]:
    return [name for name, value in item.options.items() if other.options[name] != value]


def _without_item(phrase: str, mention: Mention) -> str:
    """The phrase for an order in a sentence that names the item already."""
    return "an order whose number I do not have" if mention is Mention.ITEM else phrase
