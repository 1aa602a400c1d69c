"""The probe before training: the gap, its advice, the page with examples. Oracles: by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from hero.evaluation import Answer, Probe
from hero.probe import advice
from hero.report.probe import page, silent_groups
from hero.study.page import write_page
from hero.types import Trajectory


def a_gap(teacher: float, *answers: Answer) -> Probe:
    return Probe(
        turns=10, share=0.5, student_right=0.2, teacher_right=teacher, answers=list(answers),
        diagnosis_agreement=1.0, success=0.5, well_formed=1.0,
    )  # fmt: skip


def test_the_gap_counts_the_turns_that_are_trained() -> None:
    assert a_gap(0.8).gap == pytest.approx(0.3) and a_gap(0.8).lift == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ({"rules": a_gap(0.8), "empty": a_gap(0.3)}, "Worth distilling: rules"),
        ({"rules": a_gap(0.5), "empty": a_gap(0.6)}, "No context helps more than a control"),
        ({"rules": a_gap(0.1)}, "nothing to distil"),
    ],
)
def test_advice_compares_with_the_controls(gaps: dict[str, Probe], said: str) -> None:
    assert said in " ".join(advice(0.1, 1.0, 0.5, gaps))


def test_advice_asks_for_a_warm_start() -> None:
    assert "warm start" in " ".join(advice(0.0, 0.1, 1.0, {}))
    assert "too many" in advice(0.0, 1.0, 1.0, {})[-1]


def test_the_page_shows_what_was_answered_again(tmp_path: Path) -> None:
    answer = Answer(
        saw="page | options", acted="buy", hindsight="| hint\nnot yet", student="buy",
        teacher="<b>",
        student_right=False, teacher_right=True,
    )  # fmt: skip
    gaps = {"rules": a_gap(0.8, answer)}
    write_page("\n".join(page("model:\n  success 1%", gaps)), None, tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert "<pre>  success 1%</pre>" in text and "<h2>Examples: rules</h2>" in text
    assert "<p><b>The teacher reads besides:</b> | hint not yet</p>" in text
    assert "without it (wrong):</b> buy" in text and "With it (right):</b> &lt;b&gt;" in text


def test_groups_without_signal(played: list[Trajectory]) -> None:
    # task-0 has rewards 0 and 1, task-1 too; paid alike, both say nothing.
    assert silent_groups(played, "score") == 0.0
    assert silent_groups(played[::2], "success") == 1.0
