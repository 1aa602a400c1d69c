"""From the results of a session on a GPU to what the package does there.

    python -m benchmarks.settle FOLDER [--root CHECKOUT]

Reads comparison.json and benchmark.json of `benchmarks/gpu_session.sh`. In hero_kernels/backends.py
it orders what `impl="auto"` may take on a GPU: "triton", which serves what the others refuse (fp32,
split columns, process groups, log-probabilities), then what wins a case and is faster on average,
the fastest last. Other rivals are left out, and named: delete them. In docs/benchmarks.md it puts
the tables. Sentences elsewhere that say that nothing has run on a GPU are printed: rewrite them.
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

GENERAL = "hero-triton"
RIVALS = {"hero-cuda": "cuda", "hero-triton-fused": "triton_fused"}
"""Name in the comparison and name of the implementation."""
ALWAYS = ("torch", "cpu", "triton")
"""Of `impl="auto"`, before the rivals."""
AUTO = re.compile(r"^AUTO = \(.*\)$", re.MULTILINE)
HEADING = re.compile(r"^## On a GPU.*\n(?:\nNo kernel (?:.+\n)+)?", re.MULTILINE)
"""With the paragraph that says that nothing has been measured."""
UNTRUE = re.compile(r"(not|nothing|anything).* on a GPU|no GPU yet|wait for a GPU", re.IGNORECASE)
"""What is said before a session on a GPU, and may not be true after it."""


def order(cases: Sequence[Mapping[str, Result]]) -> tuple[list[str], list[str]]:
    """The rivals that win a case and are faster than "triton" on average, and the other ones.

    The average is the geometric mean over the cases that measured both; the fastest is last.

    Raises:
        ValueError: no case has a rival beside "triton".
    """
    gains: dict[str, list[float]] = {}
    winners = set()
    for results in cases:
        met = [name for name in (GENERAL, *RIVALS) if name in results and not results[name].skipped]
        if GENERAL in met:
            speeds = {name: speedup(results, name, GENERAL) for name in met}
            winners.add(max(met, key=speeds.__getitem__))
            for name in met[1:]:
                gains.setdefault(name, []).append(math.log(speeds[name]))
    if not gains:
        raise ValueError(
            f"No case of comparison.json measured {GENERAL} beside one of {', '.join(RIVALS)}: "
            "run `bash benchmarks/gpu_session.sh` on a GPU."
        )
    mean = {name: sum(logs) / len(logs) for name, logs in gains.items()}
    faster = sorted((n for n in winners & mean.keys() if mean[n] > 0), key=mean.__getitem__)
    return [RIVALS[n] for n in faster], [RIVALS[n] for n in mean if n not in faster]


def settle(folder: Path, root: Path) -> list[str]:
    """Writes both files of the checkout `root`; returns the implementations to delete.

    Raises:
        FileNotFoundError: the session's files are not in `folder`.
        ValueError: `folder` is not in `root`, or nothing was compared; see `order`.
    """
    if not folder.resolve().is_relative_to(root):
        raise ValueError(
            f"{folder} is not in the checkout {root}: copy it to benchmarks/results/gpu there, for "
            "results that documents show are committed."
        )
    comparison = json.loads((folder / "comparison.json").read_text())
    faster, losers = order([results for _, results in entries_of(comparison)])
    backends = root / "hero_kernels" / "backends.py"
    names = ", ".join(f'"{name}"' for name in (*ALWAYS, *faster))
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


def untrue(root: Path) -> list[str]:
    """Lines of documents and modules that match `UNTRUE`, with their places."""
    paths = [root / "README.md", *(root / "docs").glob("*.md"), *root.glob("hero_kernels/**/*.py")]
    return [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sorted(paths)
        if path.exists()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNTRUE.search(line)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="$OUT of the session, inside the checkout")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to write to")
    options = parser.parse_args()
    losers = settle(options.folder, options.root.resolve())
    for name in losers:
        print(f'impl="{name}" wins nothing over "triton": delete it.')
    for line in untrue(options.root.resolve()):
        print(f"Still true? {line}")
    print("Written: hero_kernels/backends.py, docs/benchmarks.md. Look at `git diff`.")


if __name__ == "__main__":
    main()
