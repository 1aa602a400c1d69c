"""From the JSON of a session to Markdown tables.

    python -m benchmarks.report RESULTS.json                  prints the tables
    python -m benchmarks.report --update docs/benchmarks.md   fills in the tables of a document

In a document a table stands between the lines `<!-- results: PATH -->` and `<!-- end -->`, with the
path of the JSON file from the root of the repository. Tables are at most 100 columns wide. With
`<!-- headline: PATH -->` it is a short one, of the plain case in bf16 and fp32.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.baselines import OURS, is_plain
from benchmarks.machine import ROOT, busy
from benchmarks.measure import Result, from_json, speedup
from benchmarks.shapes import Case
from benchmarks.yardsticks import YARDSTICKS

DIVERGENCES = {"jsd": "JSD", "forward_kl": "forward KL", "reverse_kl": "reverse KL"}
COLUMNS = ("", "ms", "/ hero", "/ library", "/ own", "MiB", "loss err", "dX err", "dW err")
UNEVEN = 1.5
"""Slowest round of a yardstick, in medians, above which the rounds of a case were disturbed."""
BLOCK = re.compile(r"(<!-- (results|headline): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADLINE = {
    "hero": "**hero_kernels**",
    "eager": "torch, whole logits",
    "compiled": "the same under torch.compile",
    "chunked": "torch, in chunks, computed twice",
    "liger-chunked": "Liger {liger-kernel}, chunked JSD",
    "liger-compiled": "Liger {liger-kernel} under torch.compile",
    "trl-chunked": "TRL {trl}, chunked divergence",
}
"""Contestants of a headline, and their names there, with versions of packages."""

Entries = Sequence[tuple[Case, Mapping[str, Result]]]


def render(session: Mapping[str, Any]) -> str:
    """Markdown: the machine, a table for each case, what is ahead of what, what was skipped."""
    entries = entries_of(session)
    parts = [machine_line(session["machine"]), *(case_table(*entry) for entry in entries)]
    return "\n\n".join([*parts, *ending(session["machine"], entries)]) + "\n"


def entries_of(session: Mapping[str, Any]) -> Entries:
    return [from_json(entry) for entry in session["cases"]]


def ending(machine: Mapping[str, Any], entries: Entries) -> list[str]:
    """What is said once all cases were measured."""
    parts = [sweep(entries) if is_sweep(entries) else "", summary(entries), not_measured(entries)]
    if warning := busy(machine):
        parts.append(wrapped(warning))
    return [part for part in parts if part]


def case_table(case: Case, results: Mapping[str, Result]) -> str:
    """Title, table, and what this package chose to do."""
    rows = [_row(results, name) for name in results if not results[name].skipped]
    lines = [f"**{title(case)}**", "", aligned([COLUMNS, *rows])]
    plans = [f"{name}: {result.plan}." for name, result in results.items() if result.plan]
    if plans:
        lines += ["", *map(wrapped, plans)]
    for name in YARDSTICKS:
        times = results[name].seconds if name in results else []
        if times and max(times) > UNEVEN * statistics.median(times):
            spread = max(times) / statistics.median(times)
            lines += ["", wrapped(f"Uneven rounds: {name} once took {spread:.1f} x its median.")]
    return "\n".join(lines)


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


def _row(results: Mapping[str, Result], name: str) -> tuple[str, ...]:
    result = results[name]
    errors = [result.loss_error, *result.gradient_errors, None, None][:3]
    measured = "hero" in results and not results["hero"].skipped
    is_rival = measured and name != "hero" and name not in YARDSTICKS
    return (
        name,
        _number(1e3 * result.median) + "*" * (len(result.seconds) == 1),
        f"{speedup(results, 'hero', name):.2f}x" if is_rival else "",
        f"{speedup(results, 'library-gemms', name):.2f}",
        f"{speedup(results, 'own-gemms', name):.2f}" if name in OURS else "",
        "" if result.extra_bytes is None else f"{result.extra_bytes / 2**20:.0f}",
        *("" if error is None else _percent(error) for error in errors),
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _percent(error: float) -> str:
    percent = 100 * error
    return f"{percent:.2g} %" if percent >= 0.01 else f"{percent:.0e} %"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first row its header, with columns as wide as their longest cell."""
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headline(session: Mapping[str, Any]) -> str:
    """Time and memory of the JSD of all tokens, in bf16 and fp32, of the contestants measured."""
    plain = {case.dtype: results for case, results in entries_of(session) if is_plain(case)}
    rows: list[Sequence[str]] = [
        ("", "bf16: time", "memory", "error of dX", "fp32: time", "memory")
    ]
    for name, words in HEADLINE.items():
        cells = []
        for dtype, results in plain.items():
            result = results.get(name, Result(skipped="not entered"))
            figures = ["not measured"] + [""] * (1 + (dtype == "bfloat16"))
            if not result.skipped:
                memory = f"{(result.extra_bytes or 0) / 2**20:.0f} MiB"
                figures = [f"{_number(1e3 * result.median)} ms", memory]
                if dtype == "bfloat16":
                    figures.append(_percent(result.gradient_errors[0]))
            cells += [f"**{cell}**" if cell and name == "hero" else cell for cell in figures]
        rows.append((words.format(**session["machine"]["versions"]), *cells))
    return aligned(rows) + "\n"


def is_sweep(entries: Entries) -> bool:
    """Whether the cases differ in their number of tokens, and in nothing else."""
    cases = {replace(case, tokens=1) for case, _ in entries}
    has_hero = all("hero" in results for _, results in entries)
    return len(entries) > 1 and len(cases) == 1 and has_hero


def sweep(entries: Entries) -> str:
    """Of "hero" by number of tokens: linear time and flat memory are columns of equal numbers."""
    rows: list[Sequence[str]] = [
        ("tokens", "us a token", "library's products, us", "MiB beyond gradients")
    ]
    for case, results in entries:
        hero = results["hero"]
        if hero.skipped:
            continue
        times = [1e6 * r.median / case.active_tokens for r in (hero, results["library-gemms"])]
        memory = ""
        if hero.extra_bytes is not None:
            memory = f"{(hero.extra_bytes - case.gradient_bytes) / 2**20:.0f}"
        rows.append((str(case.tokens), *(f"{time:.2f}" for time in times), memory))
    return "**hero by number of tokens**\n\n" + aligned(rows)


def summary(entries: Entries) -> str:
    """What is ahead of what: each rival's time, memory and error of dX, in those of "hero"."""
    entries = [entry for entry in entries if "hero" in entry[1] and not entry[1]["hero"].skipped]
    rows: list[Sequence[str]] = [
        ("other / hero, all cases", "cases", "hero is faster in", "time", "memory", "dX err")
    ]
    behind = []
    for name in dict.fromkeys(name for _, results in entries for name in results):
        met = [entry for entry in entries if name in entry[1] and not entry[1][name].skipped]
        if name == "hero" or name in YARDSTICKS or not met:
            continue
        times = [speedup(results, "hero", name) for _, results in met]
        pairs = [(results[name], results["hero"]) for _, results in met]
        sizes = [(a.extra_bytes, b.extra_bytes) for a, b in pairs]
        memory = [theirs / ours for theirs, ours in sizes if theirs and ours]
        errors = [
            a.gradient_errors[0] / b.gradient_errors[0]
            for a, b in pairs
            if a.gradient_errors and b.gradient_errors and b.gradient_errors[0]
        ]
        ahead = sum(time > 1 for time in times)
        spans = (_span(values) for values in (times, memory, errors))
        rows.append((name, str(len(met)), str(ahead), *spans))
        behind += [
            f"hero is behind {name} in {title(case)}: {time:.2f}x."
            for (case, _), time in zip(met, times, strict=True)
            if time < 1
        ]
    if len(rows) == 1:
        return ""
    text = "**What is ahead of what**\n\n" + aligned(rows)
    return "\n".join([text, *([""] if behind else []), *map(wrapped, behind)])


def _span(values: Sequence[float]) -> str:
    """The least and the largest of some ratios."""
    if not values:
        return ""
    least, most = (f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in (min(values), max(values)))
    return f"{least}x" if least == most else f"{least}x to {most}x"


def not_measured(entries: Entries) -> str:
    """The contestants that were skipped, with the reason and the number of cases."""
    cases: dict[tuple[str, str], int] = {}
    for _, results in entries:
        for name, result in results.items():
            if result.skipped:
                key = name, result.skipped.strip().splitlines()[0]
                cases[key] = cases.get(key, 0) + 1
    if not cases:
        return ""
    lines = [
        wrapped(f"- {name} ({count} {'case' if count == 1 else 'cases'}): {reason}", "  ")
        for (name, reason), count in cases.items()
    ]
    return "\n".join(["Not measured:", "", *lines])


def wrapped(text: str, indent: str = "") -> str:
    """In lines of at most 100 columns."""
    return textwrap.fill(text, 100, subsequent_indent=indent, break_on_hyphens=False)


def machine_line(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    kernel, products = machine["kernel_instruction_set"], machine.get("bf16_products")
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    words = [f"{device}, {machine['threads']} threads, {machine['torch_instruction_set']}"]
    if kernel:
        words.append(f" (row kernel: {kernel})")
    if products:
        how = "widening" if products == "none" else products
        words.append(f", bf16 products by {how}")
    words.append(f"; {versions}; {machine['date']}, commit {machine['commit']}.")
    return wrapped("".join(words))


def updated(document: str, root: Path = ROOT) -> str:
    """The text with every table rendered from its JSON file.

    Raises:
        FileNotFoundError: a table names a file that does not exist.
    """

    def fill(block: re.Match[str]) -> str:
        session = json.loads((root / block[3]).read_text())
        text = headline(session) if block[2] == "headline" else render(session)
        return f"{block[1]}{text}{block[4]}"

    return BLOCK.sub(fill, document)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="JSON files")
    parser.add_argument("--update", type=Path, help="document whose tables to fill in")
    options = parser.parse_args()
    for path in options.results:
        print(render(json.loads(path.read_text())))
    if options.update:
        options.update.write_text(updated(options.update.read_text()))


if __name__ == "__main__":
    main()
