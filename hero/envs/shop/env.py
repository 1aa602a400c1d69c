"""The embedded shop: an agent searches, compares, chooses options and buys.

It speaks WebShop's protocol on a synthetic catalogue; `hero.envs.webshop` has the same shop on
WebShop's own products. In `strict` mode it behaves like the official text environment, which
answers an invalid action with the unchanged page and hides the options chosen. In `feedback` mode
one line beneath the page says what an action did: without it there is little to reflect on.
"""

from __future__ import annotations

import random
from typing import Any

from hero.envs.base import StepResult
from hero.envs.shop.guide import Guide, guide_to
from hero.envs.shop.pages import RENDERERS, Page
from hero.envs.shop.protocol import (
    BACK,
    BUY,
    DETAILS,
    NEXT,
    PREV,
    Action,
    State,
    View,
    advance,
    labels,
    parse_action,
)
from hero.envs.shop.reward import Score, score_purchase
from hero.envs.shop.store import PROFILES, Shop, check_choice, open_shop
from hero.envs.shop.wording import (
    HINTS,
    Cause,
    Outcome,
    compact_line,
    hint_for,
    text_line,
    tiny_vocabulary,
)
from hero.types import Diagnosis, Trajectory

MODES = ("feedback", "strict")
ANY_SEARCH = "search[...]"
"""Stands in `available_actions` for a search with any words."""

SYSTEM_PROMPT = """\
You shop online for what the instruction asks. Answer with one action and nothing else. \
There are two forms of actions:

search[words]
click[name]

The first looks for products and works on every page. The second takes a name on the page: a \
product id, an option, Next >, < Prev, Back to Search, Description, Features, Reviews or Buy Now.
Search, open the product that fits, click every option that the instruction names, and buy it last \
with

click[Buy Now]"""


class ShopEnv:
    """A shop as an `Environment` with oracle and diagnosis; picklable, also within an episode.

    Goals are split once and for all: test, dev and train hold different (product, instruction)
    pairs. `full` has 500 test and 1000 dev goals as WebShop has, `small` and `tiny` 200 and 200;
    the rest is train.

    Args:
        profile: "full" (WebShop's statistics), "small" (short pages for small models) or "tiny"
            (two-word titles and a closed vocabulary, for less than a million parameters).
        mode: "feedback", or "strict" for the official behaviour. `strict` also reads actions
            exactly; `feedback` forgives white space around them.
        observation: "text", "text_rich" or "compact"; None takes the profile's own ("compact" for
            tiny, else "text").
        score_breakdown: after a purchase `feedback` tells which parts of the goal were met. WebShop
            tells the score alone; with False so does this shop.
        hints: of `diagnose`: "rule" says what holds for such a turn; "answer" names the right
            action, in the hint and as `corrected_action`, so that learning from it imitates the
            oracle.
        max_steps: actions after which the episode is truncated; None takes 15 (full) or 8.
        catalogue_seed: draws the synthetic catalogue, and the price limits of the goals.
        num_products: size of the catalogue; None takes 1000 (full) or 200 (small, tiny).
        forget: probability with which `demonstrate` forgets an option, for a whole episode.
        noise: probability with which a step of `demonstrate` is a random action.

    Raises:
        ValueError: an argument that is none of these, or a catalogue too small to be split.
    """

    workers = "inline"
    """Of a rollout: a step takes less than a thread would."""

    def __init__(
        self,
        profile: str = "tiny",
        *,
        mode: str = "feedback",
        observation: str | None = None,
        score_breakdown: bool = True,
        hints: str = "rule",
        max_steps: int | None = None,
        catalogue_seed: int = 0,
        num_products: int | None = None,
        forget: float = 0.45,
        noise: float = 0.06,
    ) -> None:
        check_choice("profile", profile, PROFILES)
        check_choice("mode", mode, MODES)
        check_choice("hints", hints, HINTS)
        defaults = PROFILES[profile]
        self.observation = defaults.observation if observation is None else observation
        check_choice("observation", self.observation, RENDERERS)
        self.max_steps = defaults.max_steps if max_steps is None else max_steps
        if self.max_steps < 1:
            raise ValueError(
                f"max_steps={max_steps}; expected at least 1, or None for the profile's own."
            )
        for name, value in (("forget", forget), ("noise", noise)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}; expected a probability from 0 to 1.")
        self.score_breakdown, self.hints = score_breakdown, hints
        self.profile, self.mode, self.forget, self.noise = profile, mode, forget, noise
        self.num_products, self.catalogue_seed = num_products, catalogue_seed
        self._shop = self._open_shop()
        self._task_id: str | None = None
        self._start()

    def _open_shop(self) -> Shop:
        """The catalogue, which all instances of a process share."""
        return open_shop(self.profile, self.num_products, self.catalogue_seed)

    def vocabulary(self) -> list[str]:
        """Every word that can occur in compact observations, actions, causes and hints, and product
        ids.

        Other words are what the pattern `[a-z]+|\\d|[^\\sa-z\\d]` finds in lower-case text.

        Raises:
            ValueError: the profile's vocabulary is open; only that of tiny is closed.
        """
        if self.profile != "tiny":
            raise ValueError(f"profile={self.profile!r} has an open vocabulary; expected 'tiny'.")
        return tiny_vocabulary() + sorted(asin.lower() for asin in self._shop.products)

    @property
    def system_prompt(self) -> str:
        return "" if self.profile == "tiny" else SYSTEM_PROMPT

    action_words = " ".join(["search click", BUY, BACK, NEXT, PREV, *DETAILS])
    """What every task's actions are made of: naming it gives no answer away."""

    def tasks(self, split: str) -> list[str]:
        return self._shop.tasks(split)

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        goal = self._shop.goal(task_id)
        self._task_id = task_id
        self._start()
        info = {
            "task_id": task_id,
            "instruction": goal.instruction,
            "available_actions": self.available_actions(),
        }
        return self._render(None), info

    def _start(self) -> None:
        self._state = State()
        self._steps = 0
        self._truncated = False
        self._forgotten: frozenset[str] | None = None

    def step(self, text: str) -> StepResult:
        """Take one action.

        Raises:
            RuntimeError: there is no episode, or it has ended; call reset first.
        """
        guide = self._guide()
        if self._state.view is View.DONE or self._truncated:
            raise RuntimeError(
                f"The episode of task {self._task_id!r} has ended; call reset(task_id) first."
            )
        self._steps += 1
        action = self._read(text)
        after = None if action is None else advance(self._state, action, self._shop)
        outcome = self._outcome(guide, action, after)
        self._state = after or self._state
        terminated = self._state.view is View.DONE
        self._truncated = not terminated and outcome.steps_left == 0
        reward = outcome.score.reward if outcome.score else 0.0
        info = {
            "valid": after is not None,
            "feedback_kind": outcome.kind,
            "parse_ok": action is not None,
            "executed_action": None if action is None else str(action),
            "role": "user",
            "success": reward == 1.0,
            "available_actions": self.available_actions(),
        }
        return self._observe(outcome), reward, terminated, self._truncated, info

    def _read(self, text: str) -> Action | None:
        """The action in what an agent wrote; None if there is none."""
        return parse_action(text, tolerant=self.mode == "feedback")

    def _outcome(self, guide: Guide, action: Action | None, after: State | None) -> Outcome:
        score, found = None, 0
        if after is not None and after.view is View.DONE:
            product, target = self._shop.products[after.asin], self._shop.products[guide.goal.asin]
            score = score_purchase(product, after.chosen, guide.goal, target)
        elif after is not None and after.view is View.RESULTS:
            found = len(self._shop.results_page(after.query, after.number))
        return Outcome(action, self._state, after, found, score, self.max_steps - self._steps)

    def _observe(self, outcome: Outcome) -> str:
        page = self._render(outcome.score)
        if self.mode == "strict":
            return page
        line = (compact_line if self.observation == "compact" else text_line)(
            outcome, self.score_breakdown
        )
        return f"{page.rstrip()}\n{line}" if line else page

    def _render(self, score: Score | None) -> str:
        return RENDERERS[self.observation](Page(self._shop, self._guide().goal, self._state, score))

    def available_actions(self) -> list[str]:
        """The actions that the page offers; `search[...]` stands for a search with any words."""
        if self._state.view is View.DONE or self._truncated:
            return []
        clicks = [self._label(Action("click", label)) for label in labels(self._state, self._shop)]
        return [ANY_SEARCH, *clicks]

    def _label(self, action: Action) -> str:
        """With names as the page writes them: in compact style all lower case."""
        return str(action).lower() if self.observation == "compact" else str(action)

    def _say(self, action: Action) -> str:
        """An action as an agent writes it."""
        return self._label(action)

    def _guide(self) -> Guide:
        if self._task_id is None:
            raise RuntimeError("No episode has begun; call reset(task_id) first.")
        return guide_to(self._shop, self._task_id)

    def oracle(self) -> str:
        return self._say(self._guide().oracle(self._state))

    def random_action(self, rng: random.Random) -> str:
        """One of the available actions; a search looks for the kind of a random product."""
        action = rng.choice(self.available_actions())
        if action != ANY_SEARCH:
            return action
        return str(Action("search", self._shop.products[rng.choice(self._shop.asins)].query))

    def demonstrate(self, rng: random.Random) -> str:
        """The action of an imperfect demonstrator, who forgets options and sometimes slips."""
        guide = self._guide()
        if self._forgotten is None:
            names = [name for name, _ in guide.goal.options]
            self._forgotten = frozenset(name for name in names if rng.random() < self.forget)
        if rng.random() < self.noise:
            return self.random_action(rng)
        return self._say(guide.oracle(self._state, self._forgotten))

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        """Judge each turn from a replay of its action; the running episode is left alone.

        Raises:
            KeyError: this shop has no such task.
            ValueError: the trajectory goes on after its purchase, so it is not from this shop.
        """
        guide = guide_to(self._shop, trajectory.task_id)
        state, diagnoses = State(), []
        for index, turn in enumerate(trajectory.turns):
            if state.view is View.DONE:
                raise ValueError(
                    f"Trajectory {trajectory.id!r} has {len(trajectory.turns)} turns, but the "
                    f"purchase is turn {index - 1}: it is not from this shop. Use the environment "
                    "it came from (profile, catalogue_seed, num_products)."
                )
            action = self._read(turn.action_text)
            cause = guide.judge(state, action)
            diagnoses.append(self._diagnosis(guide, state, cause, index, trajectory.task_id))
            state = (advance(state, action, self._shop) if action else None) or state
        return diagnoses

    def _diagnosis(
        self, guide: Guide, state: State, cause: Cause | None, turn: int, task_id: str
    ) -> Diagnosis:
        if cause is None:
            return Diagnosis(turn=turn, source="rules")
        corrected = self._say(guide.oracle(state))
        hint = hint_for(self.hints, cause, corrected, task_id, turn)
        return Diagnosis(
            turn=turn,
            necessary=cause is not Cause.DETOUR,
            valid=cause not in (Cause.UNREADABLE, Cause.NOT_ON_PAGE),
            failure_cause=str(cause),
            corrected_action=corrected if self.hints == "answer" else "",
            hint=hint.lower() if self.observation == "compact" else hint,
            source="rules",
        )

    def close(self) -> None:
        """Nothing to release: the shop is shared by the process."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shop"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shop = self._open_shop()
