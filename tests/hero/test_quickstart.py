"""The quickstart in short: held-out success must rise by a wide margin.

The control is the same run with a teacher's block that says nothing: it must stay near the start.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from hero.checks import from_dict
from hero.recipes import load_recipe, merge
from hero.report.console import Console
from hero.report.tracking import read_jsonl
from hero.trainer import Trainer

SHORT: dict[str, Any] = {
    "updates": 6,
    "eval": {"every": 6, "dev_tasks": 100, "test_tasks": 0, "min_teacher_lift": None},
    "rollout": {"batch_size": 100},
    "save_every": 100,
    "save_trajectories": 0,
}


def dev_success(recipe: str, folder: Path) -> list[float]:
    config = from_dict(merge(load_recipe(recipe), SHORT))
    Trainer(config, folder, recipe, Console(io.StringIO())).run()
    lines = read_jsonl(folder / "metrics.jsonl")
    return [line["dev/success"] for line in lines if "dev/success" in line]


@pytest.mark.slow
def test_hero_lifts_success_on_held_out_goals(tmp_path: Path) -> None:
    before, after = dev_success("quickstart", tmp_path)
    assert before < 0.45
    assert after > before + 0.2


@pytest.mark.slow
def test_a_block_that_says_nothing_teaches_nothing(tmp_path: Path) -> None:
    before, after = dev_success("shop-empty-block", tmp_path)
    assert after < before + 0.15
