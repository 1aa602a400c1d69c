"""Callbacks, and the folder of the best weights. Oracles: the files of the run itself, YAML, and
huggingface_hub's own reading of a model card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from short_runs import settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from hero.callbacks import Callback
from hero.config import redacted
from hero.report.tracking import read_jsonl
from hero.trainer import Trainer


class Heard(Callback):
    """Writes every call down, and gives each diagnosis it hears of a hint."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_start(self, trainer: Any) -> None:
        self.calls.append(("start", trainer.state.update))

    def on_episodes(self, update: int, trajectories: Any, diagnoses: Any) -> None:
        self.calls.append(("episodes", update))
        assert len(trajectories) == len(diagnoses) > 0
        for trajectory, rows in zip(trajectories, diagnoses, strict=True):
            assert len(rows) == len(trajectory.turns)
            for row in rows:
                row.hint = ""

    def on_update(self, update: int, metrics: Any) -> None:
        self.calls.append(("update", update, metrics["loss"]))

    def on_evaluation(self, update: int, trajectories: Any, metrics: Any) -> None:
        self.calls.append(("evaluation", update, len(trajectories), metrics["dev/success"]))

    def on_end(self, summary: Any) -> None:
        self.calls.append(("end", summary["stopped"]))


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_five_hooks_hear_a_run_and_may_change_what_is_learnt(
    model_path: Path, tmp_path: Path
) -> None:
    heard, functions = Heard(), []
    config = settings(model_path, max_idle_updates=0, loss={"turns": "hinted"})
    run = Trainer(config, tmp_path, callbacks=[heard, lambda n, metrics: functions.append(n)])
    summary = run.run()
    assert [call[:2] for call in heard.calls] == [
        ("start", 0), ("evaluation", 0), ("episodes", 1), ("update", 1), ("episodes", 2),
        ("evaluation", 2), ("update", 2), ("episodes", 3), ("update", 3), ("episodes", 4),
        ("evaluation", 4), ("update", 4), ("end", summary["stopped"]),
    ]  # fmt: skip
    assert functions == [1, 2, 3, 4]
    lines = {line["step"]: line for line in read_jsonl(tmp_path / "metrics.jsonl")}
    for kind, *said in heard.calls:
        if kind == "update":
            assert said[1] == lines[said[0]]["loss"] == 0.0  # every hint was taken away
        if kind == "evaluation":
            assert said[1:] == [4, lines[said[0]]["dev/success"]]


@pytest.mark.parametrize("given", [Heard, 3])
def test_what_is_no_callback_is_refused(given: Any, model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="A callback is an object of a class derived from"):
        Trainer(settings(model_path), tmp_path, callbacks=[given])


@pytest.mark.parametrize("select", ["best", "last"])
def test_the_selected_folder_can_be_uploaded_as_it_is(
    select: str, model_path: Path, tmp_path: Path
) -> None:
    config = settings(model_path, updates=2, eval={"select": select})
    summary = Trainer(config, tmp_path / "run").run()
    folder = tmp_path / "run" / ("best" if select == "best" else "selected")
    header, body = front_matter(folder)
    [result] = ModelCard.load(folder / "README.md").data.eval_results[:1]
    assert result.task_type == "text-generation" and result.dataset_name == "shop, test tasks"
    assert header["library_name"] == "transformers" and "base_model" not in header
    [found] = header["model-index"][0]["results"]
    values = {metric["type"]: metric["value"] for metric in found["metrics"]}
    assert values == pytest.approx(
        {name: summary["after"][name] for name in ("success", "score", "turns")}, abs=1e-6
    )
    [shown] = re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)
    assert yaml.safe_load(shown) == json.loads(json.dumps(redacted(config)))
    [code] = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    names: dict[str, Any] = {"FOLDER": folder}
    exec(code, names)
    assert isinstance(names["model"], AutoModelForCausalLM.from_pretrained(folder).__class__)
    assert names["tokenizer"].get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_a_run_that_is_under_way_has_a_card_of_its_dev_tasks(
    model_path: Path, tmp_path: Path
) -> None:
    config = settings(model_path, updates=1, eval={"test_tasks": 0})
    config.reflection.base_url = "http://me:s3cret@host/v1"
    Trainer(config, tmp_path).run()
    header, body = front_matter(tmp_path / "best")
    [found] = header["model-index"][0]["results"]
    assert found["dataset"]["name"] == "shop, dev tasks"
    assert "s3cret" not in body and "| dev |" in body and "| test" not in body
