"""The report as one HTML file: the Markdown tables as tables, the plot inside."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

from markupsafe import Markup, escape

from hero.files import write_atomic

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left}th{background:#f3f3f3}
img{max-width:100%}pre{margin:0;overflow-x:auto}p{overflow-wrap:anywhere}"""


def write_page(text: str, image: Path | None, path: Path, title: str = "hero study") -> None:
    """Write `text` (headings, paragraphs and tables of Markdown) as a page."""
    body = Markup("\n").join(_blocks(text.splitlines()))
    shown = Markup("")
    if image is not None:
        data = base64.b64encode(image.read_bytes()).decode()
        shown = Markup('<img alt="curves" src="data:image/png;base64,{}">').format(data)
    write_atomic(path, Markup(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>{}</title><style>{}</style>"
        "<h1>{}</h1>{}{}</html>"
    ).format(title, Markup(STYLE), title, shown, body))  # fmt: skip


def _blocks(lines: list[str]) -> Iterator[Markup]:
    table: list[str] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if table:
            yield _table(table)
            table = []
        if line.startswith("    "):
            yield Markup("<pre>{}</pre>").format(line[4:])
        elif line == "---":
            yield Markup("<hr>")
        elif line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            yield Markup("<h{}>{}</h{}>").format(level, _inline(line.lstrip("# ")), level)
        elif line:
            yield Markup("<p>{}</p>").format(_inline(line))


def _table(lines: list[str]) -> Markup:
    rows = [line.strip("|").split("|") for line in lines if not set(line) <= set("|-")]
    made = []
    for number, row in enumerate(rows):
        cell = Markup("<th>{}</th>") if number == 0 else Markup("<td>{}</td>")
        made.append(Markup("").join(cell.format(_inline(text.strip())) for text in row))
    return Markup("<table>{}</table>").format(
        Markup("").join(Markup("<tr>{}</tr>").format(row) for row in made)
    )


def _inline(text: str) -> Markup:
    """Bold and code."""
    safe = str(escape(text))
    safe = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", safe)
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", safe))
