"""The command as a user types it: what it prints, what it writes, what it says to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hero.cli import main
from hero.config import TrainConfig, from_dict, load_recipe, recipe_names, to_dict
from hero.sft import SftConfig

SMALL = [
    "--prompts", "compact", "--env.options", "profile", "tiny", "--rollout.tasks-per-update", "2",
    "--rollout.batch-size", "4", "--rollout.max-turns", "2", "--rollout.max-turn-tokens", "4",
    "--reflection.reflector", "rules", "--eval.dev-tasks", "2", "--eval.test-tasks", "2",
    "--updates", "1", "--model.device", "cpu",
]  # fmt: skip


def test_help_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "hero COMMAND" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "expected one of train" in capsys.readouterr().err


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "quickstart", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in (
        "--teacher.update-rate",
        "--loss.divergence",
        "--reflection.leak-filter",
        "--seed",
    ):
        assert name in text
    assert "Jensen" in text


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_valid_configuration(name: str) -> None:
    config = from_dict(load_recipe(name))
    assert from_dict(to_dict(config)) == config


def test_sft_recipes_are_valid() -> None:
    for name in recipe_names("sft"):
        assert from_dict(load_recipe(name, "sft"), SftConfig).steps > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quikstart"], "Unknown recipe 'quikstart': expected one of desk, quickstart"),
        (["train", "--config", "no.yaml"], "Cannot read the configuration no.yaml"),
        (["train", "--model.path", "no/model/here"], "Cannot load the model 'no/model/here'"),
        (["train", "--resume", "no-run"], "expected the folder of a run"),
        (["train", "--env.name", "shopp"], "Unknown environment 'shopp': expected one of"),
        (["train", "--env.options", "profile", "huge"], "huge"),
        (["train", "--mode", "grpo"], "rollout.group_size must be at least 2"),
        (["train", "--loss.beta", "1.0"], "loss.beta must be in (0, 1)"),
        (["train", "--model.device", "cuda"], "torch sees no CUDA device"),
        (["eval"], "name a model"),
        (["view", "nowhere"], "nowhere"),
        (["model", "gpt-5"], "Unknown model 'gpt-5': expected one of smollm2-135m"),
        (["recipes", "nothing"], "Unknown recipe"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_message_and_exit_code_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error:") and message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode: heroo", "mode"),
        ("optim: {lr: 1}", "optim.lr: unknown field; known here: adam_beta1"),
        ("rollout: {group_size: many}", "rollout.group_size"),
        ("- a\n- b", "must hold a mapping"),
        ("a: [", "no valid YAML"),
        ("base: nothing", "Unknown recipe 'nothing'"),
    ],
)
def test_mistakes_in_a_config_file(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_files_recipes_and_overrides_stack(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"base": "shop-grpo", "seed": 7}))
    from hero.commands import _parse
    from hero.config import load_config_file

    data = load_config_file(tmp_path / "c.yaml")
    config = _parse(TrainConfig, data, ["--optim.learning-rate", "0.5"], "hero train")
    assert (config.mode, config.seed, config.optim.learning_rate) == ("grpo", 7, 0.5)
    assert config.env.options["profile"] == "tiny"  # from the base of the base


def test_train_eval_rollout_view(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--output-dir", "run", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "Held-out tasks, before and after training" in out and "report.html" in out
    assert Path("run/report.html").stat().st_size > 5000
    assert main(["train", "--output-dir", "run", *SMALL]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--resume", "run", "--updates", "2"]) == 0
    assert json.loads(Path("run/summary.json").read_text())["stopped"] == "all 2 updates done"
    assert main(["eval", "run", "--tasks", "3", "--output", "eval.json"]) == 0
    assert len(json.loads(Path("eval.json").read_text())["per_task"]) == 3
    assert main(["rollout", "run", "--tasks", "2", "--output", "r.jsonl"]) == 0
    assert len(Path("r.jsonl").read_text().splitlines()) == 2
    assert main(["view", "run", "--output", "v.html"]) == 0
    assert Path("v.html").is_file()


def test_doctor_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "divergence impl=torch" in capsys.readouterr().out
    assert main(["recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["recipes", "quickstart"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["mode"] == "hero"
