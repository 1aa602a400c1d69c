"""From a session's files to what the package does on a GPU; the session is written by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from test_benchmarks import MACHINE

from benchmarks import settle
from benchmarks.shapes import Case

ROOT = Path(__file__).resolve().parents[1]


def session(*cases: dict[str, float | None]) -> dict[str, Any]:
    """One round a case: seconds by contestant, None for one that could not run."""
    entries = []
    for number, times in enumerate(cases):
        results = {
            name: {"skipped": "not built"} if time is None else {"seconds": [time]}
            for name, time in {**times, "library-gemms": 1.0, "own-gemms": 1.0}.items()
        }
        entries.append({"case": vars(Case("tiny", 64 + number)), "results": results})
    return {"machine": {**MACHINE, "device": "NVIDIA H100"}, "cases": entries}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    tables = re.findall(r"<!-- results: (\S+)", (ROOT / "docs" / "benchmarks.md").read_text())
    for path in ("hero_kernels/backends.py", "docs/benchmarks.md", *tables):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def write(checkout: Path, comparison: dict[str, Any]) -> Path:
    folder = checkout / "benchmarks" / "results" / "gpu"
    folder.mkdir()
    (folder / "comparison.json").write_text(json.dumps(comparison))
    (folder / "benchmark.json").write_text(json.dumps(session({"hero": 3.0, "eager": 12.0})))
    return folder


def auto(checkout: Path) -> str:
    text = (checkout / "hero_kernels" / "backends.py").read_text()
    return re.findall(r"^AUTO = (.*)$", text, re.MULTILINE)[0]


def test_cuda_is_taken_first_if_it_is_faster_on_average(checkout: Path) -> None:
    cases = session(
        {"hero-triton": 2.0, "hero-cuda": 1.0},
        {"hero-triton": 2.0, "hero-cuda": None},
        {"hero-triton": 1.0, "hero-cuda": 1.28},
    )
    assert settle.settle(write(checkout, cases), checkout) == pytest.approx(1.25)
    assert auto(checkout) == '("torch", "cpu", "triton", "cuda")'
    compile((checkout / "hero_kernels" / "backends.py").read_text(), "backends.py", "exec")


def test_triton_alone_stays_if_it_is_not(checkout: Path) -> None:
    cases = session({"hero-triton": 1.0, "hero-cuda": 2.0}, {"hero-triton": 3.0, "hero-cuda": 2.0})
    assert settle.settle(write(checkout, cases), checkout) < 1
    assert auto(checkout) == '("torch", "cpu", "triton")'


def test_results_outside_of_the_checkout_are_refused(checkout: Path) -> None:
    folder = write(checkout, session({"hero-triton": 1.0, "hero-cuda": 2.0}))
    with pytest.raises(ValueError, match=r"is not in the checkout .* copy it to benchmarks"):
        settle.settle(folder, checkout / "another")


def test_the_tables_stand_in_the_document_once(checkout: Path) -> None:
    cases = session({"hero": 1.0, "hero-triton": 1.0, "hero-cuda": 2.0})
    folder = write(checkout, cases)
    settle.settle(folder, checkout)
    once = (checkout / "docs" / "benchmarks.md").read_text()
    assert "nothing has been measured" not in once and "has run on a GPU yet" not in once
    assert "The targets for an H100" in once
    assert re.search(r"\| eager +\| 12000\* +\| +4\.00x", once)
    settle.settle(folder, checkout)
    assert (checkout / "docs" / "benchmarks.md").read_text() == once


def test_what_a_session_makes_untrue_is_found(checkout: Path) -> None:
    (checkout / "README.md").write_text("one\n**Not measured:** anything on a GPU.\n")
    (checkout / "hero_kernels" / "rows.py").write_text('"""It has not run on a GPU yet."""\n')
    found = [line.split(": ")[0] for line in settle.untrue(checkout)]
    assert "README.md:2" in found and "hero_kernels/rows.py:1" in found


def test_nothing_to_compare_changes_nothing(checkout: Path) -> None:
    folder = write(checkout, session({"hero-triton": 1.0, "hero-cuda": None}))
    before = auto(checkout)
    with pytest.raises(ValueError, match=r"No case .* run `bash benchmarks/gpu_session.sh` on"):
        settle.settle(folder, checkout)
    assert auto(checkout) == before
