"""The tables of docs/experiments.md, from the files under benchmarks/results/.

python -m benchmarks.experiments.tables [--write]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments import column_skipping, fp8_delta

PAGE = Path(__file__).resolve().parents[2] / "docs" / "experiments.md"
MAIN, CHUNK = "SmolLM2, hint", 256
ELSEWHERE = (("row", 1e-4), ("mass", 1e-3))


def skipping_errors(result: dict[str, Any]) -> str:
    """Every rule and threshold on the main case, errors for chunks of 256 rows."""
    rows = [
        row
        for row in result["errors"]["rows"]
        if (row["states"], row["divergence"]) == (MAIN, "jsd")
    ]
    shares = {(row["rule"], row.get("threshold"), row.get("chunk")): row["share"] for row in rows}
    lines = []
    for row in rows:
        if row.get("chunk", CHUNK) == CHUNK:
            key = row["rule"], row.get("threshold")
            kept = [shares.get((*key, chunk), 1.0) for chunk in column_skipping.CHUNKS]
            lines.append([*_setting(row), *map(_percent, kept), *_errors(row)])
    heads = [f"kept, {chunk} rows" for chunk in column_skipping.CHUNKS]
    return _table(["rule", "threshold", *heads, *ERRORS.values()], lines)


def skipping_elsewhere(result: dict[str, Any]) -> str:
    """Two settings on every case, chunks of 256 rows."""
    lines = []
    for row in result["errors"]["rows"]:
        chosen = (row["rule"], row.get("threshold")) in ELSEWHERE and row["chunk"] == CHUNK
        if row["rule"] == "none" or chosen:
            case = [row["states"], row["divergence"], f"{row['loss']:.2g}", *_setting(row)]
            lines.append([*case, _percent(row["share"]), *_errors(row)])
    heads = ["states", "divergence", "value", "rule", "threshold", "kept"]
    return _table([*heads, *ERRORS.values()], lines)


def skipping_times(result: dict[str, Any]) -> str:
    """Milliseconds, and how many times those of the whole products."""
    rows = result["times"]["rows"]
    dense = {(r["states"], r["chunk"]): r["total_ms"] for r in rows if r["rule"] == "none"}
    lines = []
    for row in rows:
        stages = row["stages_ms"]
        parts = [
            f"{stages[part]:.0f}" if part in stages else ""
            for part in ("choice", "gather", "products", "scatter")
        ]
        ratio = row["total_ms"] / dense[row["states"], row["chunk"]]
        line = [row["states"], str(row["chunk"]), *_setting(row), _percent(row["share"])]
        lines.append([*line, *parts, f"{row['total_ms']:.0f}", f"{ratio:.2f}"])
    heads = ["states", "rows", "rule", "threshold", "kept", "choice", "gather", "products"]
    return _table([*heads, "scatter", "all, ms", "times whole"], lines)


def fp8_errors(result: dict[str, Any]) -> str:
    """Error of dX by operand for the forward KL, one line for each distance."""
    kinds = ["library", *fp8_delta.OPERANDS, "products"]
    cases: dict[tuple[str, float], dict[str, float]] = {}
    for row in result["rows"]:
        if row["divergence"] == "forward_kl":
            found = cases.setdefault((row["states"], row["value"]), {})
            found[row["operands"]] = row["dX"]
    lines = [
        [states, f"{value:.1e}", *(_percent(found[kind]) for kind in kinds)]
        for (states, value), found in cases.items()
    ]
    return _table(["states", "forward KL", *kinds], lines)


ERRORS = {
    "dX": "dX",
    "dX_centred": "dX, centred",
    "dX_centred_worst_row": "its worst row",
    "dW": "dW",
    "adam_error": "Adam's first step",
}
TABLES: dict[str, tuple[Path, Callable[[dict[str, Any]], str]]] = {
    "skipping-errors": (column_skipping.RESULTS, skipping_errors),
    "skipping-elsewhere": (column_skipping.RESULTS, skipping_elsewhere),
    "skipping-times": (column_skipping.RESULTS, skipping_times),
    "fp8": (fp8_delta.RESULTS, fp8_errors),
}
"""By the name in the page's markers."""


def filled(page: str) -> str:
    """The page with each table between its markers."""
    for name, (path, render) in TABLES.items():
        text = render(json.loads(path.read_text(encoding="utf-8")))
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, rf"\g<1>{text}\n\g<2>", page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"The page has {count} tables {name!r}; expected 1.")
    return page


def _setting(row: dict[str, Any]) -> list[str]:
    return [row["rule"], f"{row['threshold']:.0e}" if row.get("threshold") else ""]


def _errors(row: dict[str, Any]) -> list[str]:
    return [_percent(row[name]) for name in ERRORS]


def _percent(value: float) -> str:
    percent = 100 * value
    if percent >= 9.95:
        return f"{percent:.0f} %"
    return f"{percent:.1f} %" if percent >= 0.995 else f"{percent:.2f} %"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|" + "---|" * len(heads)
    return "\n".join(
        ["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="into the page, not to the terminal")
    page = filled(PAGE.read_text(encoding="utf-8"))
    if parser.parse_args().write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
