"""What commands leave alone: files that they did not make, the folder one stands in, secrets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hero.cli import main
from hero.commands.arguments import parse
from tests.hero.short_runs import SMALL


def hero(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, started as the console script starts it."""
    code = (
        "import sys; sys.path.remove(''); from hero.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    paths = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
    )


def test_the_folder_one_stands_in_is_not_imported_from(tmp_path: Path) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('the wrong jinja2')")
    (tmp_path / "my_world.py").write_text(
        "from hero.envs.shop import ShopEnv\nclass World(ShopEnv):\n    pass\n"
    )
    assert "holds nothing to show" in hero("view", ".", folder=tmp_path).stderr
    module = subprocess.run(
        [sys.executable, "-m", "hero", "view", "."], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert "holds nothing to show" in module.stderr
    own = ["--env.name", "my_world:World", "--env.options", "profile", "tiny", "--tasks", "1"]
    caps = [
        "--rollout.batch-size",
        "1",
        "--rollout.max-turns",
        "1",
        "--rollout.max-turn-tokens",
        "2",
    ]
    done = hero("rollout", "tiny-shop", *own, *caps, folder=tmp_path)
    assert done.returncode == 0 and "reward" in done.stdout, done.stderr


def test_a_traceback_shows_no_password(tmp_path: Path) -> None:
    (tmp_path / "my_world.py").write_text(
        "class World:\n    def __init__(self):\n"
        "        raise ValueError('no answer of http://me:hunter2@host/')\n"
    )
    said = hero("env", "check", "my_world:World", "--debug", folder=tmp_path)
    assert "Traceback" in said.stderr and "hunter2" not in said.stderr + said.stdout


@pytest.mark.parametrize("option", ["--reflection.api-key", "--api_key", "--hf-token", "--token"])
@pytest.mark.parametrize("form", ["{} hunter2", "{}=hunter2"])
def test_a_key_on_the_command_line_is_not_repeated(
    option: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "quickstart", *form.format(option).split()]) == 1
    said = capsys.readouterr()
    assert f"no option {option}: " in said.err and "hunter2" not in said.err + said.out


def test_a_run_whose_options_have_lost_their_secret_is_not_played_without_it() -> None:
    command: Any = parse(["rollout", "tiny-shop", "--env.name", "shop"])
    command.settings.env.options = {"profile": "tiny", "api_key": "***"}  # as a run has saved it
    with pytest.raises(ValueError, match=r"env\.options api_key was saved without its secret"):
        command.run()


def test_no_command_replaces_what_it_did_not_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json.txt").write_text("precious")
    for arguments in (
        ["train", "quickstart", "--output-dir", str(tmp_path)],
        ["sft", "tiny-shop", "--output-dir", str(tmp_path)],
        ["model", "smollm2-135m", "--output", str(tmp_path)],
        ["sft", "tiny-shop", "--output-dir", os.devnull],
    ):
        assert main(arguments) == 1
        assert "nothing in it is replaced" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_no_command_replaces_a_file_that_it_did_not_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["thesis.txt", "p.html", "out/compare.json", "mine/report.html", "mine/lock",
             "mine/config.json", "mine/best/model.safetensors"]  # fmt: skip
    for name in map(Path, files):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text("precious")
    Path("mine/metrics.jsonl").write_text('{"step": 0}\n')
    own = ["--recipe", "quickstart", "--tasks", "1"]
    for arguments, message in (
        (["rollout", "tiny-shop", *own, "--output", "thesis.txt"], "thesis.txt is there already"),
        (["probe", "tiny-shop", "--recipe", "quickstart", "--output", "p.json"], "p.html is there"),
        (["compare", "tiny-shop", "tiny-desk", *own, "--output", "out"], "compare.json is there"),
        (["view", "mine"], "report.html is there already"),
        (["view", "mine", "--output", "thesis.txt"], "thesis.txt is there already"),
        (["view", "mine", "--output", os.devnull], f"{os.devnull} is a device or a pipe"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    Path("mine/metrics.jsonl").unlink()
    assert main(["train", "quickstart", "--output-dir", "mine"]) == 1
    assert "nothing in it is replaced" in capsys.readouterr().err
    assert {Path(name).read_text() for name in files} == {"precious"}


def test_a_world_may_leave_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("wandering.py").write_text(
        "import os\nfrom hero.envs.shop import ShopEnv\nclass World(ShopEnv):\n"
        "    def reset(self, task):\n        os.makedirs('away', exist_ok=True)\n"
        "        os.chdir('away')\n        return super().reset(task)\n"
    )
    world = ["--env.name", "wandering:World"]
    assert main(["train", "--output-dir", "run", *SMALL, *world]) == 0
    own = [*world, "--env.options", "profile", "tiny"]
    monkeypatch.chdir(tmp_path)
    assert main(["rollout", "tiny-shop", *own, "--tasks", "1", "--output", "r.jsonl"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "tiny-shop", *own, "--tasks", "1", "--output", "out"]) == 0
    for name in ("run/summary.json", "run/report.html", "r.jsonl", "out/tiny-shop/eval.json"):
        assert (tmp_path / name).is_file(), name
    assert not [path for path in Path(tmp_path, "away").rglob("*") if path.is_file()]
