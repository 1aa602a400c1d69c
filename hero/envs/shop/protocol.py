"""WebShop's protocol as a state and a pure transition; nothing here knows the goal.

    index --search--> results --click[asin]--> item --click[Description]--> detail
                                               item --click[Buy Now]--> done

`search[words]` works on every page, `click[x]` if the page shows x. From an item `< Prev` leads to
the results and forgets the options; from a detail page it leads back to the item and keeps them.
`Back to Search` forgets everything. Arguments are compared in lower case.

Left out are the official server's debugging queries, which begin with `<r>`, `<a>`, `<c>` or `<q>`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from hero.envs.shop.store import Shop

MAX_ACTION = 2000
"""Characters of an action; a longer text is none."""
BUY, BACK, NEXT, PREV = "Buy Now", "Back to Search", "Next >", "< Prev"
DETAILS = ("Description", "Features", "Reviews")


class View(StrEnum):
    """The kinds of pages."""

    INDEX = "index"
    RESULTS = "results"
    ITEM = "item"
    DETAIL = "detail"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class State:
    """Where a shopper stands; hashable."""

    view: View = View.INDEX
    query: str = ""
    number: int = 1
    """Page of the results, from 1."""
    asin: str = ""
    options: tuple[tuple[str, str], ...] = ()
    """(name, value) of the options chosen, in the order of choosing."""
    detail: str = ""
    visited: frozenset[str] = frozenset()
    """Products opened since the start or the last `Back to Search`."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The option values chosen."""
        return tuple(value for _, value in self.options)


@dataclass(frozen=True, slots=True)
class Action:
    """`verb[argument]`, the argument in lower case."""

    verb: str
    argument: str

    def __str__(self) -> str:
        return f"{self.verb}[{self.argument}]"


def parse_action(text: str, tolerant: bool) -> Action | None:
    """Read an action; None if the text is none.

    Args:
        text: what the agent wrote.
        tolerant: forgive white space around the whole, the verb and the argument.
    """
    if len(text) > MAX_ACTION:
        return None
    # What the official `(.+)\[(.+)\]` matches, without its backtracking: on the first line the last
    # bracket that closes and the last before it that opens.
    line = (text.strip() if tolerant else text).partition("\n")[0]
    end = line.rfind("]")
    start = line.rfind("[", 0, max(end - 1, 0))
    if start < 1:
        return None
    verb, argument = line[:start], line[start + 1 : end]
    if tolerant:
        verb, argument = verb.strip(), argument.strip()
    if verb not in ("search", "click") or not argument:
        return None
    return Action(verb, argument.lower())


def labels(state: State, shop: Shop) -> list[str]:
    """What can be clicked, as the page shows it."""
    if state.view is View.RESULTS:
        turn = [PREV, NEXT] if state.number > 1 else [NEXT]
        return [BACK, *turn, *shop.results_page(state.query, state.number)]
    if state.view is View.ITEM:
        values = [
            value for listed in shop.products[state.asin].options.values() for value in listed
        ]
        return [BACK, PREV, *dict.fromkeys(values), *DETAILS, BUY]
    return [BACK, PREV] if state.view is View.DETAIL else []


def option_of(value: str, options: dict[str, tuple[str, ...]]) -> str | None:
    """The option that a click on `value` sets: of several that list it, the last one."""
    return next((name for name in reversed(options) if value in options[name]), None)


def advance(state: State, action: Action, shop: Shop) -> State | None:
    """The state after `action`, or None if the page does not offer it."""
    if action.verb == "search":
        return State(View.RESULTS, query=action.argument, visited=state.visited)
    clicked = action.argument
    if clicked not in {label.lower() for label in labels(state, shop)}:
        return None
    if clicked == BUY.lower():
        return replace(state, view=View.DONE)
    if clicked == BACK.lower():
        return State()
    if clicked == NEXT.lower() and state.view is View.RESULTS:
        return replace(state, number=state.number + 1)
    if clicked == PREV.lower():
        return _previous(state)
    if state.view is View.RESULTS:
        asin = clicked.upper()
        return replace(state, view=View.ITEM, asin=asin, visited=state.visited | {asin})
    for detail in DETAILS:
        if clicked == detail.lower():
            return replace(state, view=View.DETAIL, detail=detail)
    name = option_of(clicked, shop.products[state.asin].options)
    assert name is not None, f"{clicked!r} is clickable but no option of {state.asin}"
    return replace(state, options=tuple({**dict(state.options), name: clicked}.items()))


def _previous(state: State) -> State:
    if state.view is View.RESULTS:
        return replace(state, number=state.number - 1)
    if state.view is View.ITEM:
        return replace(state, view=View.RESULTS, asin="", options=())
    return replace(state, view=View.ITEM, detail="")
