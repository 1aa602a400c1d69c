"""The shortest way from a state of the conversation to its goal, by what the agent can know.

`plan(episode)` lists the remaining steps. Its first step is the oracle's action, and the sum of its
weights is a potential: a turn that does not lower it brought the task no further.

A state is winnable if every record is as it was or as it should become, and if the customer has not
dropped a request before he told what it takes. Otherwise (after a wrong cancellation, say) the way
out is a human colleague. That patience or the step limit may run out first is not considered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from desk.episode import Episode
from desk.tasks import Mention, Request
from desk.tools import call
from hero.toolcalls import ToolCall, write_calls

QUESTION_WORDS = {
    "email": "your e-mail address",
    "order": "the order number",
    "reason": "the reason",
    "items": "which items you mean",
    "options": "which options you want instead",
    "address": "the new address",
}
CHANGE_WORDS = {
    "cancel": "cancel order {}",
    "return": "return the items of order {}",
    "exchange": "exchange the item of order {}",
    "address": "change the address of order {}",
}
DONE_WORDS = {
    "cancel": "Done: the order has been cancelled.",
    "return": "Done: the return has been arranged.",
    "exchange": "Done: the exchange has been arranged.",
    "address": "Done: the address has been changed.",
}
LOST = 1000
"""Weight of giving up: more work than any winnable state holds."""


@dataclass(frozen=True, slots=True)
class Step:
    kind: str
    """The name of a tool, or ask, confirm, answer, refuse, report, give_up."""
    action: ToolCall | str
    weight: int = 1
    """How many single turns it stands for: two questions in one message weigh two."""

    def text(self, tool_format: str) -> str:
        """What the agent writes."""
        if isinstance(self.action, str):
            return self.action
        return write_calls([self.action], tool_format)


def plan(episode: Episode) -> list[Step]:
    """The remaining steps, never empty before the episode has ended."""
    dropped = episode.task.requests[: episode.customer.current]
    if _damaged(episode) or any(not _within_reach(episode, request) for request in dropped):
        reason = "a change went wrong and cannot be undone"
        return [Step("give_up", call("transfer_to_human", reason=reason), weight=LOST)]
    return list(_Route(episode).steps())


def remaining_work(episode: Episode) -> int:
    return sum(step.weight for step in plan(episode))


def _damaged(episode: Episode) -> bool:
    """Whether a record is neither as it was nor as it should become.

    A wrong address of an order that is to get a new one is none: the request's own change mends it.
    """
    for order_id, order in episode.session.database.orders.items():
        was, goal = episode.initial.orders[order_id], episode.gold.orders[order_id]
        moves = goal.address != was.address and replace(order, address=was.address) == was
        if order not in (was, goal) and not moves:
            return True
    return False


def _within_reach(episode: Episode, request: Request) -> bool:
    """Whether a request that the customer regards as closed can still be met.

    He answers no more questions about it.
    """
    met = episode.carried_out(request) if request.call else episode.customer.told(request)
    said = episode.customer.said
    knows_details = not request.call or all(value in said for value in request.details.values())
    return met or (knows_details and not _number_withheld(episode, request))


def _number_withheld(episode: Episode, request: Request) -> bool:
    """Whether only the customer can tell which order he means, and has not."""
    return request.mention is Mention.ASKED and request.order_id not in episode.customer.said


class _Route:
    """Writes the steps down in order; `confirmed` runs ahead with them."""

    def __init__(self, episode: Episode) -> None:
        self.episode = episode
        self.session = episode.session
        self.customer = episode.customer
        self.confirmed = episode.session.confirmed
        self.identified = episode.session.user_id == episode.task.user_id
        self.knows_orders = False

    def steps(self) -> Iterator[Step]:
        for index, request in enumerate(self.episode.task.requests):
            yield from self._serve(request, index)

    def _serve(self, request: Request, index: int) -> Iterator[Step]:
        closed = index < self.customer.current
        if request.call is None:
            if not (closed and self.customer.told(request)):
                yield from self._inform(request)
            return
        if not self.episode.carried_out(request):
            yield from self._identify(request)
            if request.kind != "transfer":
                yield from self._prepare(request)
            yield Step(request.call.name, request.call)
            self.confirmed = False
        if not closed and request.kind != "transfer":
            yield Step("report", DONE_WORDS[request.kind])

    def _inform(self, request: Request) -> Iterator[Step]:
        if not self.customer.told(request):
            yield from self._identify(request)
            yield from self._look_up(request)
        fact = f"{request.fact_name} is {request.fact}."
        if request.forbidden:
            yield Step("refuse", f"I am sorry, that is not possible for this order; {fact}")
        else:
            yield Step("answer", fact[0].upper() + fact[1:])

    def _identify(self, request: Request) -> Iterator[Step]:
        """Ask for what is missing to find the customer and his order, and find the customer."""
        missing = []
        if not self.identified and not self.customer.has_told("email"):
            missing.append("email")
        if _number_withheld(self.episode, request):
            missing.append("order")
        if missing:
            yield _ask(missing)
        if not self.identified:
            email = self.customer.email
            yield Step("find_user_by_email", call("find_user_by_email", email=email))
            self.identified = True

    def _look_up(self, request: Request) -> Iterator[Step]:
        listed = request.order_id in self.episode.context
        if request.mention is Mention.ITEM and not listed and not self.knows_orders:
            yield Step("get_user", call("get_user", user_id=self.episode.task.user_id))
            self.knows_orders = True
        if request.order_id not in self.session.looked_up:
            yield Step("get_order", call("get_order", order_id=request.order_id))
        wants_product = request.product_id and not request.forbidden
        if wants_product and request.product_id not in self.session.looked_up:
            yield Step("get_product", call("get_product", product_id=request.product_id))

    def _prepare(self, request: Request) -> Iterator[Step]:
        """Look up what the change needs, ask for missing details and for the confirmation."""
        yield from self._look_up(request)
        missing = [
            name for name, value in request.details.items() if value not in self.customer.said
        ]
        change = CHANGE_WORDS[request.kind].format(request.order_id)
        wanted = f"Please tell me {' and '.join(QUESTION_WORDS[name] for name in missing)}. "
        question = f"Do you confirm that I {change} (yes/no)?"
        if not self.confirmed:
            text = (wanted if missing else "") + question
            yield Step("confirm", text, weight=len(missing) + 1)
        elif missing:
            yield _ask(missing)


def _ask(missing: list[str]) -> Step:
    words = " and ".join(QUESTION_WORDS[name] for name in missing)
    return Step("ask", f"Please tell me {words}.", weight=len(missing))
