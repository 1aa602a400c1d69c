"""From the results of a session on a GPU to what the package does there.

    python -m benchmarks.settle FOLDER [--root CHECKOUT]

Reads comparison.json and benchmark.json of `benchmarks/gpu_session.sh`. In hero_kernels/backends.py
it orders what `impl="auto"` may take on a GPU by speed, the fastest last; an implementation that
never wins is left out, and named: delete it. In docs/benchmarks.md it puts the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.measure import Result, speedup
from benchmarks.report import entries_of, updated

CONTESTANTS = {"hero-triton": "triton", "hero-cuda": "cuda", "hero-triton-fused": "triton_fused"}
"""Name in the comparison and name of the implementation."""
WITHOUT_A_GPU = ("torch", "cpu")
AUTO = re.compile(r"^AUTO = \(.*\)$", re.MULTILINE)
HEADING = re.compile(r"^## On a GPU.*$", re.MULTILINE)


def order(cases: Sequence[Mapping[str, Result]]) -> tuple[list[str], list[str]]:
    """The implementations that win a case, the fastest on average last, and those that never do.

    Raises:
        ValueError: no case has two of them to compare.
    """
    wins: dict[str, int] = {}
    slowness: dict[str, list[float]] = {}
    for results in cases:
        met = [name for name in CONTESTANTS if name in results and not results[name].skipped]
        if len(met) < 2:
            continue
        fastest = max(met, key=lambda name: speedup(results, name, met[0]))
        for name in met:
            wins[name] = wins.get(name, 0) + (name == fastest)
            slowness.setdefault(name, []).append(math.log(speedup(results, fastest, name)))
    if not wins:
        raise ValueError(
            "No case of comparison.json measured two of "
            f"{', '.join(CONTESTANTS)}: run `bash benchmarks/gpu_session.sh` on a GPU."
        )
    mean = {name: sum(logs) / len(logs) for name, logs in slowness.items()}
    winners = sorted((name for name in wins if wins[name]), key=mean.__getitem__, reverse=True)
    return [CONTESTANTS[n] for n in winners], [CONTESTANTS[n] for n in wins if not wins[n]]


def settle(folder: Path, root: Path) -> list[str]:
    """Writes both files of the checkout `root`; returns the implementations that never win.

    Raises:
        FileNotFoundError: the session's files are not in `folder`, or not in `root`: results that
            documents show are committed.
        ValueError: nothing was compared; see `order`.
    """
    comparison = json.loads((folder / "comparison.json").read_text())
    winners, losers = order([results for _, results in entries_of(comparison)])
    backends = root / "hero_kernels" / "backends.py"
    names = ", ".join(f'"{name}"' for name in (*WITHOUT_A_GPU, *winners))
    document = root / "docs" / "benchmarks.md"
    text = document.read_text()
    tables = (folder / f"{name}.json" for name in ("benchmark", "comparison"))
    paths = [path.resolve().relative_to(root) for path in tables]
    blocks = "".join(f"\n<!-- results: {path} -->\n<!-- end -->\n" for path in paths)
    if blocks.strip().splitlines()[0] not in text:
        text = HEADING.sub(lambda _: "## On a GPU\n" + blocks, text, count=1)
    text = updated(text, root)
    backends.write_text(AUTO.sub(f"AUTO = ({names})", backends.read_text(), count=1))
    document.write_text(text)
    return losers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="$OUT of the session, inside the checkout")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to write to")
    options = parser.parse_args()
    losers = settle(options.folder, options.root.resolve())
    for name in losers:
        print(f'impl="{name}" is never the fastest: delete it.')
    print("Written: hero_kernels/backends.py, docs/benchmarks.md. Look at `git diff`.")


if __name__ == "__main__":
    main()
