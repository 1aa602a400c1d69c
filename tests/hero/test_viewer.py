"""The report. Oracle: the page as html.parser and xml.etree, which know nothing of it, read it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hero.config import TrainConfig
from hero.report.tracking import Tracker
from hero.report.viewer import render
from tests.hero.made import ATTACK, a_record


class Page(HTMLParser):
    """Elements (tag, attributes, own text) in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in ("meta", "input"):
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        while self.elements[self.open.pop()][0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.elements[self.open[-1]][2].append(data)

    def find(self, tag: str, css: str = "") -> list[tuple[dict[str, str | None], str]]:
        return [
            (attrs, "".join(text))
            for name, attrs, text in self.elements
            if name == tag and (not css or css in (attrs.get("class") or "").split())
        ]


def a_run(path: Path, records: list[dict[str, Any]]) -> Path:
    tracker = Tracker(path, "none", {}, None)
    tracker.log(0, {"dev/success": 0.2, "dev/turns": 9.0})
    for step in (1, 2, 3):
        values = {
            "rewards/mean": 0.1 * step,
            "divergence/error_turns": 0.2,
            "divergence/clean_turns": 0.02,
        }
        tracker.log(step, {**values, "grad_norm": math.nan if step == 2 else 1.5})
    for record in records:
        tracker.log_trajectories([record])
    tracker.close()
    per_task = {"t": {"success": 0.2, "score": 0.25, "turns": 9.0}}
    gained = {"t": {"success": 0.7, "score": 0.75, "turns": 6.5}}
    summary = {
        "before": {**per_task["t"], "per_task": per_task},
        "after": {**gained["t"], "per_task": gained},
        "reflector": "rules",
        "reflector_reason": "the model is too small",
        "recipe": "my <recipe>",
        "seconds": 125.0,
        "versions": {"torch": "2.13.0"},
        "stopped": "all updates made",
        "device": "cpu",
    }
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.json").write_text(json.dumps(asdict(TrainConfig())))
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return a_run(tmp_path / "run", [a_record(0, "before"), a_record(2), a_record(3, "after")])


def read(path: Path) -> str:
    return path.read_text("utf-8")


def test_texts_are_data(tmp_path: Path) -> None:
    page = Page(read(render(a_run(tmp_path, [a_record(1, instruction=ATTACK)]))))
    assert not page.find("img")
    assert len(page.find("script")) == 1
    assert page.find("pre", "observation")[0][1] == ATTACK
    assert page.find("p", "task")[0][1] == ATTACK
    assert page.find("h1")[0][1] == "my <recipe>"
    assert "<b>" in [text for _, text in page.find("span", "tok")]


def test_the_file_stands_alone(run_dir: Path) -> None:
    html = read(render(run_dir))
    assert (
        "http:" not in html
        and "https:" not in html
        and "@import" not in html
        and "url(" not in html
    )
    for tag, attrs, _ in Page(html).elements:
        assert tag not in ("link", "img", "iframe", "object", "embed"), tag
        assert not {"src", "href", "srcset"} & set(attrs), (tag, attrs)


def test_the_header_and_the_table(run_dir: Path) -> None:
    out = render(run_dir)
    assert out == run_dir / "report.html"
    page = Page(read(out))
    facts = [text for _, text in page.find("dd")]
    for value in ("hero", "tiny-shop", "shop", "jsd", "frozen", "rules", "2 min 5 s",
                  "torch 2.13.0"):  # fmt: skip
        assert value in facts
    cells = " ".join(text.strip() for tag in ("td", "b") for _, text in page.find(tag))
    for value in ("20.0", "70.0", "+50.0", "+50.0 to +50.0", "0.750", "-2.5"):
        assert value in cells


def test_tokens_are_coloured_by_divergence_and_underlined_by_gap(run_dir: Path) -> None:
    tokens = [
        item for item in Page(read(render(run_dir))).find("span", "tok") if "title" in item[0]
    ]
    calm, down, up = tokens[:3]
    assert calm == (
        {
            "class": "tok",
            "style": "--d:0.00",
            "tabindex": "0",  # so that a tap or a key shows the title
            "title": "divergence 0.000 nats; teacher finds it 1 times as likely (+0.01 nats)",
        },
        "click",
    )
    assert (
        down[0]["class"] == "tok down"
        and down[0]["style"] == f"--d:{math.sqrt(0.1 / math.log(2)):.2f}"
    )
    assert up[0]["class"] == "tok up" and up[0]["style"] == "--d:1.00"
    assert up[1] == "↵\n"


def test_diagnoses_and_masked_turns(run_dir: Path) -> None:
    page = Page(read(render(run_dir)))
    diagnoses = [text for _, text in page.find("dd")]
    assert "Search & look first." in diagnoses and "Wrong <b>page</b>." in diagnoses
    assert "search[shirt]" in [text for _, text in page.find("code")]
    # Of three episodes only the one in training has a turn that was left out of training.
    assert len(page.find("li", "masked")) == 1
    assert [text for _, text in page.find("span", "chip") if "trained" in text] == [
        "no hint: not trained"
    ]


def test_filters_know_split_and_outcome(run_dir: Path) -> None:
    episodes = [attrs for attrs, _ in Page(read(render(run_dir))).find("details", "episode")]
    kinds = {(e["data-split"], e["data-success"]) for e in episodes}
    assert kinds == {("before", "no"), ("train", "no"), ("after", "yes")}
    assert episodes[0]["data-split"] == "train" and "open" in episodes[0]
    assert sum("open" in e for e in episodes) == 1


def test_the_most_disputed_training_episode_comes_first(tmp_path: Path) -> None:
    calm: dict[str, Any] = {"divergence": [0.01] * 3}
    records = [a_record(1, **calm), a_record(2), a_record(3, **calm), a_record(4, "after")]
    page = Page(read(render(a_run(tmp_path, records))))
    assert re.findall(r"episode (e\d)", " ".join(t for _, t in page.find("p", "note"))) == [
        "e2",
        "e4",
        "e3",
        "e1",
    ]


def test_only_200_episodes_with_a_share_for_each_split(tmp_path: Path) -> None:
    records = [a_record(0, "before") for _ in range(5)] + [a_record(u) for u in range(1, 231)]
    html = read(render(a_run(tmp_path, records)))
    page = Page(html)
    splits = [attrs["data-split"] for attrs, _ in page.find("details", "episode")]
    assert (splits.count("before"), splits.count("train")) == (5, 195)
    assert "35 older episodes are left out" in html
    assert "episode e230 " in html and "episode e36 " in html and "episode e35 " not in html


def test_grpo_has_no_teacher_to_explain(tmp_path: Path) -> None:
    path = a_run(tmp_path, [a_record(divergence=(), diagnoses=())])
    (path / "config.json").write_text(json.dumps({"mode": "grpo"}))
    html = read(render(path))
    assert "The redder a token" not in html and "no hint" not in html and "not trained" in html


@pytest.mark.parametrize("case", ["no folder", "empty folder", "empty files"])
def test_nothing_to_show_is_an_error(tmp_path: Path, case: str) -> None:
    path = tmp_path / "run"
    if case != "no folder":
        path.mkdir()
    if case == "empty files":
        Tracker(path, "none", {}, None).close()
    with pytest.raises(ValueError, match=r"holds nothing to show: expected lines in metrics.jsonl"):
        render(path)


@pytest.mark.parametrize("present", ["metrics.jsonl", "trajectories.jsonl"])
def test_a_run_that_has_not_finished(run_dir: Path, tmp_path: Path, present: str) -> None:
    part = tmp_path / "part"
    part.mkdir()
    (part / present).write_bytes((run_dir / present).read_bytes() + b'{"half')
    page = Page(read(render(part, tmp_path / "out.html")))
    assert page.find("h1")[0][1] == "part"
    notes = " ".join(text for _, text in page.find("p", "note"))
    assert "has not finished" in notes
    assert (
        ("No episodes were kept" in notes)
        == (present == "metrics.jsonl")
        == bool(page.find("figure"))
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", "summary.json is not valid JSON"),
        ("config.json", "[]", "config.json must hold a JSON object, got list"),
        (
            "trajectories.jsonl",
            '{"update": 1, "split": "train", "turns": []}\n',
            "lacks the field 'id'",
        ),
    ],
)
def test_broken_files_are_named(run_dir: Path, name: str, content: str, message: str) -> None:
    (run_dir / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        render(run_dir)


def test_nan_and_surrogates_are_shown_as_unknown(tmp_path: Path) -> None:
    record = a_record(
        divergence=[math.nan, 0.1, 0.2], tokens=["a\ud800", "b", "c", "d"], reward=math.nan
    )
    page = Page(read(render(a_run(tmp_path, [record]))))
    first = page.find("pre", "action")
    assert first and "nan" not in read(tmp_path / "report.html").lower()
    assert "style" not in page.find("span", "tok")[-4][0]
    assert "mean divergence 0.150 nats" in [text for _, text in page.find("span", "mean")]


@pytest.mark.parametrize(("best", "said"), [(0, "0: training did not help"), (4, "4")])
def test_the_header_says_what_the_run_hangs_on(run_dir: Path, best: int, said: str) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").write_text(json.dumps(summary | {"best_update": best}))
    env = {"name": "shop", "options": {"profile": "tiny"}}
    config = {"seed": 7, "optim": {"learning_rate": 0.25}, "env": env}
    (run_dir / "config.json").write_text(json.dumps(config))
    probe = {"student_right": 0.1, "teacher_right": 0.6, "teacher_lift": 0.5}
    line = {f"probe/{key}": value for key, value in probe.items()}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 0, "probe/diagnosis_agreement": 0.9} | line) + "\n")
    facts = [text for _, text in Page(read(render(run_dir))).find("dd")]
    for value in (said, "shop profile=tiny", "7", "0.25", "90% of turns"):
        assert value in facts
    assert "10% without hindsight, 60% with it: a lift of +0.50" in facts
