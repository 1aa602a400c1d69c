"""`hero eval` and `hero compare` as a user types them: folders, interruptions, what is said."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hero.cli import main
from hero.envs.shop import ShopEnv
from hero.evaluated import read_evaluated
from hero.evaluation import summarise_figures
from hero.files import only_writer
from hero.report.comparison import Comparison, compare
from hero.report.tracking import read_jsonl
from hero.report.viewer import render
from tests.hero.short_runs import Countdown, settings, trainer

CAPS = ["--rollout.max-turns", "2", "--rollout.max-turn-tokens", "4", "--rollout.batch-size", "2",
        "--device", "cpu"]  # fmt: skip
SHOP = ["--env.name", "shop", "--env.options", "profile", "tiny"]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_several_models_and_what_stands_in_their_folders(
    here: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "other").symlink_to(model_path)
    words = ["eval", str(model_path), "other", *SHOP, *CAPS, "--tasks", "3", "--trials", "2"]
    assert main([*words, "--output", "out"]) == 0
    text = said(capsys)
    assert "success %" in text and "pass@2 %" in text and "pass^2 %" in text and "seconds" in text
    for folder in (here / "out").iterdir():
        result = json.loads((folder / "eval.json").read_text())
        episodes = read_jsonl(folder / "episodes.jsonl")
        assert len(episodes) == 6 and len(result["per_task"]) == 3
        again = summarise_figures([(e["task_id"], e["figures"]) for e in episodes]).to_dict()
        assert json.loads(json.dumps(again)).items() <= result.items()
        assert result["seconds"] == pytest.approx(sum(e["seconds"] for e in episodes))
    assert main(["compare", "out/other", "other", *SHOP, *CAPS, "--tasks", "3", "--trials", "2",
                 "--output", "out"]) == 0  # fmt: skip
    assert "not played with the same settings" not in said(capsys)
    page = (here / "out" / "compare.html").read_text()
    assert page.count('class="episode"') == 12 and "search[" not in page.split("<main>")[0]
    # A phone shows no head of a table: each cell says its column.
    columns = re.findall("<th>([^<]+)</th>", page)
    labels = re.findall('<td data-label="(.+?)"', page)
    assert labels == columns * (page.count("<td") // len(columns)) and len(columns) == 5


def test_two_evaluations_in_one_folder_and_settings_of_another_program(
    here: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both would write their episodes, and each would count twice."""
    (here / "m").symlink_to(model_path)
    words = ["eval", "m", *SHOP, *CAPS, "--tasks", "2", "--output", "out"]
    assert main(words) == 0
    (here / "out" / "m" / "eval.json").unlink()
    before = (here / "out" / "m" / "episodes.jsonl").read_bytes()
    with only_writer(here / "out" / "m", "hero eval", "--output"):
        assert main(words) == 1
    assert f"written by another hero eval (process {os.getpid()} on" in said(capsys)
    assert (here / "out" / "m" / "episodes.jsonl").read_bytes() == before
    (here / "out" / "m" / "settings.json").write_text("[1]")
    assert main(words) == 1
    assert "Cannot read" in said(capsys)


def test_an_interrupted_evaluation_goes_on(
    here: Path, model_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    world = ["--env.name", f"{Countdown.__module__}:Countdown", *SHOP[2:]]
    words = ["eval", str(model_path), *world, *CAPS, "--tasks", "6", "--output", "out"]
    monkeypatch.setattr(Countdown, "steps_left", 6)  # in the second batch
    assert main(words) == 130
    assert "the same command goes on with them" in said(capsys)
    [folder] = (here / "out").iterdir()
    kept = read_jsonl(folder / "episodes.jsonl")
    assert 0 < len(kept) < 6 and not (folder / "eval.json").exists()
    assert main(["compare", str(folder), str(folder)]) == 1
    assert "is not finished: run the same hero eval again" in said(capsys)
    with (folder / "episodes.jsonl").open("ab") as file:
        file.write(b'{"half a line')
    monkeypatch.setattr(Countdown, "steps_left", 10**9)
    assert main(words) == 0
    episodes = read_jsonl(folder / "episodes.jsonl")
    assert episodes[: len(kept)] == kept and len(episodes) == 6
    assert main([*words[:-1], "whole"]) == 0
    [whole] = (here / "whole").iterdir()
    acted = [
        {e["id"]: [turn["action_text"] for turn in e["turns"]] for e in read_jsonl(path)}
        for path in (folder / "episodes.jsonl", whole / "episodes.jsonl")
    ]
    assert acted[0] == acted[1] and len(acted[0]) == 6
    assert main([*words, "--seed", "1"]) == 1
    assert "seed: 0 there, 1 here" in said(capsys)


class Rough(ShopEnv):
    """Steps fail in some tasks, as of an endpoint that is down for a while."""

    down: frozenset[str] = frozenset()

    def reset(self, task_id: str) -> Any:
        self.present = task_id
        return super().reset(task_id)

    def step(self, text: str) -> Any:
        if self.present in self.down:
            raise OSError("unreachable")
        return super().step(text)


def test_broken_episodes_are_played_again_and_the_bound_is_over_all(
    here: Path, model_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tasks = ShopEnv("tiny").tasks("dev")[:4]
    words = ["eval", str(model_path), "--env.name", f"{__name__}:Rough", *SHOP[2:], *CAPS]
    words += ["--tasks", "4", "--split", "dev", "--output", "out"]
    monkeypatch.setattr(Rough, "down", frozenset(tasks[:3]))
    assert main(words) == 1
    text = said(capsys)
    assert "3 of 4 episodes of a batch failed" in text and "goes on with them" in text
    [folder] = (here / "out").iterdir()
    monkeypatch.setattr(Rough, "down", frozenset(tasks[:1]))
    assert main(words) == 0  # of three played one fails, of all four a quarter
    episodes = read_jsonl(folder / "episodes.jsonl")
    assert sorted(e["task_id"] for e in episodes) == sorted(tasks)
    assert [e["task_id"] for e in episodes if e["figures"]["error"]] == tasks[:1]
    assert json.loads((folder / "eval.json").read_text())["error"] == 0.25
    before = (folder / "episodes.jsonl").read_bytes()
    assert main(words) == 0 and (folder / "episodes.jsonl").read_bytes() == before
    assert {(e["split"], e["update"]) for e in episodes} == {("dev", None)}
    assert main(["compare", str(folder), str(folder), "--output", "page"]) == 0
    page = (here / "page" / "compare.html").read_text()
    assert "dev task" in page and "dev training" not in page


class Stuck(ShopEnv):
    """Cannot be closed."""

    def close(self) -> None:
        raise OSError("stuck")


def test_what_cannot_be_closed_loses_no_result(
    here: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(model_path), "--env.name", f"{__name__}:Stuck", *SHOP[2:], *CAPS]
    assert main([*words, "--tasks", "2", "--output", "out"]) == 0
    text = said(capsys)
    assert "could not be closed: Stuck: close raised OSError: stuck" in text and "success %" in text
    assert [folder.name for folder in (here / "out").glob("*/eval.json")] == ["eval.json"]


class Told(ShopEnv):
    """Says what its results depend on."""

    who = "a script"

    def facts(self) -> dict[str, str]:
        return {"user_simulator": self.who}


def test_what_results_depend_on_stands_in_each_of_them(
    here: Path, model_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = ["eval", str(model_path), "--env.name", f"{__name__}:Told", *SHOP[2:], *CAPS]
    words += ["--tasks", "2", "--output"]
    for _ in range(2):  # played, and read
        assert main([*words, "one"]) == 0
        assert "user simulator: a script" in said(capsys)
    monkeypatch.setattr(Told, "who", "a <b>model</b>")
    assert main([*words, "two"]) == 0
    [one], [two] = ((here / out).iterdir() for out in ("one", "two"))
    assert json.loads((one / "eval.json").read_text())["world"] == {"user_simulator": "a script"}
    assert main(["compare", str(one), str(two), "--output", "page"]) == 0
    assert "user_simulator: 'a script' there, 'a <b>model</b>' here" in said(capsys)
    found = json.loads((here / "page" / "compare.json").read_text())
    assert [world["user_simulator"] for world in found["worlds"]] == ["a script", "a <b>model</b>"]
    assert "user simulator: a &lt;b&gt;model" in (here / "page" / "compare.html").read_text()
    config = settings(model_path, updates=1, eval={"dev_tasks": 2, "test_tasks": 2})
    config.env.name = f"{__name__}:Told"
    summary = trainer(config, here / "run").run()
    assert summary["world"] == {"user_simulator": "a <b>model</b>"}
    assert "user simulator: a <b>model" in (here / "run" / "best" / "README.md").read_text()
    assert "user simulator: a &lt;b&gt;model" in render(here / "run").read_text()
    read = read_evaluated(here / "run")
    assert read is not None and read.world == summary["world"]


def test_one_failure_among_the_last_does_not_count_as_all(
    here: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ShopEnv("tiny").tasks("test")[:4]
    words = ["eval", str(model_path), "--env.name", f"{__name__}:Rough", *SHOP[2:], *CAPS]
    words += ["--tasks", "4", "--output", "out"]
    assert main(words) == 0
    [folder] = (here / "out").iterdir()
    (folder / "eval.json").unlink()  # as if it had been interrupted in its last episode
    lines = (folder / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "episodes.jsonl").write_bytes(b"".join(line for line in lines if tasks[3].encode()
                                                     not in line))  # fmt: skip
    monkeypatch.setattr(Rough, "down", frozenset(tasks[3:]))
    assert main(words) == 0


def test_other_weights_under_the_name_of_a_hub_are_seen(
    here: Path, model_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    cached = here / "hub" / "models--me--tiny"
    (cached / "refs").mkdir(parents=True)
    words = ["eval", "me/tiny", *SHOP, *CAPS, "--tasks", "1", "--output", "out"]
    for commit, code in (("a" * 40, 0), ("b" * 40, 1)):
        shutil.copytree(model_path, cached / "snapshots" / commit)
        (cached / "refs" / "main").write_text(commit)
        assert main(words) == code, said(capsys)
    assert f"weights.revision: '{'a' * 40}' there, '{'b' * 40}' here" in said(capsys)


def test_what_cannot_be_compared_is_said(
    here: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tasks, temperature in (("2", "1.0"), ("2", "0.5"), ("3", "1.0")):
        assert main(["eval", str(model_path), *SHOP, *CAPS, "--tasks", tasks, "--temperature",
                     temperature, "--output", f"{tasks}-{temperature}"]) == 0  # fmt: skip
    name = str(model_path).strip("/").replace("/", "-")
    one, cold, three = (f"{out}/{name}" for out in ("2-1.0", "2-0.5", "3-1.0"))
    capsys.readouterr()
    assert main(["compare", one, f"{cold}/eval.json"]) == 0
    assert "temperature: 1.0 there, 0.5 here" in said(capsys)
    assert main(["compare", one, three]) == 1
    assert "same tasks, got 2 and 3; only one of them has" in said(capsys)
    Path(cold, "eval.json").write_text("{")
    assert main(["compare", one, cold]) == 1
    assert "Cannot read" in said(capsys)
    Path("mine").mkdir()
    Path("mine", name).mkdir()
    Path("mine", name, "diary.txt").write_text("precious")
    assert main(["eval", str(model_path), *SHOP, *CAPS, "--output", "mine"]) == 1
    assert "nothing in it is replaced" in said(capsys)
    assert read_evaluated(model_path) is None
    assert main(["eval", str(model_path), *SHOP, *CAPS, "--output", f"{one}/eval.json"]) == 1
    assert "is a file; expected a folder" in said(capsys)
    assert main(["compare", one, "nowhere/at/all"]) == 1
    assert "hint: A and B are folders of hero eval, runs, or models" in said(capsys)


def row(gains: list[float]) -> Comparison:
    mean = sum(gains) / len(gains)
    return Comparison(label="x", before=0.0, after=mean, gains=tuple(gains), digits=1)


def test_words_say_what_noise_allows() -> None:
    assert row([1.0] * 6).words == "yes"
    assert row([1.0] * 5 + [0.0]).words == "no: 5 tasks differ"  # by chance in 6 %
    assert row([1.0] * 5).words == "no; about 6 tasks would"
    assert row([0.0] * 9).words == "no difference"
    assert row([1.0, -1.0] * 9).words == "no difference"
    tenths = [0.1, 0.2, -0.3] * 5  # 4e-18 in the mean
    assert row(tenths).difference != 0 and row(tenths).words == "no difference"
    assert row([1e-17] * 9).words == "no difference"
    assert Comparison(label="x", before=0.0, after=1.0, digits=1).words.startswith("no figures")


def test_as_many_tasks_as_are_named_would_tell() -> None:
    gains = [random.Random(seed).gauss(0.1, 1.0) for seed in range(50)]
    found = row(gains)
    assert found.needed is not None and found.words == f"no; about {found.needed} tasks would"
    mean, spread = np.mean(gains), np.std(gains, ddof=1)
    means = np.random.default_rng(0).normal(mean, spread / found.needed**0.5, 20_000)
    told = np.abs(means) > 1.96 * spread / found.needed**0.5
    assert told.mean() == pytest.approx(0.8, abs=0.02)


def test_a_figure_that_some_tasks_lack_is_of_those_that_have_it_in_both() -> None:
    def of(**turns: float) -> dict[str, Any]:
        per_task = {t: {"turns_of_successes": n} if n else {} for t, n in turns.items()}
        return {"turns_of_successes": 99.0, "per_task": per_task}

    figures = [("turns_of_successes", "turns", 1.0, 1)]
    [found] = compare(of(a=4, b=6, c=0), of(a=3, b=0, c=9), figures)
    assert (found.before, found.after, found.gains) == (4, 3, (-1,))
    assert compare(of(a=4, b=0), of(a=0, b=4), figures) == []
