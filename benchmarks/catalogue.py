"""WebShop's full catalogue in time and memory, on a generated one of the same form.

    python -m benchmarks.catalogue [--products 200000] [--output FILE]

Writes a synthetic catalogue with the statistics of WebShop's, builds the index on disk in a process
of its own, and serves from it in another. Memory is the peak of each process.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, write_json

BLOCK = 5000
"""Products generated at once."""
EPISODES = 200
RESULTS = Path(__file__).parent / "results" / "catalogue-cpu.json"


def generate(folder: Path, products: int) -> None:
    """WebShop's three files, block by block."""
    from hero.envs.shop.synthetic import build

    names = ("items_shuffle_generated.json", "items_ins_v2_generated.json", "title_nouns.json")
    files = [(folder / name).open("w", encoding="utf-8") for name in names]
    for file, bracket in zip(files, "[{{", strict=True):
        file.write(bracket)
    for first in range(0, products, BLOCK):
        items, *tables = build("full", min(BLOCK, products - first), first)
        comma = "," if first else ""
        files[0].write(comma + json.dumps(items)[1:-1])
        for file, table in zip(files[1:], tables, strict=True):
            file.write(comma + json.dumps(table)[1:-1])
    for file, bracket in zip(files, "]}}", strict=True):
        file.write(bracket)
        file.close()


def built(data: Path, index: Path) -> dict[str, Any]:
    """Build the index."""
    from hero.envs.webshop import WebShopEnv

    start = time.perf_counter()
    shop = WebShopEnv(str(data), index_dir=str(index))._shop
    return {
        "seconds": time.perf_counter() - start, "products": len(shop.asins),
        "goals": len(shop.goals), "index_mb": size(index), "files_mb": size(data),
    }  # fmt: skip


def served(data: Path, index: Path) -> dict[str, Any]:
    """Open it again and play: the oracle, and instructions as first queries."""
    from hero.envs.webshop import WebShopEnv

    start = time.perf_counter()
    env = WebShopEnv(str(data), index_dir=str(index))
    opened = time.perf_counter() - start
    others = [WebShopEnv(str(data), index_dir=str(index)) for _ in range(64)]
    assert all(other._shop is env._shop for other in others)
    tasks = [f"test-{number}" for number in range(EPISODES)]
    searches, steps, rewards = [], [], []
    for task in tasks:
        _, info = env.reset(task)
        action, ended, reward = f"search[{info['instruction']}]", False, 0.0
        while not ended:
            begin = time.perf_counter()
            _, reward, terminated, truncated, _ = env.step(action)
            taken = 1e3 * (time.perf_counter() - begin)
            (searches if action.startswith("search") else steps).append(taken)
            ended = terminated or truncated
            action = "" if ended else env.oracle()
        rewards.append(reward)
    return {
        "seconds_to_open": opened, "search_ms": statistics.median(searches),
        "search_ms_p95": sorted(searches)[int(0.95 * len(searches))],
        "click_ms": statistics.median(steps), "oracle_mean": statistics.mean(rewards),
        "environments_sharing_one_catalogue": 1 + len(others), "episodes": EPISODES,
    }  # fmt: skip


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def in_a_process(stage: str, *arguments: object) -> dict[str, Any]:
    """A stage in a process of its own, with its peak of memory."""
    words = [sys.executable, "-m", __spec__.name, "--stage", stage, *map(str, arguments)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--products", type=int, default=200_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("folders", nargs="*", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        random.seed(0)
        found = {"built": built, "served": served}[given.stage](*given.folders)
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as scratch:
        data, index = Path(scratch) / "data", Path(scratch) / "index"
        data.mkdir()
        generate(data, given.products)
        results = {name: in_a_process(name, data, index) for name in ("built", "served")}
    results["machine"] = describe("cpu")
    write_json(given.output, results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
