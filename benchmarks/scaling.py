"""How the cost of a whole step grows with turns, context and episodes: HERO's and a plain loop's.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling [--results FILE.json] [--plot FILE.png]

A random Llama of two layers plays episodes that never end by themselves; the steps are those of
test_step.py, with the recipe's settings. One thing grows at a time. With one thread seconds are
those of the processor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory
from benchmarks.loops import Loops
from benchmarks.test_rollout import Corridor
from benchmarks.test_step import Plain, Steps
from hero.config import ModelConfig, ScratchConfig
from hero.envs.shop import ShopEnv
from hero.policy import Policy
from hero.scratch import build_model, build_tokenizer

ANSWER = 12
"""Tokens of an action, and of a reflection 32."""
BEGIN = 80
"""Tokens before the first answer, about."""


@dataclass(frozen=True)
class Case:
    """Episodes of so many turns, and words of each observation."""

    turns: int = 5
    episodes: int = 4
    observation: int = 40

    @property
    def context(self) -> int:
        """Most tokens of an episode, about."""
        return BEGIN + self.turns * (ANSWER + self.observation)


CASES = {
    "turns": [Case(turns=n) for n in (2, 5, 10, 20, 30)],
    "context": [
        Case(episodes=1, observation=(n - BEGIN) // 5 - ANSWER)
        for n in (1024, 2048, 4096, 8192, 16384)
    ],
    "episodes": [Case(episodes=n) for n in (1, 4, 16, 64)],
}


def steps(case: Case, folder: Path) -> dict[str, Any]:
    """The contestants, each with a policy of its own."""
    longest = case.context + 200  # what the template and a privileged context add

    def objects() -> dict[str, Any]:
        torch.manual_seed(0)
        tokenizer = build_tokenizer(ShopEnv("tiny").vocabulary())
        shape = ScratchConfig(width=64, layers=2, heads=2, context=longest + 200, init_std=0.02)
        policy = Policy(build_model(shape, tokenizer), tokenizer, ModelConfig(device="auto"))
        world = partial(Corridor, case.turns, case.observation, 2 * case.episodes + 1)
        return {"policy": policy, "environment": world}

    changes: dict[str, Any] = {
        "rollout": {
            "tasks_per_update": case.episodes, "max_turns": case.turns, "max_turn_tokens": ANSWER,
            "max_episode_tokens": longest, "batch_size": case.episodes,
        },
        "reflection": {"max_tokens": 32},
        "eval": {"min_teacher_lift": None, "test_tasks": 0},
    }  # fmt: skip
    return {
        "hero": memory.counted(Steps("quickstart", folder, objects(), **changes)),
        "plain": memory.counted(Plain(folder, objects(), **changes)),
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Seconds of a step against what grows, both on logarithmic axes. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axis, (what, cases) in zip(figure.subplots(1, 3), CASES.items(), strict=True):
        for name, colour in (("hero", "#c0392b"), ("plain", "#5b7fa6")):
            found = [results[title(what, case)]["contestants"][name] for case in cases]
            seconds = [row["seconds"] for row in found]
            axis.loglog([getattr(c, what) for c in cases], seconds, "o-", color=colour, label=name)
        sizes = [getattr(case, what) for case in cases]
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axis.set_xticks([], minor=True)
        axis.set_xlabel(what)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("seconds of a step")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def title(what: str, case: Case) -> str:
    return f"{what} {getattr(case, what)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--results", type=Path, help="JSON file to write, after every case")
    parser.add_argument("--plot", type=Path, help="image to write")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = given.results or Path(scratch) / "results.json"
        loops = Loops(partial(print, flush=True), results)
        for what, cases in CASES.items():
            for case in cases:
                folder = Path(tempfile.mkdtemp(dir=scratch))
                loops.measure(title(what, case), steps(case, folder), rounds=1)
        if given.plot:
            draw(json.loads(results.read_text(encoding="utf-8")), given.plot)


if __name__ == "__main__":
    main()
