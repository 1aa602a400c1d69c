"""Knows the way: the distance to a full reward, the next step, and what was wrong with a step.

Everything rests on `steps_to_go(state)`, the least number of actions from a state to a purchase
that satisfies the goal. An action is good if it makes that number smaller; the oracle takes one
that does.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import lru_cache

from hero.envs.shop.catalogue import Goal, Product
from hero.envs.shop.protocol import BUY, NEXT, PREV, Action, State, View, advance, option_of
from hero.envs.shop.reward import attribute_matches, option_matches, type_factor
from hero.envs.shop.store import Shop
from hero.envs.shop.wording import Cause


class Guide:
    """The way to one goal in one shop."""

    def __init__(self, shop: Shop, goal: Goal) -> None:
        self.shop = shop
        self.goal = goal
        self._target = shop.products[goal.asin]
        self._fits = {goal.asin: True}
        self._query: str | None = None

    def oracle(self, state: State, forgotten: Collection[str] = ()) -> Action:
        """A best action in `state`, labels as the page shows them.

        Args:
            state: any state before the purchase.
            forgotten: names of goal options to pass over (an imperfect demonstrator does).
        """
        if state.view in (View.ITEM, View.DETAIL) and self._fitting(state.asin):
            if state.view is View.DETAIL:
                return Action("click", PREV)
            missing = [value for name, value in self._missing(state) if name not in forgotten]
            return Action("click", missing[0] if missing else BUY)
        search = Action("search", self.query)
        if state.view is View.RESULTS:
            return self._on_results(state) or search
        if state.view is View.ITEM:
            back = self._on_results_distance(state.query, state.number)
            if back <= self._on_results_distance(self.query, 1):
                return Action("click", PREV)
        return search

    def _on_results(self, state: State) -> Action | None:
        """Open a fitting product or turn to its page; None if a new search is shorter."""
        shown = [
            asin
            for asin in self.shop.results_page(state.query, state.number)
            if self._fitting(asin)
        ]
        if shown:
            return Action("click", self.goal.asin if self.goal.asin in shown else shown[0])
        here = self._on_results_distance(state.query, state.number)
        if here > 1 + self._on_results_distance(self.query, 1):
            return None
        after = self._on_results_distance(state.query, state.number + 1)
        return Action("click", NEXT if after < here else PREV)

    @property
    def query(self) -> str:
        """The query, made from words of the instruction, that shows a fitting product soonest.

        Where no such query does (seen on real data only), the product's title.
        """
        if self._query is None:
            request, kind = self.goal.request, self._target.query
            values = " ".join(value for _, value in self.goal.options)
            attributes = " ".join(self.goal.attributes)
            candidates = [f"{attributes} {kind}", f"{attributes} {kind} {values}", request]
            candidates += [f"{attribute} {kind}" for attribute in self.goal.attributes]
            candidates = [" ".join(candidate.lower().split()) for candidate in candidates]
            self._query = min(candidates, key=lambda words: self._on_results_distance(words, 1))
            if math.isinf(self._on_results_distance(self._query, 1)):
                self._query = self._target.title.lower()
        return self._query

    def steps_to_go(self, state: State) -> float:
        """Least number of actions to a satisfying purchase; inf after another purchase."""
        fits = state.asin != "" and self._fitting(state.asin)
        missing = len(self._missing(state)) if fits else 0
        if state.view is View.DONE:
            return 0 if fits and not missing else math.inf
        if fits:
            return missing + 1 + (state.view is View.DETAIL)
        by_search = 1 + self._on_results_distance(self.query, 1)
        if state.view is View.INDEX or state.view is View.DETAIL:
            return by_search
        here = self._on_results_distance(state.query, state.number)
        return min(by_search, here + (state.view is View.ITEM))

    def _on_results_distance(self, query: str, number: int) -> float:
        """Steps to go from a results page without another search."""
        size = self.shop.profile.page_size
        pages = (
            abs(rank // size + 1 - number)
            for rank, asin in enumerate(self.shop.search(query))
            if self._fitting(asin)
        )
        return min(pages, default=math.inf) + 1 + len(self.goal.options) + 1

    def _fitting(self, asin: str) -> bool:
        """Whether buying this product can earn the full reward."""
        if asin not in self._fits:
            self._fits[asin] = self._can_satisfy(self.shop.products[asin])
        return self._fits[asin]

    def _can_satisfy(self, product: Product) -> bool:
        return (
            type_factor(product, self._target) == 1.0
            and product.price <= self.goal.price_upper
            and all(attribute_matches(product, attribute) for attribute in self.goal.attributes)
            and all(self._value_for(product, name, value) for name, value in self.goal.options)
        )

    def _missing(self, state: State) -> list[tuple[str, str]]:
        """(name, value to click) of the goal's options that are still open on this product."""
        product, chosen = self.shop.products[state.asin], state.chosen
        missing = []
        for name, wanted in self.goal.options:
            value = self._value_for(product, name, wanted)
            if value and value not in chosen and not option_matches(name, wanted, chosen):
                missing.append((name, value))
        return missing

    def _value_for(self, product: Product, name: str, wanted: str) -> str | None:
        """The value of option `name` ("": of any) that serves the goal, if a click can set it."""
        values = [
            value
            for option in ([name] if name else product.options)
            for value in product.options.get(option, ())
            if option_of(value, product.options) == option
        ]
        if wanted in values:
            return wanted
        return next((value for value in values if option_matches(name, wanted, (value,))), None)

    def judge(self, state: State, action: Action | None) -> Cause | None:
        """Why `action` (None if unreadable) was no good one in `state`; None if it was."""
        if action is None:
            return Cause.UNREADABLE
        after = advance(state, action, self.shop)
        if after is None:
            return Cause.NOT_ON_PAGE
        if self.steps_to_go(after) < self.steps_to_go(state):
            return None
        if after.view is View.DONE:
            return Cause.OPTION_MISSING if self._fitting(state.asin) else Cause.WRONG_PURCHASE
        if action.verb == "search":
            return self._judge_search(state, after)
        on_wrong_item = state.asin != "" and not self._fitting(state.asin)
        if on_wrong_item or (state.view is View.RESULTS and after.view is View.ITEM):
            return Cause.WRONG_ITEM
        if after.options != state.options and after.view is View.ITEM:
            return Cause.WRONG_OPTION
        return Cause.DETOUR

    def _judge_search(self, state: State, after: State) -> Cause:
        shown = self.shop.results_page(after.query, 1)
        if not shown:  # better words are no advice where the way on is a click
            return Cause.NO_RESULTS if self.oracle(state).verb == "search" else Cause.DETOUR
        return Cause.DETOUR if any(map(self._fitting, shown)) else Cause.POOR_SEARCH


@lru_cache(maxsize=4096)
def guide_to(shop: Shop, task_id: str) -> Guide:
    """The guide of one task, with what it found out. Raises KeyError for an unknown task."""
    return Guide(shop, shop.goal(task_id))
