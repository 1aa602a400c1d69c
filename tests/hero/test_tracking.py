"""Run files, the final table's statistics, and the console.

Oracles: json.loads refusing NaN, for what is on disk; every possible crash, made by cutting the
file at each byte; the textbook standard error of a mean, for the bootstrap interval.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from hero.files import write_atomic
from hero.report.comparison import bootstrap_interval, compare
from hero.report.console import Console
from hero.report.tracking import MAX_TEXT, Tracker, read_jsonl
from hero.types import Diagnosis
from tests.hero.made import a_record


def strict_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [
        json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").split("\n")[:-1]
    ]


def test_long_texts_are_cut_with_a_mark(tmp_path: Path) -> None:
    long = {"instruction": "z" * 10**6, "error": "w" * 10**6}
    diagnosis = Diagnosis(turn=0, hint="h" * 10**6, failure_cause="c" * 10**6)
    record = a_record(seen="x" * 10**6, diagnoses=[diagnosis], **long)
    assert len(json.dumps(record)) < 6 * (MAX_TEXT + 50) + 2000
    seen = record["turns"][0]["observation"]
    assert seen.startswith("x" * 2000) and f"[{10**6 - MAX_TEXT} characters cut]" in seen
    assert a_record()["turns"][1]["observation"] is None


def test_lines_are_strict_json_and_nan_is_null(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "runs" / "one", "none", {}, None)
    tracker.log(1, {"loss": math.nan, "grad_norm": math.inf, "turns": 7})
    tracker.log_trajectories([a_record(divergence=[math.nan, 0.2, 0.1])])
    assert strict_lines(tmp_path / "runs/one/metrics.jsonl") == [
        {"step": 1, "loss": None, "grad_norm": None, "turns": 7}
    ]
    (record,) = strict_lines(tmp_path / "runs/one/trajectories.jsonl")
    assert record["turns"][0]["divergence"] == [None, 0.2, 0.1]
    tracker.close()


def test_a_crash_at_any_byte_loses_only_the_unfinished_line(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "none", {}, None)
    for step in range(3):
        tracker.log(step, {"loss": step / 7, "note é\u2028": 1.0})
    tracker.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        tracker = Tracker(tmp_path, "none", {}, None)
        tracker.log(99, {})
        tracker.close()
        complete = whole[:cut].count(b"\n")
        assert [line["step"] for line in strict_lines(path)] == [*range(complete), 99]


def test_lines_are_on_disk_before_close(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "none", {}, None)
    tracker.log(1, {"loss": 0.5})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    tracker.close()


def test_lines_outlast_the_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that says they are logged is on the disk: so are they, before it."""
    kept: dict[int, int] = {}
    fsync = os.fsync

    def watched(number: int) -> None:
        fsync(number)
        kept[os.fstat(number).st_ino] = os.fstat(number).st_size

    monkeypatch.setattr(os, "fsync", watched)
    tracker = Tracker(tmp_path, "none", {}, None)
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
        tracker.log_trajectories([{"update": step, "split": "train"}])
        for name in ("metrics.jsonl", "trajectories.jsonl"):
            found = (tmp_path / name).stat()
            assert kept[found.st_ino] == found.st_size > 0
    tracker.close()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "none", {}, None)
    for step in range(1, 7):
        tracker.log(step, {"loss": float(step)})
        tracker.log_trajectories([a_record(step), a_record(step)])
    tracker.log_trajectories([a_record(4, split="after")])
    tracker.close()
    tracker = Tracker(tmp_path, "none", {}, resume_at=4)
    tracker.log(5, {"loss": 50.0})
    tracker.close()
    assert [(m["step"], m["loss"]) for m in read_jsonl(tmp_path / "metrics.jsonl")] == [
        *((step, float(step)) for step in range(1, 5)),
        (5, 50.0),
    ]
    kept = [record["update"] for record in read_jsonl(tmp_path / "trajectories.jsonl")]
    assert kept == [1, 1, 2, 2, 3, 3, 4, 4]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["metrics.jsonl", "trajectories.jsonl"]


def test_lone_surrogates_do_not_stop_a_run(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "none", {}, None)
    tracker.log_trajectories([a_record(seen="broken \ud800 emoji")])
    tracker.close()
    (record,) = read_jsonl(tmp_path / "trajectories.jsonl")
    assert record["turns"][0]["observation"] == "broken \ud800 emoji"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": 1}\n{"a"\n', "line 2 is not valid JSON"), (b"[1]\n", "line 1 must be a")],
)
def test_read_jsonl_names_the_broken_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_jsonl(path)


def test_read_jsonl_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot read .*none\.jsonl: No such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_write_atomic_replaces_or_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    write_atomic(path, b"new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_holds_what_the_report_needs() -> None:
    record = a_record()
    assert json.loads(json.dumps(record)) == record
    first, second = record["turns"]
    assert first["diagnosis"] == {
        "necessary": True, "valid": False, "failure_cause": "Wrong <b>page</b>.",
        "corrected_action": "search[shirt]", "hint": "Search & look first.", "source": "rules",
    }  # fmt: skip
    assert (first["tokens"], first["divergence"]) == (["click", "<b>", "\n"], [0.0, 0.1, 5.0])
    assert (first["logprob_gap"], first["trained"]) == ([0.01, -1.0, 0.9], ["distillation"])
    assert (first["feedback_kind"], record["stop_reason"]) == ("invalid_action", "max_turns")
    assert (second["tokens"], second["trained"], second["diagnosis"]["hint"]) == (["buy"], [], "")
    assert (second["divergence"], second["observation"]) == (None, None)
    assert a_record(diagnoses=[])["turns"][0]["diagnosis"] is None


def evaluation(scores: dict[str, float], turns: float = 5.0) -> dict[str, Any]:
    per_task = {
        task: {"success": float(score >= 1), "score": score, "turns": turns}
        for task, score in scores.items()
    }
    means = {
        key: sum(row[key] for row in per_task.values()) / len(per_task)
        for key in ("success", "score", "turns")
    }
    return {**means, "per_task": per_task}


def test_compare_pairs_the_tasks() -> None:
    # Tasks differ by up to 0.8 and gain 0.1 each: only an unpaired interval would have a width.
    before = {f"t{i}": i / 10 for i in range(9)}
    after = {task: score + 0.1 for task, score in reversed(before.items())}
    success, score, turns = compare(evaluation(before, 6.0), evaluation(after, 4.5))
    assert (success.label, score.label, turns.label) == ("success %", "score", "average turns")
    assert score.difference == pytest.approx(0.1)
    assert score.interval == pytest.approx((0.1, 0.1))
    assert (turns.before, turns.after, turns.interval) == (6.0, 4.5, (-1.5, -1.5))
    assert success.before == success.after == 0.0


def test_bootstrap_interval_agrees_with_the_standard_error() -> None:
    values = [random.Random(seed).gauss(0.2, 1.0) for seed in range(400)]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)
    assert (low, high) == bootstrap_interval(values)


def test_compare_without_figures_for_each_task_has_no_interval() -> None:
    (row,) = compare({"success": 0.25, "score": None}, {"success": 0.5, "score": 0.1})
    assert (row.before, row.after, row.interval) == (25.0, 50.0, None)


def test_compare_refuses_different_tasks() -> None:
    with pytest.raises(ValueError, match=r"same tasks, got 2 and 1; only one of them has b\."):
        compare(evaluation({"a": 1.0, "b": 0.0}), evaluation({"a": 1.0}))


UPDATE = {"rewards/mean": 0.412, "rollout/success": 0.38, "reflection/non_empty_rate": 0.62}


def show_a_run(console: Console) -> None:
    facts = {"model": "tiny-shop (1.2M parameters)", "reflector": "rules: http://me:pw@host/v1"}
    console.header("hero train quickstart", facts)
    with console.training(total=12, done=3):
        for step in (4, 5, 12):
            console.stage("rollout")
            console.update(step, {**UPDATE, "seconds/rollout": 2.0, "seconds/train": 1.5})
    console.final_table(evaluation({"a": 0.0, "b": 0.0}), evaluation({"a": 1.0, "b": 1.0}))
    console.say("task [/bold] at http://me:pw@host/?api_key=abc is unknown")


def test_logs_are_plain_and_have_one_line_an_update() -> None:
    out = io.StringIO()
    show_a_run(Console(out))
    text = out.getvalue()
    assert text.isascii() and "\x1b" not in text
    assert all(len(line) <= 100 for line in text.splitlines())
    updates = [line for line in text.splitlines() if line.startswith("update ")]
    assert updates[0] == "update  4/12  reward 0.41  success 38%  hints 62%  3.5 s"
    assert len(updates) == 3
    for part in (
        "tiny-shop (1.2M parameters)",
        "rules: http://***@host/v1",
        "+100.0",
        "[+100.0, +100.0]",
    ):
        assert part in text
    assert "task [/bold] at http://***@host/?api_key=*** is unknown\n" in text


def test_a_terminal_gets_a_bar_and_a_table() -> None:
    out = io.StringIO()
    show_a_run(Console(out, terminal=True))
    text = out.getvalue()
    assert "\x1b[" in text and "12/12" in text and "0.41" in text
    assert "[/bold]" in text and "pw@" not in text
