"""Tasks as rows of a file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPLITS = ("test", "dev", "train")


def read_rows(path: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of each split: that of a row's `split`, else each tenth row is test, the next one dev.

    Raises:
        ValueError: the file cannot be read, a row is not an object, or its split is unknown.
    """
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"data={path!r} cannot be read as JSON lines: {error}") from error
    for number, row in enumerate(found):
        if not isinstance(row, dict):
            raise ValueError(f"data={path!r}, row {number + 1}: expected an object, got {row!r}.")
        split = row.pop("split", None) or SPLITS[min(number % 10, 2)]
        if split not in SPLITS:
            raise ValueError(f"data={path!r}, row {number + 1}: split {split!r} is unknown.")
        rows[split].append(row)
    return rows
