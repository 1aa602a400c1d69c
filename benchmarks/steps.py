"""An update of the quickstart in several checkouts, in turn: seconds of each phase.

    python -m benchmarks.steps CHECKOUT... [--updates 3] [--rounds 3] [--turns hinted]
                               [--output FILE]

The first checkout is what the others are compared with. Seconds are those of the processor, with
one thread. Reflections are read as each checkout's recipe says, and the turns trained that it
trains, unless `--turns` is given: checkouts without `loss.turns` trained the hinted ones.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

PHASES = ("rollout", "reflection", "learning")


def measure(updates: int, turns_trained: str) -> dict[str, float]:
    """Seconds of each phase, means over updates after one that is not counted."""
    import dataclasses

    import torch

    from hero.checks import from_dict
    from hero.config import LossConfig, TrainConfig
    from hero.recipes import load_recipe, merge
    from hero.report.console import Console
    from hero.trainer import Trainer

    torch.set_num_threads(1)
    changes: dict[str, Any] = {"eval": {"test_tasks": 0}}
    if turns_trained and "turns" in {field.name for field in dataclasses.fields(LossConfig)}:
        changes["loss"] = {"turns": turns_trained}
    config: TrainConfig = from_dict(merge(load_recipe("quickstart"), changes))
    trainer = Trainer(config, Path(), console=Console(io.StringIO(), terminal=False))
    seconds, turns = dict.fromkeys(PHASES, 0.0), 0
    for number in range(1, updates + 2):
        clock = [time.process_time()]
        played = trainer.stages.play(number, trainer.state)
        clock.append(time.process_time())
        read = trainer.stages.reflect(played, number)
        clock.append(time.process_time())
        trainer.learner.learn(trainer.stages.annotate(played, read), number)
        clock.append(time.process_time())
        if number > 1:
            turns += sum(len(trajectory.turns) for trajectory in played)
            for phase, begin, end in zip(PHASES, clock, clock[1:], strict=False):
                seconds[phase] += (end - begin) / updates
    return {**seconds, "update": sum(seconds.values()), "turns": turns / updates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkouts", nargs="*", type=Path)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", default="", help="loss.turns of checkouts that have it")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if not given.checkouts:  # a process of a checkout
        print(json.dumps(measure(given.updates, given.turns)))
        return
    from benchmarks.machine import describe, write_json

    machine, rows = describe("cpu"), dict[str, list[dict[str, Any]]]()
    for _ in range(given.rounds):
        for checkout in given.checkouts:
            command = [sys.executable, __file__, "--updates", str(given.updates)]
            command += ["--turns", given.turns]
            environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
            done = subprocess.run(command, env=environment, capture_output=True, check=True)
            rows.setdefault(checkout.name, []).append(json.loads(done.stdout.splitlines()[-1]))
    first = given.checkouts[0].name
    print("| | " + " | ".join((*PHASES, "update", "turns")) + " | times as fast |")
    print("|---" * (len(PHASES) + 4) + "|")
    for name, own in rows.items():
        pairs = zip(rows[first], own, strict=True)
        faster = median(one["update"] / other["update"] for one, other in pairs)
        cells = [f"{median(row[key] for row in own):.2f}" for key in own[0]]
        print(f"| {name} | " + " | ".join(cells) + f" | {faster:.2f} |")
    if given.output:
        write_json(given.output, {
            "machine": machine, "updates": given.updates, "turns": given.turns, "rounds": rows,
        })  # fmt: skip


if __name__ == "__main__":
    main()
