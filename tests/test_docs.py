"""The Python examples of the documentation run, page by page, top to bottom, on a CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if BLOCK.search(page.read_text(encoding="utf-8"))
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page.stem}
    for match in BLOCK.finditer(text):
        line = text[: match.start(1)].count("\n")
        source = "\n" * line + match[1]  # errors name the line of the page
        exec(compile(source, str(page), "exec"), names)


def test_the_tables_of_scaling_are_what_its_code_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    [code] = BLOCK.findall(text)
    exec(code, {})
    assert capsys.readouterr().out in text
