"""From the results of a session on a GPU to what the package does there.

    python -m benchmarks.settle FOLDER [--root CHECKOUT]

Reads comparison.json and benchmark.json of `benchmarks/gpu_session.sh`. In hero_kernels/backends.py
it says what `impl="auto"` may take on a GPU: "triton", which serves what "cuda" refuses (split
columns, process groups, log-probabilities), and "cuda" before it if that is faster on average; else
delete "cuda". In docs/benchmarks.md it puts the tables. Sentences elsewhere that say that nothing
has run on a GPU are printed: rewrite them.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.measure import Result, speedup
from benchmarks.report import entries_of, updated

GENERAL, RIVAL = "hero-triton", "hero-cuda"
"""Names in the comparison."""
AUTO = re.compile(r"^AUTO = \(.*\)$", re.MULTILINE)
HEADING = re.compile(r"^## On a GPU.*\n(?:\nNo kernel (?:.+\n)+)?", re.MULTILINE)
"""With the paragraph that says that nothing has been measured."""
UNTRUE = re.compile(r"(not|nothing|anything).* on a GPU|no GPU yet|wait for a GPU", re.IGNORECASE)
"""What is said before a session on a GPU, and may not be true after it."""


def gain(cases: Sequence[Mapping[str, Result]]) -> float:
    """How many times as fast "cuda" is as "triton": the geometric mean over the cases of both.

    Raises:
        ValueError: there is none.
    """
    both = [
        results
        for results in cases
        if all(name in results and not results[name].skipped for name in (GENERAL, RIVAL))
    ]
    if not both:
        raise ValueError(
            f"No case of comparison.json measured {GENERAL} beside {RIVAL}: "
            "run `bash benchmarks/gpu_session.sh` on a GPU."
        )
    return statistics.geometric_mean(speedup(results, RIVAL, GENERAL) for results in both)


def settle(folder: Path, root: Path) -> float:
    """Writes both files of the checkout `root`; returns the gain of "cuda".

    Raises:
        FileNotFoundError: the session's files are not in `folder`.
        ValueError: `folder` is not in `root`, or nothing was compared; see `gain`.
    """
    if not folder.resolve().is_relative_to(root):
        raise ValueError(
            f"{folder} is not in the checkout {root}: copy it to benchmarks/results/gpu there, for "
            "results that documents show are committed."
        )
    comparison = json.loads((folder / "comparison.json").read_text())
    found = gain([results for _, results in entries_of(comparison)])
    backends = root / "hero_kernels" / "backends.py"
    names = '"torch", "cpu", "triton"' + ', "cuda"' * (found > 1)
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
    return found


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
    found = settle(options.folder, options.root.resolve())
    print(f'"cuda" is {found:.2f} times as fast as "triton"' + ": delete it." * (found <= 1))
    for line in untrue(options.root.resolve()):
        print(f"Still true? {line}")
    print("Written: hero_kernels/backends.py, docs/benchmarks.md. Look at `git diff`.")


if __name__ == "__main__":
    main()
