"""From the JSON of a session to Markdown tables and a plot.

    python -m benchmarks.report RESULTS.json                  prints the tables
    python -m benchmarks.report RESULTS.json --plot docs/images/NAME.png [--only CASE,CASE]
                                                              and draws them
    python -m benchmarks.report --update docs/benchmarks.md   fills in the tables of a document
    python -m benchmarks.report --check docs/benchmarks.md    says whether they are up to date

In a document a table stands between the lines `<!-- results: PATH -->` and `<!-- end -->`, with the
path of the JSON file from the root of the repository.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.baselines import OURS
from benchmarks.measure import Result, from_json, speedup
from benchmarks.ours import gradient_bytes
from benchmarks.shapes import Case
from benchmarks.yardsticks import YARDSTICKS

ROOT = Path(__file__).resolve().parents[1]
DIVERGENCES = {"jsd": "JSD", "forward_kl": "forward KL", "reverse_kl": "reverse KL"}
HEADER = ("", "time, ms", "hero_kernels is faster", "times library GEMMs", "times own GEMMs")
ERRORS = ("error of the loss", "error of dX", "error of dW")
MEMORY, PREDICTED_TIME, PREDICTED_MEMORY = (
    "extra memory, MiB",
    "predicted, ms",
    "predicted, MiB",
)
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(session: Mapping[str, Any]) -> str:
    """Markdown: the machine, and a table for each case."""
    parts = [_machine(session["machine"])]
    for entry in session["cases"]:
        case, results = from_json(entry)
        parts.append(f"**{title(case)}**\n\n{table(results)}")
    cases = [from_json(entry) for entry in session["cases"]]
    if is_sweep([case for case, _ in cases]) and all("hero" in results for _, results in cases):
        parts.append(sweep(session))
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
    """One row for each that was measured, then the reasons of the others.

    What the planner predicts stands beside what was measured, where a file holds predictions.
    """
    predicted = any(result.predicted_seconds for result in results.values())
    columns = [*HEADER, MEMORY, *ERRORS]
    if predicted:
        columns[2:2] = [PREDICTED_TIME]
        columns.insert(columns.index(MEMORY) + 1, PREDICTED_MEMORY)
    rows = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for name, result in results.items():
        if not result.skipped:
            cells = _row(results, name)
            rows.append([cells[column] for column in columns])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    for result in results.values():
        if result.skipped:
            reason = result.skipped.strip().splitlines()[0]
            lines += ["", f"Not measured: {result.title} ({reason})."]
    return "\n".join(lines)


def _row(results: Mapping[str, Result], name: str) -> dict[str, str]:
    """The cells of one contestant by column."""
    result = results[name]
    errors = [result.loss_error, *result.gradient_errors, None, None][:3]
    faster = "hero" in results and not results["hero"].skipped and name not in OURS
    cells = (
        result.title,
        f"{1e3 * result.median:.1f}" + " (one call)" * (len(result.seconds) == 1),
        f"{speedup(results, 'hero', name):.2f}x" if faster and name not in YARDSTICKS else "",
        f"{speedup(results, 'library-gemms', name):.2f}",
        f"{speedup(results, 'own-gemms', name):.2f}" if name in OURS else "",
    )
    seconds = result.predicted_seconds
    return {
        **dict(zip(HEADER, cells, strict=True)),
        PREDICTED_TIME: "" if seconds is None else f"{1e3 * seconds:.1f}",
        MEMORY: _mebibytes(result.extra_bytes),
        PREDICTED_MEMORY: _mebibytes(result.predicted_bytes),
        **{
            column: "" if error is None else f"{100 * error:.2g} %"
            for column, error in zip(ERRORS, errors, strict=True)
        },
    }


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.0f}"


def is_sweep(cases: Sequence[Case]) -> bool:
    """Whether the cases differ in their number of tokens, and in nothing else."""
    return len(cases) > 1 and len({replace(case, tokens=1) for case in cases}) == 1


def sweep(session: Mapping[str, Any]) -> str:
    """Microseconds a token, and memory beyond the gradients, of "hero" by number of tokens.

    Linear time and flat memory are columns of equal numbers.
    """
    lines = [
        "| tokens | time, us a token | library GEMMs, us a token | memory beyond gradients, MiB |",
        "|---:|---:|---:|---:|",
    ]
    for entry in session["cases"]:
        case, results = from_json(entry)
        hero = results["hero"]
        if hero.skipped:
            lines.append(f"| {case.tokens} | {hero.skipped.splitlines()[0]} | | |")
            continue
        times = [1e6 * r.median / case.active_tokens for r in (hero, results["library-gemms"])]
        beyond = None if hero.extra_bytes is None else hero.extra_bytes - gradient_bytes(case)
        cells = (str(case.tokens), *(f"{time:.2f}" for time in times), _mebibytes(beyond))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    kernel = machine["kernel_instruction_set"]
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    return (
        f"{device}, {machine['threads']} threads, {machine['torch_instruction_set']}"
        f"{f' (row kernel: {kernel})' if kernel else ''}{_products(machine)}; {versions}; "
        f"{machine['date']}, commit {machine['commit']}."
    )


def _products(machine: Mapping[str, Any]) -> str:
    """How this package multiplied bf16 matrices on the CPU; older files do not say."""
    kind = machine.get("bf16_products")
    if kind is None:
        return ""
    return ", bf16 products " + ("by widening" if kind == "none" else f"by {kind}")


def plot(session: Mapping[str, Any], path: Path) -> None:
    """Time and memory as bars, a row of panels for each case; see plots.py.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from benchmarks import plots
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib.") from None
    plots.draw([from_json(entry) for entry in session["cases"]], title, path)


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
    parser.add_argument("--only", help="comma-separated ids of the cases to draw; default all")
    parser.add_argument("--update", type=Path, help="document whose tables to fill in")
    parser.add_argument("--check", type=Path, help="document whose tables to compare")
    options = parser.parse_args()
    sessions = [json.loads(path.read_text()) for path in options.results]
    for session in sessions:
        print(render(session))
    if options.plot:
        if not sessions:
            parser.error("--plot needs a JSON file of results.")
        wanted = options.only.split(",") if options.only else None
        cases = [c for c in sessions[0]["cases"] if wanted is None or c["id"] in wanted]
        if not cases:
            known = ", ".join(c["id"] for c in sessions[0]["cases"])
            parser.error(f"--only {options.only} names no case; expected some of {known}.")
        plot({**sessions[0], "cases": cases}, options.plot)
    if options.update:
        options.update.write_text(updated(options.update.read_text()))
    if options.check and updated(options.check.read_text()) != options.check.read_text():
        raise SystemExit(
            f"{options.check} is not what its results say: run "
            f"`python -m benchmarks.report --update {options.check}`."
        )


if __name__ == "__main__":
    main()
