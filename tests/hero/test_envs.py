"""Environments by name, options of the command line, `hero env init` and `hero env check`.

Oracles: entry points as an installed package has them; what a command line says, written out;
worlds that break one rule each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hero import recipes
from hero.cli import main
from hero.commands.arguments import parse
from hero.envs import check as checking
from hero.envs import register, registry
from hero.envs.base import make_env
from hero.envs.check import Verdict, check
from hero.envs.shop import ShopEnv

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(registry, "_registered", {})
    registry._of_packages.cache_clear()
    yield
    registry._of_packages.cache_clear()


def test_registered_names_make_environments() -> None:
    register("corner-shop", lambda **options: ShopEnv("tiny", max_steps=3, **options))
    env = make_env("corner-shop", noise=0.5)
    assert isinstance(env, ShopEnv) and (env.max_steps, env.noise) == (3, 0.5)
    register("also", "hero.envs.shop:ShopEnv", summary="the shop again")
    assert isinstance(make_env("also", profile="small"), ShopEnv)


@pytest.mark.parametrize("name", ["shop", "two words", "a:b", ""])
def test_names_that_cannot_be_taken(name: str) -> None:
    with pytest.raises(ValueError, match=r"another name|letters, digits"):
        register(name, "somewhere:Else")


def test_packages_bring_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cross.py").write_text("from hero.envs.shop import ShopEnv as CrosswordEnv\n")
    facts = tmp_path / "cross-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: cross\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[hero.envs]\ncrossword = cross:CrosswordEnv\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "package cross" in registry.worlds()["crossword"].summary
    assert isinstance(make_env("crossword"), ShopEnv)


def test_what_is_missing_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = registry.World(factory="no:World", modules=("no_such_module",), install="pip get it")
    monkeypatch.setitem(registry.BUILTIN, "lacking", lacking)
    with pytest.raises(ValueError, match=r"needs no_such_module, not installed.*pip get it"):
        make_env("lacking")
    with pytest.raises(ValueError, match=r"Unknown environment 'shup'.*shop.*hero envs"):
        make_env("shup")


def test_hero_envs_lists_and_describes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["envs"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in registry.BUILTIN)
    assert main(["envs", "shop", "--env.options.profile", "small"]) == 0
    printed = capsys.readouterr().out
    assert "train 1105, dev 200, test 200" in printed and "catalogue-seed" in printed


def options(*words: str) -> dict[str, Any]:
    return dict(parse(["train", *words]).settings.env.options)  # type: ignore[attr-defined]


def test_options_one_by_one() -> None:
    words = ["--env.options.data-dir", "a b", "--env.options.max-steps=3", "--seed", "1"]
    assert options("--env.name", "webshop", *words) == {"data_dir": "a b", "max_steps": 3}
    kept = {"profile": "tiny", "mode": "strict", "hints": "answer"}
    assert options("quickstart", "--env.options.mode", "strict") == kept
    both = ["--env.options", "mode", "strict", "--env.options.hints", "rule"]
    assert options("quickstart", *both) == {"profile": "tiny", "mode": "strict", "hints": "rule"}


def test_options_can_be_emptied(tmp_path: Path) -> None:
    assert options("quickstart", "--env.options") == {}
    assert options("quickstart", "--env.name", "webshop") == {}
    file = tmp_path / "mine.yaml"
    for env, left in [
        ({"options": None}, {}),
        ({"name": "shop", "options": {"mode": "strict"}}, {"profile": "tiny", "hints": "answer"}),
        ({"name": "my:World"}, {}),
        ({"name": "my:World", "options": {"size": 3}}, {}),
    ]:
        file.write_text(yaml.safe_dump({"base": "quickstart", "env": env}))
        expected = left | ((env.get("options") or {}) if isinstance(env, dict) else {})
        assert options("--config", str(file)) == expected
    assert recipes.merge({}, {"env": {"options": None}}) == {"env": {"options": {}}}


def test_an_option_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--env.options.data-dir"]) == 1
    assert "--env.options.data-dir needs a value" in capsys.readouterr().err


# ---- init and check ------------------------------------------------------------------------------


def test_init_writes_a_world_that_passes_its_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["env", "init", "box_world"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"box_world.py", "box_world.yaml"}
    assert main(["env", "check", "box_world:BoxWorldEnv", "--episodes", "4"]) == 0
    printed = capsys.readouterr().out
    assert "success 100%" in printed and "FAULT" not in printed
    config = parse(["train", "--config", "box_world.yaml"]).settings  # type: ignore[attr-defined]
    assert config.env.name == "box_world:BoxWorldEnv"
    assert main(["env", "init", "box_world"]) == 1  # nothing is replaced
    assert main(["env", "init", "Box World"]) == 1
    for taken in ("json", "class", "torch"):
        assert main(["env", "init", taken]) == 1 and not (tmp_path / f"{taken}.py").exists()


def test_the_scaffold_is_the_example() -> None:
    scaffold = ROOT / "hero" / "assets" / "scaffold" / "custom_env.py.txt"
    example = ROOT / "examples" / "custom_env.py"
    assert scaffold.read_text() == example.read_text()
    assert len(example.read_text().splitlines()) < 60


class Fine:
    """Two steps; the second wins."""

    system_prompt = "Say x."
    number = 0

    def tasks(self, split: str) -> list[str]:
        return [f"{split}{i}" for i in range(3)]

    def reset(self, task_id: str) -> tuple[Any, Any]:
        if task_id not in [task for split in checking.SPLITS for task in Fine.tasks(self, split)]:
            raise KeyError(task_id)
        self.steps = 0
        return "begin", {}

    def step(self, text: str) -> tuple[Any, Any, bool, bool, Any]:
        self.steps += 1
        return "go on", 0.0, self.steps == 2, False, {"success": self.steps == 2}

    def oracle(self) -> str:
        return "x"

    def close(self) -> None: ...


class Leaky(Fine):
    def tasks(self, split: str) -> list[str]:
        return ["same"]


class Strange(Fine):
    def reset(self, task_id: str) -> tuple[Any, Any]:
        self.steps = 0
        return "begin", {}


class Fragile(Fine):
    def step(self, text: str) -> tuple[Any, Any, bool, bool, Any]:
        if not text:
            raise ValueError("empty")
        return super().step(text)


class Endless(Fine):
    def step(self, text: str) -> tuple[Any, Any, bool, bool, Any]:
        return "go on", 0.0, False, False, {}


class Infinite(Fine):
    def step(self, text: str) -> tuple[Any, Any, bool, bool, Any]:
        return "go on", float("nan"), True, False, {}


class Hopeless(Fine):
    def step(self, text: str) -> tuple[Any, Any, bool, bool, Any]:
        return "over", 0.0, True, False, {}


class Random(Fine):
    def step(self, text: str) -> tuple[Any, Any, bool, bool, Any]:
        Fine.number += 1
        return str(Fine.number), *super().step(text)[1:]


class Mumbling(Fine):
    def vocabulary(self) -> list[str]:
        return {}["words"]  # type: ignore[no-any-return]


class Misspelt(Fine):
    def vocabulary(self) -> list[str]:
        return self.wrods  # type: ignore[no-any-return, attr-defined]


class Open(Fine):
    def vocabulary(self) -> list[str]:
        raise ValueError("an open vocabulary")


class Leaving(Fine):
    def reset(self, task_id: str) -> tuple[Any, Any]:
        if not task_id[-1].isdigit():
            sys.exit(0)
        return super().reset(task_id)


class Stuck(Fine):
    def __init__(self) -> None:
        self.held = lambda: None


class HeldOnPurpose(Stuck):
    """Two steps. Not picklable."""


@pytest.mark.parametrize(
    ("world", "faults"),
    [
        (Fine, []),
        (HeldOnPurpose, []),
        (Leaky, ["splits"]),
        (Strange, ["unknown task"]),
        (Fragile, ["junk is answered"]),
        (Endless, ["oracle", "same again"]),
        (Infinite, ["junk is answered", "oracle", "same again", "pickling", "speed"]),
        (Hopeless, ["oracle"]),
        (Random, ["same again", "pickling"]),
        (Stuck, ["pickling"]),
        (Mumbling, ["vocabulary"]),
        (Misspelt, ["vocabulary"]),
        (Open, []),
        (Leaving, ["unknown task"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_check_finds_the_broken_rule(world: type, faults: list[str]) -> None:
    register("tried", world)
    found = check("tried", {}, episodes=2)
    assert [f.rule for f in found if f.verdict is Verdict.FAULT] == faults


def test_a_failed_check_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    register("leaky", Leaky)
    assert main(["env", "check", "leaky"]) == 1
    said = capsys.readouterr()
    assert "disjoint splits" in said.out and "breaks 1 of 1 rules" in said.err


def test_the_shop_keeps_its_contract() -> None:
    found = check("shop", {"profile": "small"}, episodes=3)
    assert all(finding.verdict is not Verdict.FAULT for finding in found)
