"""The command as a user types it: what it prints, what it writes, what it says to mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from hero.checks import from_dict
from hero.cli import main
from hero.commands.arguments import parse
from hero.config import SftConfig
from hero.recipes import load_recipe, recipe_names
from hero.report.viewer import CHARTS
from tests.hero.short_runs import SMALL

COMMANDS = (
    "train",
    "sft",
    "eval",
    "compare",
    "rollout",
    "view",
    "model",
    "merge",
    "recipes",
    "doctor",
)


def test_help_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["help"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"• {name} " in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hero ")
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "train, sft, eval" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == main(["help", name]) == 0
    assert capsys.readouterr().out.count(f"usage: hero {name} ") == 2


def test_help_explains_every_field_with_the_recipe_s_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "quickstart", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("--teacher.update-rate", "--loss.divergence", "--reflection.leak-filter"):
        assert name in text
    assert "Jensen" in text and "(default: 0.0003)" in text


def test_help_and_mistakes_are_answered_without_torch() -> None:
    code = (
        "import sys; from hero.cli import main; main(sys.argv[1:]); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    for arguments in (
        ["trian"],
        ["train", "quickstart", "--help"],
        ["view", "nowhere"],
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
        assert done.returncode == 0, arguments


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_a_sign_shows_another(tmp_path: Path, encoding: str) -> None:
    for arguments in (["recipes"], ["--help"]):
        code = "import sys; from hero.cli import main; sys.exit(main(sys.argv[1:]))"
        paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": encoding}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env={**os.environ, **paths}, cwd=tmp_path,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert b"?" in done.stdout


def test_ctrl_c_while_modules_are_loaded_is_one_line(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, threading, hero.cli; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background
        "threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start(); "
        "sys.exit(hero.cli.main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "error: Interrupted.\n")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_valid_configuration(name: str) -> None:
    config = from_dict(load_recipe(name))
    assert from_dict(asdict(config)) == config


def test_sft_recipes_are_valid() -> None:
    for name in recipe_names("sft"):
        assert from_dict(load_recipe(name, "sft"), SftConfig).steps > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Take a recipe: hero train quickstart"),
        (["train", "quikstart"], "Unknown recipe 'quikstart': expected one of bfcl, quick"),
        (["train", "--config", "no.yaml"], "Cannot read the configuration no.yaml"),
        (["train", "--model.path", "no/model/here"], "Cannot load the model 'no/model/here'"),
        (["train", "--resume", "no-run"], "no-run is not the folder of a run"),
        (["train", "--env.name", "shopp"], "Unknown environment 'shopp': expected one of"),
        (["train", "--env.options", "profile", "huge"], "huge"),
        (["train", "--mode", "grpo"], "rollout.group_size must be at least 2"),
        (["train", "--loss.beta", "1.0"], "loss.beta must be in (0, 1)"),
        (["train", "--model.device", "cuda"], "torch sees no CUDA device"),
        (["train", "quickstart", "--updates", "0"], "updates must be greater than 0, got 0"),
        (["sft", "--steps", "0"], "steps must be greater than 0, got 0"),
        (["sft", "tiny-shop", "--batch-size", "0"], "batch_size must be greater than 0, got 0"),
        (["eval"], "Name each model once, and at least one; got none"),
        (["eval", "a", "a"], "Name each model once"),
        (["eval", "tiny-shop", "--tasks", "0"], "tasks must be greater than 0, got 0"),
        (["train", "--resume", "auto"], "--resume auto needs --output-dir"),
        (["train", "quickstart", "--resume", "x"], "leave the recipe 'quickstart' out"),
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
    ("arguments", "message"),
    [
        (["rollout"], "Missing from hero rollout"),
        (["train", "--updates", "many"], "Error parsing --updates"),
        (["train", "--env.options", "profile"], "expected pairs of KEY and VALUE, got profile"),
        (["train", "--env.options.rules", "*x"], "the value of rules is not YAML"),
        (["train", "--num-generations", "8"], "--num-generations is --rollout.group-size"),
        (["train", "--learning-rate", "1"], "--learning-rate is --optim.learning-rate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_parser_refuses_ends_with_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_options_of_the_environment_twice_lose_none(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--env.options", "profile", "tiny", "--env.options", "observation", "compact"]
    assert main(["train", "quickstart", *words]) == 1
    assert "--env.options is given twice" in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", "nowhere", "--debug"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: nowhere holds")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode: heroo", "mode"),
        ("optim: {betas: 1}", "optim.betas: unknown field; known here: adam_beta1"),
        ("num_generations: 8", "num_generations: unknown field; here it is rollout.group_size"),
        ("learning_rate: 1", "learning_rate: unknown field; here it is optim.learning_rate"),
        ("optim: {learning_rate: .nan}", "optim.learning_rate must be a finite number, got nan"),
        ("rollout: {temperature: 0}", "rollout.temperature must be above 0, got 0: a greedy"),
        ("rollout: {group_size: many}", "rollout.group_size"),
        ("- a\n- b", "must hold a mapping"),
        ("a: [", "is not valid YAML"),
        ("base: nothing", "Unknown recipe 'nothing'"),
        ("optim: {warmup_steps: 3}\noptim: {adam_beta1: 0.8}", "optim stands there twice"),
        ("loss: {beta: 0.3, beta: 0.4}", "beta stands there twice"),
    ],
)
def test_mistakes_in_a_config_file(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_recipes_files_and_options_stack(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"base": "shop-grpo", "seed": 7}))
    command = parse(["train", "--config", str(file), "--optim.learning-rate", "0.5"])
    config = command.settings  # type: ignore[attr-defined]
    assert (config.mode, config.seed, config.optim.learning_rate) == ("grpo", 7, 0.5)
    assert config.env.options["profile"] == "tiny"  # from the base of the base


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [([], {}), (["quickstart"], {"profile": "tiny", "hints": "answer"})],
    ids=["none", "recipe"],
)
def test_options_of_the_environment_read_the_same_with_a_recipe(
    recipe: list[str], kept: dict[str, str]
) -> None:
    words = ["--env.options", "mode", "raw", "size", "3", "strict", "false", "none", "null"]
    config = parse(["train", *recipe, *words]).settings  # type: ignore[attr-defined]
    given = {"mode": "raw", "size": 3, "strict": False, "none": None}
    assert config.env.options == kept | given
    other = parse(["train", *recipe, "--env.name", "my:World", *words]).settings  # type: ignore[attr-defined]
    assert other.env.options == given  # a recipe's options are of its own environment


def test_train_eval_rollout_view(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = ["--reflection.base-url", "http://me:s3cret@host/v1"]
    assert main(["train", "--output-dir", "run", *SMALL, *secret]) == 0
    assert not any("s3cret" in path.read_text() for path in Path("run").glob("*.*"))
    out = capsys.readouterr().out
    assert "Held-out tasks, before and after training" in out and "report.html" in out
    assert Path("run/report.html").stat().st_size > 5000
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    logged = set().union(*lines)
    drawn = {metric for chart in CHARTS for metric in chart.lines}
    assert drawn <= logged
    assert {name for name in logged if name.startswith("seconds/")} <= drawn
    assert main(["train", "--output-dir", "run", *SMALL]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--resume", "run", "--updates", "2"]) == 0
    assert json.loads(Path("run/summary.json").read_text())["stopped"] == "all 2 updates done"
    assert main(["eval", "run", "--output", "again"]) == 0  # the run's own test evaluation
    assert "95 % interval" in capsys.readouterr().out
    summary = json.loads(Path("run/summary.json").read_text())
    again = json.loads(Path("again/run/eval.json").read_text())
    assert {name: again[name] for name in summary["after"]} == summary["after"]
    assert main(["compare", "run", "again/run", "--output", "compared"]) == 0
    rows = json.loads(Path("compared/compare.json").read_text())["rows"]
    assert rows[0]["label"] == "success %" and all(row["difference"] == 0 for row in rows)
    assert main(["rollout", "run", "--tasks", "2", "--output", "r.jsonl"]) == 0
    assert len(Path("r.jsonl").read_text().splitlines()) == 2
    for _ in range(2):  # what it made itself it replaces
        assert main(["view", "run", "--output", "v.html"]) == 0
    assert main(["rollout", "run", "--tasks", "1", "--output", "r.jsonl"]) == 0
    assert main(["compare", "run", "again/run", "--output", "compared"]) == 0
    assert Path("v.html").is_file()


def test_the_gate_is_asked_before_the_long_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    gate = ["--eval.min-teacher-lift", "1.5"]  # which no teacher reaches
    assert main(["train", "--output-dir", str(run), *SMALL, *gate]) == 1
    said = capsys.readouterr()
    assert "The teacher's lift is" in said.err and "Evaluating" not in said.out
    assert not (run / "before.json").exists()
    [line] = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert "probe/teacher_lift" in line and "dev/success" not in line


def test_an_unknown_model_is_missed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """No connection, or a hub that does not know it: one question, not minutes of them."""
    started = time.monotonic()
    assert main(["eval", "nobody-9f3/no-model-of-this-name"]) == 1
    assert "Cannot load the model 'nobody-9f3/no-model" in capsys.readouterr().err
    assert time.monotonic() - started < 10


def test_doctor_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "divergence impl=torch" in capsys.readouterr().out
    assert main(["recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["recipes", "quickstart"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["mode"] == "hero"
