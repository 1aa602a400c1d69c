"""`hero train`, `eval` and `rollout` on each world, with a tiny random chat model.

BFCL and OpenEnv have their own (test_env_bfcl.py, test_env_adapters.py): long prompts, a server.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from shop_helpers import DATA
from short_runs import train_eval_and_rollout

from hero.envs.registry import worlds

WORLDS = {
    "shop": "profile tiny",
    "tiny-desk": "house 3",
    "tools": f"factory {__name__}:Counter",
    "webshop": f"data_dir {DATA}",
    "tau": "domain mock user none max_steps 3",
    "gym": "id FrozenLake-v1",
    "textarena": "id GuessTheNumber-v0",
    "textworld": "",
}


class Counter:
    """A class whose public method is a tool."""

    tasks = {"train": [{"goal": 1}] * 2, "dev": [{"goal": 0}], "test": [{"goal": 2}]}  # noqa: RUF012

    def reset(self, goal: int) -> str:
        self.count, self.goal = 0, goal
        return f"Count to {goal}."

    def count_on(self) -> int:
        """Count on."""
        self.count += 1
        return self.count

    def reward(self) -> float:
        return float(self.count == self.goal)


@pytest.mark.parametrize("name", WORLDS)
def test_train_eval_and_rollout(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = [module for module in worlds()[name].modules if find_spec(module) is None]
    if missing or (name == "webshop" and not DATA.is_dir()):
        pytest.skip(f"{name} lacks {', '.join(missing) or 'its data: set HERO_WEBSHOP_DATA'}")
    monkeypatch.chdir(tmp_path)
    options = WORLDS[name].split()
    train_eval_and_rollout(
        ["--env.name", name, *(["--env.options", *options] if options else [])], str(model_folder)
    )
