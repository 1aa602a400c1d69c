"""From the JSON of a session to Markdown tables and a plot.

    python -m benchmarks.report RESULTS.json                    prints the tables
    python -m benchmarks.report RESULTS.json --plot FILE.png    and draws them
    python -m benchmarks.report --update docs/benchmarks.md     fills in the tables of a document
    python -m benchmarks.report --check docs/benchmarks.md      says whether they are up to date

In a document a table stands between the lines `<!-- results: PATH -->` and `<!-- end -->`, with the
path of the JSON file from the root of the repository.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.baselines import OURS
from benchmarks.measure import Result, from_json, speedup
from benchmarks.shapes import Case
from benchmarks.yardsticks import YARDSTICKS

ROOT = Path(__file__).resolve().parents[1]
DIVERGENCES = {"jsd": "JSD", "forward_kl": "forward KL", "reverse_kl": "reverse KL"}
COLUMNS = (
    "",
    "time, ms",
    "hero_kernels is faster",
    "times library GEMMs",
    "times own GEMMs",
    "extra memory, MiB",
    "error of the loss",
    "error of dX",
    "error of dW",
)
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(session: Mapping[str, Any]) -> str:
    """Markdown: the machine, and a table for each case."""
    parts = [_machine(session["machine"])]
    for entry in session["cases"]:
        case, results = from_json(entry)
        parts.append(f"**{title(case)}**\n\n{table(results)}")
    return "\n\n".join(parts) + "\n"


def title(case: Case) -> str:
    words = [
        f"{case.model}: {case.tokens} tokens, H = {case.hidden}, V = {case.vocab}",
        case.dtype,
        DIVERGENCES[case.divergence],
    ]
    if case.action_share < 1:
        words.append(f"{100 * case.action_share:.0f} % action tokens")
    if not case.trainable_head:
        words.append("frozen head")
    return ", ".join(words)


def table(results: Mapping[str, Result]) -> str:
    """One row for each that was measured, then the reasons of the others."""
    rows = [COLUMNS, ("---",) + ("---:",) * (len(COLUMNS) - 1)]
    rows += [_row(results, name) for name, result in results.items() if not result.skipped]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    for result in results.values():
        if result.skipped:
            reason = result.skipped.strip().splitlines()[0]
            lines += ["", f"Not measured: {result.title} ({reason})."]
    return "\n".join(lines)


def _row(results: Mapping[str, Result], name: str) -> tuple[str, ...]:
    result = results[name]
    errors = [result.loss_error, *result.gradient_errors, None, None][:3]
    faster = "hero" in results and not results["hero"].skipped and name not in OURS
    return (
        result.title,
        f"{1e3 * result.median:.1f}" + " (one call)" * (len(result.seconds) == 1),
        f"{speedup(results, 'hero', name):.2f}x" if faster and name not in YARDSTICKS else "",
        f"{speedup(results, 'library-gemms', name):.2f}",
        f"{speedup(results, 'own-gemms', name):.2f}" if name in OURS else "",
        "" if result.extra_bytes is None else f"{result.extra_bytes / 2**20:.0f}",
        *("" if error is None else f"{100 * error:.2g} %" for error in errors),
    )


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    kernel = machine["kernel_instruction_set"]
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    return (
        f"{device}, {machine['threads']} threads, {machine['torch_instruction_set']}"
        f"{f' (row kernel: {kernel})' if kernel else ''}; {versions}; "
        f"{machine['date']}, commit {machine['commit']}."
    )


def plot(session: Mapping[str, Any], path: Path) -> None:
    """Times as bars, a panel for each case.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [from_json(entry) for entry in session["cases"]]
    figure, axes = pyplot.subplots(
        len(entries), 1, figsize=(9, 2.6 * len(entries)), squeeze=False, layout="constrained"
    )
    for axis, (case, results) in zip(axes[:, 0], entries, strict=True):
        shown = [(name, result) for name, result in results.items() if not result.skipped]
        colours = [
            "tab:red" if name in OURS else "lightgrey" if name in YARDSTICKS else "tab:blue"
            for name, _ in shown
        ]
        bars = axis.barh(
            [result.title for _, result in shown],
            [1e3 * result.median for _, result in shown],
            color=colours,
        )
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.margins(x=0.1)
        axis.invert_yaxis()
        axis.set_title(title(case), fontsize=9, loc="left")
        axis.set_xlabel("ms, forward and backward", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=150)


def updated(document: str) -> str:
    """The text with every table rendered from its JSON file.

    Raises:
        FileNotFoundError: a table names a file that does not exist.
    """

    def fill(block: re.Match[str]) -> str:
        session = json.loads((ROOT / block[2]).read_text())
        return f"{block[1]}{render(session)}{block[3]}"

    return BLOCK.sub(fill, document)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="JSON files")
    parser.add_argument("--plot", type=Path, help="image file to draw the first of them into")
    parser.add_argument("--update", type=Path, help="document whose tables to fill in")
    parser.add_argument("--check", type=Path, help="document whose tables to compare")
    options = parser.parse_args()
    sessions = [json.loads(path.read_text()) for path in options.results]
    for session in sessions:
        print(render(session))
    if options.plot:
        if not sessions:
            parser.error("--plot needs a JSON file of results.")
        plot(sessions[0], options.plot)
    if options.update:
        options.update.write_text(updated(options.update.read_text()))
    if options.check and updated(options.check.read_text()) != options.check.read_text():
        raise SystemExit(
            f"{options.check} is not what its results say: run "
            f"`python -m benchmarks.report --update {options.check}`."
        )


if __name__ == "__main__":
    main()
