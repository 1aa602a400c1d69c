"""WebShop as its papers used it: its products, its goals, its reward, and the prompts of others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from hero.envs.base import StepResult
from hero.envs.shop import ShopEnv
from hero.envs.shop.env import SYSTEM_PROMPT
from hero.envs.shop.pages import Page, render_text
from hero.envs.shop.protocol import BUY, DETAILS, Action, View, labels, parse_action
from hero.envs.shop.store import Shop, check_choice
from hero.envs.webshop.files import GOALS
from hero.envs.webshop.opening import open_webshop
from hero.envs.webshop.prompts import Moment, Plain, Ragen, VerlAgent

PROMPTS = ("hero", "official", "ragen", "verl-agent")


class WebShopEnv(ShopEnv):
    """WebShop on the files of the user; picklable, also within an episode.

    Goals are WebShop's: shuffled with its seed, 0 to 499 are test, the next 1,000 dev, the rest
    train. Price limits, which the official code draws without a seed, are drawn from `seed`.

    Args:
        data_dir: folder with `items_shuffle*.json`, `items_ins_v2*.json` and `title_nouns.json`
            (docs/environments/webshop.md says how to get them); for human goals also
            `items_human_ins*.json`.
        prompt: what an agent reads and writes. "hero": a system prompt, pages, and what an action
            did; "official": the bare pages of the official text environment; "verl-agent" and
            "ragen": as these projects ask.
        history: of "verl-agent": earlier steps that a prompt repeats.
        goals: "synthetic", made from products and their options, or "human", written by people.
        index_dir: folder for an index on disk, built at the first use: for catalogues that do not
            fit into memory.
        mode: of "hero": "feedback" says beneath a page what an action did, "strict" does not. The
            other prompts are strict.
        observation: of "hero" and "official": "text" or "text_rich".
        score_breakdown: `feedback` tells after a purchase which parts of the goal were met. WebShop
            tells the score alone.
        hints: of `diagnose`: "rule", or "answer", which names the right action.
        max_steps: actions after which an episode is truncated; None takes 15, for ragen 9.
        seed: draws price limits, and prices of products that have a range.
        num_products: only so many, from the start of the file; None takes all.
        skip_repeated: leave out goals that an earlier split already has, word by word (an option
            that is listed twice makes two equal goals). The official splits have them.
        forget: probability with which `demonstrate` forgets an option, for a whole episode.
        noise: probability with which a step of `demonstrate` is a random action.

    Raises:
        ValueError: an argument that is none of these, files that are missing or cannot be read, or
            a catalogue too small to be split.
    """

    def __init__(
        self,
        data_dir: str = "",
        *,
        prompt: str = "hero",
        history: int = 2,
        goals: str = "synthetic",
        index_dir: str | None = None,
        mode: str = "feedback",
        observation: str = "text",
        score_breakdown: bool = False,
        hints: str = "rule",
        max_steps: int | None = None,
        seed: int = 0,
        num_products: int | None = None,
        skip_repeated: bool = False,
        forget: float = 0.45,
        noise: float = 0.06,
    ) -> None:
        check_choice("prompt", prompt, PROMPTS)
        check_choice("goals", goals, GOALS)
        check_choice("observation", observation, ("text", "text_rich"))
        if prompt in ("verl-agent", "ragen") and observation != "text":
            raise ValueError(f"prompt={prompt!r} shows observation='text', got {observation!r}.")
        if history < 0:
            raise ValueError(f"history={history}; expected a number of steps from 0.")
        self.data_dir = str(Path(data_dir).expanduser().resolve()) if data_dir else ""
        self.index_dir = index_dir and str(Path(index_dir).expanduser().resolve())
        self.goals, self.prompt, self.skip_repeated = goals, prompt, skip_repeated
        self._format: Plain = {
            "verl-agent": VerlAgent(history), "ragen": Ragen()
        }.get(prompt) or Plain()  # fmt: skip
        self._history: list[tuple[str, str]] = []
        super().__init__(
            "full", mode=mode if prompt == "hero" else "strict", observation=observation,
            score_breakdown=score_breakdown, hints=hints, catalogue_seed=seed,
            max_steps=self._format.max_steps if max_steps is None else max_steps,
            num_products=num_products, forget=forget, noise=noise,
        )  # fmt: skip

    def _open_shop(self) -> Shop:
        return open_webshop(
            self.data_dir, self.num_products, self.catalogue_seed, self.goals, self.index_dir
        )

    @property
    def system_prompt(self) -> str:
        return SYSTEM_PROMPT if self.prompt == "hero" else self._format.system_prompt

    def tasks(self, split: str) -> list[str]:
        return self._shop.tasks(split, repeated=not self.skip_repeated)

    def facts(self) -> dict[str, str]:
        """What results depend on besides the options."""
        return {
            "environment": f"WebShop, {len(self._shop.asins)} products, {self.goals} goals",
            "prompt": self.prompt,
        }

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        page, info = super().reset(task_id)
        self._history, self._executed = [], 0
        return self._show(page), info

    def step(self, text: str) -> StepResult:
        page = self._page() if self._format.window else ""
        said = self._format.read(text)
        observation, reward, terminated, truncated, info = super().step(text)
        self._history.append((page, said or ""))
        self._executed += said is not None
        if not (terminated or truncated):
            shown = self._show(observation)
            if self._format.window:
                info["next_prompt"] = shown
            else:
                observation = shown
        return observation, reward, terminated, truncated, info

    def _read(self, text: str) -> Action | None:
        said = self._format.read(text)
        return None if said is None else parse_action(said, tolerant=self.mode == "feedback")

    def random_action(self, rng: random.Random) -> str:
        return self._format.write(super().random_action(rng))

    def _say(self, action: Action) -> str:
        return self._format.write(str(action))

    def _page(self) -> str:
        return render_text(Page(self._shop, self._guide().goal, self._state, None))

    def _show(self, page: str) -> str:
        return self._format.show(
            Moment(
                instruction=self._guide().goal.instruction, page=page,
                clickable=self._clickable(), on_index=self._state.view is View.INDEX,
                history=self._history, steps_left=self.max_steps - self._executed,
            )
        )  # fmt: skip

    def _clickable(self) -> list[str]:
        """Labels as the official environment lists them: buttons, products, options."""
        if self._state.view is View.INDEX:
            return ["search"]
        shown = [label.lower() for label in labels(self._state, self._shop)]
        if self._state.view is View.ITEM:
            last = [button.lower() for button in (*DETAILS, BUY)]
            options = [label for label in shown[2:] if label not in last]
            return [*shown[:2], *last, *options]
        return shown
