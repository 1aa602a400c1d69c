"""Updates of the quickstart in several checkouts, in turn: seconds of each phase.

    python -m benchmarks.steps CHECKOUT[:OPTIONS]... [--updates 20] [--rounds 3] [--output FILE]

The first checkout is what the others are compared with. Each runs `hero train quickstart` with its
own recipe and the options after the colon, such as `.:--loss.turns hinted`, with one thread; the
seconds are those that it logs, so let the machine do nothing else. The first update, which warms
up, is not counted. A checkout whose C++ kernel is not built runs without it: build it with
`python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

PHASES = {"rollout": "rollout", "reflection": "reflection", "learning": "train"}
"""As the table names them, and as `metrics.jsonl` does."""


def measure(checkout: Path, options: list[str], updates: int) -> dict[str, float]:
    """Seconds of each phase and turns, means of an update."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "hero.cli", "train", "quickstart", *options]
        command += ["--updates", str(updates), "--eval.every", str(updates + 1)]
        command += ["--eval.test-tasks", "0", "--output-dir", str(run)]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=sys.stderr)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    first, *counted = [line for line in lines if "seconds/train" in line]
    seconds = {
        name: mean(line[f"seconds/{logged}"] for line in counted) for name, logged in PHASES.items()
    }
    turns = (counted[-1]["env_turns"] - first["env_turns"]) / len(counted)
    return {**seconds, "update": sum(seconds.values()), "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkouts", nargs="+", metavar="CHECKOUT[:OPTIONS]")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    from benchmarks.machine import describe, write_json

    machine, rows = describe("cpu") | {"threads": 1}, dict[str, list[dict[str, float]]]()
    for _ in range(given.rounds):
        for checkout in given.checkouts:
            path, _, options = checkout.partition(":")
            folder = Path(path).resolve()
            commit = subprocess.run(
                ["git", "describe", "--always", "--dirty=+"], cwd=folder, check=True,
                capture_output=True, text=True,
            ).stdout.strip()  # fmt: skip
            measured = measure(folder, shlex.split(options), given.updates)
            rows.setdefault(f"{commit} {options}".strip(), []).append(measured)
    first, *_ = rows.values()
    print("| | " + " | ".join(first[0]) + " | times as fast | turn for turn |")
    print("|---" + "|---:" * (len(first[0]) + 2) + "|")
    for name, own in rows.items():
        pairs = list(zip(first, own, strict=True))
        faster = median(a["update"] / b["update"] for a, b in pairs)
        per_turn = median(a["update"] / a["turns"] * b["turns"] / b["update"] for a, b in pairs)
        cells = [f"{median(row[key] for row in own):.2f}" for key in own[0]]
        print(f"| {name} | {' | '.join(cells)} | {faster:.2f} | {per_turn:.2f} |")
    if given.output:
        write_json(given.output, {"machine": machine, "updates": given.updates, "rounds": rows})


if __name__ == "__main__":
    main()
