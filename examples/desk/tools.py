"""The desk's tools and the policy they enforce.

A tool either answers with a JSON-able value or raises `ToolError` and leaves the database alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from desk.database import Address, Database, Order, money
from hero.toolcalls import ToolCall

CANCEL_REASONS = ("no longer needed", "ordered by mistake")


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


class ToolError(Exception):
    """The call was refused; the text is what the agent reads. It never contains an id."""


@dataclass(slots=True)
class Session:
    """What the desk knows during one conversation."""

    database: Database
    user_id: str | None = None
    """The customer whose identity was established."""
    confirmed: bool = False
    """The customer has said yes since the last change."""
    looked_up: set[str] = field(default_factory=set)
    """Ids of the orders and products whose records were shown."""

    def own_order(self, order_id: str) -> Order:
        self.require_identity()
        order = self.database.orders.get(order_id)
        if order is None:
            raise ToolError("order not found")
        if order.user_id != self.user_id:
            raise ToolError("this order belongs to another customer")
        return order

    def require_identity(self) -> None:
        if self.user_id is None:
            raise ToolError("the customer is not identified yet")

    def require_confirmation(self) -> None:
        if not self.confirmed:
            raise ToolError("the customer has not confirmed this change")

    def change(self, order: Order, **changes: Any) -> dict[str, Any]:
        """Store the changed order. One confirmation covers one change."""
        self.require_confirmation()
        changed = replace(order, **changes)
        self.database.orders[order.order_id] = changed
        self.confirmed = False
        return {"order_id": order.order_id, "status": changed.status}


def find_user_by_email(session: Session, email: str) -> dict[str, Any]:
    for user in session.database.users.values():
        if user.email == email.strip().lower():
            session.user_id = user.user_id
            return {"user_id": user.user_id, "name": user.name}
    raise ToolError("user not found")


def get_user(session: Session, user_id: str) -> dict[str, Any]:
    session.require_identity()
    if user_id not in session.database.users:
        raise ToolError("user not found")
    if user_id != session.user_id:
        raise ToolError("this is another customer's account")
    user, items = session.database.users[user_id], session.database.items
    orders = [
        {"order_id": order.order_id, "items": [items[item_id].name for item_id in order.item_ids]}
        for order in session.database.orders_of(user_id)
    ]
    return {"name": user.name, "email": user.email, "orders": orders}


def get_order(session: Session, order_id: str) -> dict[str, Any]:
    order, database = session.own_order(order_id), session.database
    session.looked_up.add(order_id)
    items = [database.items[item_id] for item_id in order.item_ids]
    record: dict[str, Any] = {
        "order_id": order_id,
        "status": order.status,
        "items": [
            {
                "item_id": item.item_id,
                "product_id": item.product_id,
                "name": item.name,
                **item.options,
                "price": money(item.cents),
            }
            for item in items
        ],
        "total": money(database.total_cents(order)),
        "address": str(order.address),
    }
    return record | ({"tracking": order.tracking} if order.tracking else {})


def get_product(session: Session, product_id: str) -> dict[str, Any]:
    variants = session.database.variants(product_id)
    if not variants:
        raise ToolError("product not found")
    session.looked_up.add(product_id)
    return {
        "name": variants[0].name,
        "variants": [
            {
                "item_id": item.item_id,
                **item.options,
                "price": money(item.cents),
                "available": item.available,
            }
            for item in variants
        ],
    }


def cancel_order(session: Session, order_id: str, reason: str) -> dict[str, Any]:
    order = session.own_order(order_id)
    if order.status != "pending":
        raise ToolError("only pending orders can be cancelled")
    return session.change(order, status="cancelled", cancel_reason=reason)


def return_items(session: Session, order_id: str, item_ids: list[str]) -> dict[str, Any]:
    order = session.own_order(order_id)
    if order.status != "delivered":
        raise ToolError("only items of delivered orders can be returned, once per order")
    if not item_ids or len(set(item_ids)) != len(item_ids):
        raise ToolError("item_ids must name each item once")
    if not set(item_ids) <= set(order.item_ids):
        raise ToolError("item not found in this order")
    return session.change(order, status="return requested", returned=tuple(sorted(item_ids)))


def exchange_item(
    session: Session, order_id: str, item_id: str, new_item_id: str
) -> dict[str, Any]:
    order, items = session.own_order(order_id), session.database.items
    if order.status != "delivered":
        raise ToolError("only items of delivered orders can be exchanged, once per order")
    if item_id not in order.item_ids:
        raise ToolError("item not found in this order")
    new = items.get(new_item_id)
    if new is None or new_item_id == item_id or new.product_id != items[item_id].product_id:
        raise ToolError("the new item must be another variant of the same product")
    if not new.available:
        raise ToolError("the new item is not available")
    return session.change(order, status="exchange requested", exchanged=(item_id, new_item_id))


def change_address(
    session: Session, order_id: str, street: str, city: str, zip: str
) -> dict[str, Any]:
    order = session.own_order(order_id)
    if order.status != "pending":
        raise ToolError("only pending orders can be sent to another address")
    address = Address(*(" ".join(part.split()).title() for part in (street, city, zip)))
    if not all(0 < len(part) <= 60 for part in address):
        raise ToolError("street, city and zip must have 1 to 60 characters")
    return session.change(order, address=address)


def transfer_to_human(session: Session, reason: str) -> dict[str, Any]:
    session.require_identity()
    assert session.user_id is not None
    session.database.transfers += (session.user_id,)
    return {"transferred": True}


STRING: dict[str, Any] = {"type": "string"}


@dataclass(frozen=True, slots=True)
class Tool:
    run: Callable[..., dict[str, Any]]
    """Called with the session and the arguments by name."""
    description: str
    parameters: dict[str, dict[str, Any]]
    """JSON schema of each argument; all are required."""

    def schema(self) -> dict[str, Any]:
        """The tool as OpenAI describes one."""
        parameters = {
            "type": "object", "properties": self.parameters, "required": list(self.parameters),
        }  # fmt: skip
        function = {"name": self.run.__name__, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": parameters}}


TOOLS = {
    tool.run.__name__: tool
    for tool in (
        Tool(find_user_by_email, "Identify the customer.", {"email": STRING}),
        Tool(get_user, "The customer's name and orders.", {"user_id": STRING}),
        Tool(get_order, "Status, items, total, address, tracking number.", {"order_id": STRING}),
        Tool(get_product, "All variants of a product.", {"product_id": STRING}),
        Tool(
            cancel_order,
            "Cancel a pending order.",
            {"order_id": STRING, "reason": {"enum": list(CANCEL_REASONS)}},
        ),
        Tool(
            return_items,
            "Return items of a delivered order.",
            {"order_id": STRING, "item_ids": {"type": "array", "items": STRING}},
        ),
        Tool(
            exchange_item,
            "Exchange one item of a delivered order for another variant of its product.",
            {"order_id": STRING, "item_id": STRING, "new_item_id": STRING},
        ),
        Tool(
            change_address,
            "Send a pending order to another address.",
            {"order_id": STRING, "street": STRING, "city": STRING, "zip": STRING},
        ),
        Tool(
            transfer_to_human,
            "Hand the customer over to a human. Ends the conversation.",
            {"reason": STRING},
        ),
    )
}


def execute(session: Session, call: ToolCall) -> dict[str, Any]:
    """Check the arguments against the schema and run the tool.

    Raises:
        ToolError: unknown tool, wrong arguments or a rule of the policy; the database is unchanged.
    """
    tool = TOOLS.get(call.name)
    if tool is None:
        raise ToolError(f"unknown tool, expected one of {', '.join(TOOLS)}")
    if set(call.arguments) != set(tool.parameters):
        raise ToolError(f"{call.name} takes exactly these arguments: {', '.join(tool.parameters)}")
    for name, schema in tool.parameters.items():
        if problem := _type_problem(call.arguments[name], schema):
            raise ToolError(f"{name} must be {problem}")
    return tool.run(session, **call.arguments)


def _type_problem(value: Any, schema: dict[str, Any]) -> str | None:
    """What `value` should have been, or None if it fits."""
    if "enum" in schema:
        return None if value in schema["enum"] else f"one of {', '.join(schema['enum'])}"
    if schema["type"] == "array":
        fits = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        return None if fits else "a list of strings"
    return None if isinstance(value, str) else "a string"
