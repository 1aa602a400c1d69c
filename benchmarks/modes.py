"""Modes on the tiny shop from the one shipped start: held-out success before and after.

    python -m benchmarks.modes --seeds 0 1 2 --updates 15 --jobs 2 [--output FILE]

Prints a Markdown table. All recipes play the same number of episodes, and `loss.turns` is hinted in
all, so that the controls train the turns that HERO trains. Learning rates were not tuned for each
mode: all take the quickstart's.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.machine import describe, write_json

RECIPES = ("quickstart", "shop-env-only", "shop-grpo", "shop-full-demo", "shop-terminal",
           "shop-shuffled-hints", "shop-empty-block")  # fmt: skip


def run(recipe: str, seed: int, updates: int) -> dict[str, Any]:
    """One training run; what its summary says of the 200 test goals."""
    import torch

    from hero.checks import from_dict
    from hero.config import TrainConfig
    from hero.recipes import load_recipe, merge
    from hero.report.console import Console
    from hero.trainer import Trainer

    torch.set_num_threads(1)
    changes = {
        "seed": seed, "updates": updates, "loss": {"turns": "hinted"},
        "eval": {"min_teacher_lift": None},
    }  # fmt: skip
    config: TrainConfig = from_dict(merge(load_recipe(recipe), changes))
    with tempfile.TemporaryDirectory() as folder:
        summary = Trainer(config, Path(folder), recipe, Console(io.StringIO())).run()
    row: dict[str, Any] = {"recipe": recipe, "seed": seed, "env_turns": summary["env_turns"]}
    row |= {"seconds": summary["seconds"], "best_update": summary["best_update"]}
    for when in ("before", "after"):
        row[when] = {key: summary[when][key] for key in ("success", "score", "turns")}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds, and the range of success."""
    lines = [
        "| recipe | seeds | success before | success after (range) | turns before | turns after |",
        "|---|---|---|---|---|---|",
    ]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == recipe]
        after = [row["after"]["success"] for row in own]
        lines.append(
            f"| `{recipe}` | {len(own)} | {mean(r['before']['success'] for r in own):.1%} "
            f"| {mean(after):.1%} ({min(after):.1%} to {max(after):.1%}) "
            f"| {mean(r['before']['turns'] for r in own):.1f} "
            f"| {mean(r['after']['turns'] for r in own):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="JSON file to write; none by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    given = parser.parse_args()
    machine = describe("cpu")
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(run, recipe, seed, given.updates)
            for seed in given.seeds
            for recipe in given.recipes
        ]
        rows = [future.result() for future in futures]
    if given.output:
        write_json(given.output, {"machine": machine, "updates": given.updates, "runs": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
