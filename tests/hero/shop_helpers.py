"""What the tests of the shop share: a hand-made catalogue, and ways to play and record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from hero.envs.shop import ShopEnv
from hero.types import Trajectory
from tests.hero import made

LAMP = "B000000001"
BESIDE_THE_REPOSITORY = Path(__file__).parents[3] / "shared" / "data" / "webshop_1k"
DATA = Path(os.environ.get("HERO_WEBSHOP_DATA", BESIDE_THE_REPOSITORY))
"""WebShop's own files, where a user has them."""


def write_catalogue(folder: Path) -> str:
    """Twelve lamps in WebShop's files; only the first has options and goals, 12 x 12 x 12."""
    pytest.importorskip("Stemmer", reason="the extra webshop is not installed (PyStemmer)")
    colors = ["Red/White", *(f"shade{letter}" for letter in "abcdefghijk")]
    sizes = [f"size{letter}" for letter in "abcdefghijkl"]
    cords = ["red | white", *(f"cord{letter}" for letter in "abcdefghijk")]
    options = {"Color": colors, "Size": sizes, "Cord": cords}
    items = [_item(LAMP, "Bright Desk Lamp", "$12.50", options)]
    items += [
        _item(f"B0000001{number}", f"Lamp {number}", "$90.00", {}) for number in range(10, 21)
    ]
    notes = {
        "instruction": "Find me bright light lamp",
        "attributes": ["bright light", "long cord"],
        "instruction_attributes": ["bright light"],
    }
    nouns = {item["asin"]: [] for item in items} | {LAMP: ["desk", "lamp"]}
    folder.mkdir(exist_ok=True)
    (folder / "items_shuffle_12.json").write_text(json.dumps(items))
    (folder / "items_ins_v2_12.json").write_text(json.dumps({LAMP: notes}))
    (folder / "title_nouns.json").write_text(json.dumps(nouns))
    return str(folder)


def _item(asin: str, name: str, pricing: str, options: dict[str, list[str]]) -> dict[str, Any]:
    return {
        "asin": asin,
        "name": name,
        "full_description": "It shines & glows.",
        "small_description": ["First point", "Second point"],
        "pricing": pricing,
        "product_category": "Home \u203a Lamps",
        "category": "garden",
        "query": "Lamp ",
        "customization_options": {
            option: [{"value": value} for value in values] for option, values in options.items()
        },
    }


def play(env: ShopEnv, actions: Iterable[str]) -> tuple[str, float, dict[str, Any]]:
    """Take the actions; the last observation, reward and info."""
    result: tuple[str, float, dict[str, Any]] = ("", 0.0, {})
    for action in actions:
        observation, reward, _, _, info = env.step(action)
        result = (observation, reward, info)
    return result


def finish(env: ShopEnv, act: Callable[[], str] | None = None) -> tuple[float, int]:
    """Follow the oracle, or another, to the end; the reward and the number of steps."""
    steps = 0
    while True:
        _, reward, terminated, truncated, _ = env.step((act or env.oracle)())
        steps += 1
        if terminated or truncated:
            return reward, steps


def oracle_actions(env: ShopEnv, task_id: str) -> list[str]:
    """A whole episode of the oracle, as actions."""
    env.reset(task_id)
    actions = []
    while env.available_actions():
        actions.append(env.oracle())
        env.step(actions[-1])
    return actions


def trajectory(task_id: str, actions: list[str]) -> Trajectory:
    return made.episode(task_id, *map(made.turn, actions))
