"""A customer-service desk in the spirit of tau-bench: a plain class whose public methods are tools.

    PYTHONPATH=examples hero env check tools --env.options.factory desk:Desk
    PYTHONPATH=examples hero train --env.name tools --env.options.factory desk:Desk \
        --model.path MODEL

The reward is 1 if at the end the records are as they should be, and the customer was told what he
wanted to know. Doing nothing solves no task, and neither does refusing everything.
"""

from __future__ import annotations

import copy
import random
from typing import Any, ClassVar

FIRST = ["Ada", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas"]
LAST = ["Adler", "Brown", "Costa", "Diaz", "Evans", "Fischer"]
GOODS = ["kettle", "lamp", "backpack", "clock", "mirror", "toaster",
         "tent", "camera", "helmet", "speaker", "blender", "stool"]  # fmt: skip
STREETS = "Oak Street", "Linden Road", "Mill Lane", "Park Avenue", "Harbour Way"
STATUSES = "pending", "shipped", "delivered"
"""Of the three orders of each customer."""
REQUESTS = {
    "cancel": "please cancel the order with the {pending}.",
    "address": "I have moved: the order with the {pending} should go to {address}.",
    "return": "I would like to return the {delivered}.",
    "total": "how much did I pay for the order with the {delivered}?",
    "tracking": "what is the tracking number of the order with the {shipped}?",
    "too late": "please cancel the order with the {shipped}. If that is not possible, tell me its "
    "tracking number.",
    "compensation": "I want compensation for a parcel that the courier damaged.",
}
"""What customers want: of their orders they name an item, and each item is in one order."""


def draw_address(rng: random.Random) -> str:
    return f"{rng.randint(1, 199)} {rng.choice(STREETS)}"


def draw_customers() -> dict[str, dict[str, Any]]:
    """Orders by id of each customer by e-mail address, the same in every process."""
    rng = random.Random("desk")
    ids = iter(rng.sample(range(1000, 10000), 2 * 3 * len(FIRST) * len(LAST)))
    customers: dict[str, dict[str, Any]] = {}
    for first in FIRST:
        for last in LAST:
            goods, home = rng.sample(GOODS, 6), draw_address(rng)
            customers[f"{first}.{last}@example.com".lower()] = {
                f"W{next(ids)}": {
                    "status": status, "address": home, "tracking": f"T{next(ids)}",
                    "items": {item: round(rng.uniform(5, 90), 2) for item in goods[at : at + 2]},
                }
                for at, status in zip((0, 2, 4), STATUSES, strict=True)
            }  # fmt: skip
    return customers


CUSTOMERS = draw_customers()


def rows_of(split: slice) -> list[dict[str, str]]:
    return [{"email": email, "request": request}
            for email in [*CUSTOMERS][split] for request in REQUESTS]  # fmt: skip


class Desk:
    """Each task is one request of one customer; no customer is in two splits."""

    system_prompt = """\
You are the customer service desk of an online shop, and act by tools alone.
1. Look the customer up by the e-mail address first, and serve only this customer's own orders.
2. Only pending orders can be cancelled or sent to another address, only items of delivered ones
   returned. If a request is ruled out, change nothing, and tell what is asked for instead.
3. Transfer to a human what none of your tools can do, and nothing else.
4. When all is done, reply to the customer, once. State amounts and numbers exactly."""

    tasks: ClassVar = {
        "train": rows_of(slice(40)), "dev": rows_of(slice(40, 50)), "test": rows_of(slice(50, 60))
    }  # fmt: skip

    def reset(self, email: str, request: str) -> str:
        rng = random.Random(f"{email} {request}")
        self._email, self._orders = email, copy.deepcopy(CUSTOMERS[email])
        self._found, self.done, self._said, self._transferred = False, False, "", False
        by_status = {order["status"]: order for order in self._orders.values()}
        named = {status: rng.choice([*order["items"]]) for status, order in by_status.items()}
        address, shipped = draw_address(rng), by_status["shipped"]["tracking"]
        total = f"{sum(by_status['delivered']['items'].values()):.2f}"
        self._fact = {"total": total, "tracking": shipped, "too late": shipped}.get(request, "")
        self._transfer_is_due = request == "compensation"
        self._goal = copy.deepcopy(self._orders)
        wanted = {order["status"]: order for order in self._goal.values()}
        if request == "cancel":
            wanted["pending"]["status"] = "cancelled"
        elif request == "address":
            wanted["pending"]["address"] = address
        elif request == "return":
            wanted["delivered"]["status"] = f"{named['delivered']} to be returned"
        wish = REQUESTS[request].format(address=address, **named)
        return f"Hello, {wish} My e-mail address is {email}."

    def find_customer(self, email: str) -> list[dict[str, Any]]:
        """Look a customer up: the ids of the orders and what is in them.

        Args:
            email: the address that the customer gave.
        """
        if email.strip().lower() != self._email:
            raise ValueError("no such customer in this conversation")
        self._found = True
        return [{"order_id": id, "items": [*order["items"]]} for id, order in self._orders.items()]

    def get_order(self, order_id: str) -> dict[str, Any]:
        """Status, items with prices, address and tracking number of an order.

        Args:
            order_id: such as W1234.
        """
        order = self._order(order_id)
        return order if order["status"] != "pending" else {**order, "tracking": None}

    def cancel_order(self, order_id: str) -> str:
        """Cancel a pending order.

        Args:
            order_id: such as W1234.
        """
        self._order(order_id, "pending")["status"] = "cancelled"
        return "The order is cancelled."

    def change_address(self, order_id: str, address: str) -> str:
        """Send a pending order to another address.

        Args:
            order_id: such as W1234.
            address: number and street.
        """
        self._order(order_id, "pending")["address"] = " ".join(address.split())
        return "The address is changed."

    def return_item(self, order_id: str, item: str) -> str:
        """Take an item of a delivered order back.

        Args:
            order_id: such as W1234.
            item: its name in the order.
        """
        order = self._order(order_id, "delivered")
        if item not in order["items"]:
            raise ValueError("this item is not in the order")
        order["status"] = f"{item} to be returned"
        return "The return is arranged."

    def transfer_to_human(self, reason: str) -> str:
        """Hand the customer over to a human, which ends the conversation.

        Args:
            reason: why.
        """
        self._transferred = self.done = True
        return "A colleague takes over."

    def reply(self, text: str) -> str:
        """Tell the customer how the request ended, which ends the conversation.

        Args:
            text: what the customer reads.
        """
        self._said, self.done = text, True
        return "The customer leaves."

    def _order(self, order_id: str, status: str = "") -> dict[str, Any]:
        """The record of an order of this customer, in a status that the policy asks for."""
        if not self._found:
            raise ValueError("the customer was not looked up yet")
        if order_id not in self._orders:
            raise ValueError("this customer has no such order")
        order: dict[str, Any] = self._orders[order_id]
        if status and order["status"] != status:
            raise ValueError(f"the policy allows this for {status} orders only")
        return order

    def reward(self) -> float:
        told = bool(self._said) != self._transfer_is_due and self._fact in self._said
        as_due = self._transferred == self._transfer_is_due
        return float(told and as_due and self._orders == self._goal)
