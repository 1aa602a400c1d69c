"""Charts of the report. Oracle: xml.etree, which knows nothing of them, reads the SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hero.report.charts import Chart, _ticks, draw

METRICS = [
    {"step": s, "a": v, "odd": "x"} for s, v in ((1, 0.0), (2, 1.0), (3, None), (4, 4.0), (4, 2.0))
]


def test_a_chart_is_well_formed_and_to_scale() -> None:
    svg = draw(Chart("T <1>", {"a": "A & B", "gone": "gone"}), METRICS)
    assert svg is not None
    figure = ElementTree.fromstring(svg)
    (path,) = [e for e in figure.iter("path") if (e.get("class") or "").startswith("line")]
    points = [tuple(map(float, p.split())) for p in path.attrib["d"].removeprefix("M").split("L")]
    (x1, y1), (x2, y2), (x4, y4) = points  # step 3 is unknown; step 4 counts as logged last
    assert (x4 - x1) == pytest.approx(3 * (x2 - x1), abs=0.2)
    assert (y1 - y4) == pytest.approx(2 * (y1 - y2), abs=0.2) and y4 < y2 < y1
    assert [e.text for e in figure.iter("title")][-1] == "A & B, update 4: 2"
    assert "gone" not in svg


def test_the_best_update_is_marked_where_it_is() -> None:
    metrics = [{"step": step, "v": float(step)} for step in range(5)]
    svg = str(draw(Chart("t", {"v": "v"}), metrics, best=3))
    [place] = re.findall(r'class="best" d="M([\d.]+) ', svg)
    marks = re.findall(r'<circle class="mark s1" cx="([\d.]+)"', svg)
    assert place == marks[3]
    assert "best" not in str(draw(Chart("t", {"v": "v"}), metrics))


def test_a_chart_without_values_is_left_out() -> None:
    assert draw(Chart("T", {"gone": "gone"}), METRICS) is None


@given(st.floats(-1e30, 1e30), st.floats(0, 1e30))
@example(0.0, 5e-324)
@example(1e20, 0.0)
def test_ticks_are_round_and_enclose(low: float, width: float) -> None:
    ticks = _ticks(low, low + width)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * max(step, abs(low), 1e-9)
    assert ticks[0] <= low + slack and ticks[-1] >= low + width - slack
    assert 2 <= len(ticks) <= 7
