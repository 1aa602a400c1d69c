"""The examples run, and what README and docs say of settings, recipes and files is so.

Oracles: the examples as a user starts them; the plain-torch loss written out in drop_in_loss.py;
the configuration itself for every field, flag, default and recipe that the documentation names.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from hero import cli
from hero.config import TrainConfig
from hero.envs.base import Environment, make_env
from hero.recipes import recipe_names
from hero.types import Diagnosis
from tests.hero.shop_helpers import trajectory

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = "env|eval|loss|model|optim|reflection|rollout|teacher"


def check_drop_in_loss(printed: str) -> None:
    found = re.search(r"fused (\S+)  eager (\S+)  gradients differ by (\S+)", printed)
    assert found, printed
    fused, eager, error = map(float, found.groups())
    assert fused == pytest.approx(eager, rel=1e-5) and error < 1e-4
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2


def check_own_loop(printed: str) -> None:
    trained = [int(n) for n in re.findall(r"(\d+) turns trained", printed)]
    assert len(trained) == 10 and min(trained) > 0
    [success] = re.findall(r"success on held-out tasks: (\d+)%", printed)
    assert int(success) >= 30


def check_trl_hero(printed: str) -> None:
    success = [int(share) for share in re.findall(r"success (\d+)%", printed)]
    assert len(success) == 6 and sum(success[-2:]) / 2 >= sum(success[:2]) / 2 + 10


CHECKS: dict[str, Callable[[str], None]] = {
    "custom_env": lambda printed: None,  # a module; `hero env check` tries it
    "desk": lambda printed: None,  # likewise
    "drop_in_loss": check_drop_in_loss,
    "own_loop": check_own_loop,
    "trl_hero": check_trl_hero,
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    if path.stem.startswith("trl"):
        pytest.importorskip("trl", reason="trl is missing: .ci/extras trl")
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,  # of a machine with other work on it
    )
    assert done.returncode == 0, done.stderr
    CHECKS[path.stem](done.stdout)


@pytest.fixture
def note_env(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return make_env("custom_env:NoteEnv")


def played(env: Any, task: str, actions: list[str]) -> tuple[list[Diagnosis], float]:
    """Diagnoses and reward of the given actions, then of the oracle's."""
    env.reset(task)
    taken: list[str] = []
    reward, ended = 0.0, False
    while not ended:
        taken.append(actions[len(taken)] if len(taken) < len(actions) else env.oracle())
        _, gain, terminated, truncated, _ = env.step(taken[-1])
        ended, reward = terminated or truncated, reward + gain
    return env.diagnose(trajectory(task, taken)), reward


def test_the_example_environment_keeps_the_contract(note_env: Any) -> None:
    assert isinstance(note_env, Environment)
    splits = [set(note_env.tasks(split)) for split in ("train", "dev", "test")]
    assert len(set.union(*splits)) == sum(map(len, splits)) == 80
    for task in sorted(set.union(*splits)):
        diagnoses, reward = played(note_env, task, [])
        assert reward == 1.0 and not any(diagnosis.hint for diagnosis in diagnoses)
    assert pickle.loads(pickle.dumps(note_env)).tasks("dev") == note_env.tasks("dev")
    with pytest.raises(KeyError, match="nowhere"):
        note_env.reset("nowhere")


def test_the_example_environment_answers_whatever_is_written(note_env: Any) -> None:
    slips = ["", "open", "öffne \ud800"]
    diagnoses, reward = played(note_env, note_env.tasks("train")[0], slips)
    assert (
        reward == 0.0 and len(diagnoses) == 4
    )  # the last action is the oracle's: the note is read
    assert [bool(diagnosis.hint) for diagnosis in diagnoses] == [True, True, True, False]


def test_hero_train_takes_the_example_environment(note_env: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = "--env.name custom_env:NoteEnv --reflection.reflector rules --updates 1 --threads 1"
    settings += " --rollout.tasks-per-update 4 --rollout.max-turns 4 --rollout.max-turn-tokens 6"
    settings += " --rollout.batch-size 4 --eval.dev-tasks 2 --eval.test-tasks 0"
    assert cli.main(["train", *settings.split(), "--output-dir", str(run)]) == 0
    [_, line] = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = json.loads(line)
    assert metrics["optim/steps"] == 1 and metrics["divergence/mean"] > 0
    assert (run / "report.html").is_file()


def test_the_loss_of_the_readme_runs() -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code, names)
    for trained in ("student", "head"):
        gradient = names[trained].grad
        assert bool(gradient.isfinite().all()) and float(gradient.norm()) > 0
    assert names["teacher"].grad is None


def test_defaults_in_the_method_page() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (\S+) \| \[[PLD]\]", text, re.MULTILINE)
    assert len(rows) > 40
    config = TrainConfig()
    actual = [(name, str(reduce(getattr, name.split("."), config))) for name, _ in rows]
    assert rows == actual


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_fields_flags_and_recipes_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    config = TrainConfig()
    named = re.findall(rf"`({SECTIONS})\.(\w+)(?:=[^`]*)?`", text)
    named += [
        (section, name.removeprefix("no-").replace("-", "_"))
        for section, name in re.findall(rf"--({SECTIONS})\.([a-z][a-z-]*)", text)
    ]
    named = [pair for pair in named if pair[1] not in ("py", "json")]  # files
    unknown = [pair for pair in named if not hasattr(getattr(config, pair[0]), pair[1])]
    assert not unknown
    used = re.findall(r"hero train ([a-z][\w-]*)", text) + re.findall(r"`(shop-[\w-]+)`", text)
    assert set(used) <= set(recipe_names())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
            assert anchor in slugs, target
