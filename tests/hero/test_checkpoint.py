"""Checkpoints and models that are broken, foreign or cut: one message each, which names the file.

Oracle: the whole run that the files were taken from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hero.checkpoint import BrokenCheckpoint, checksum
from hero.files import replacing
from hero.types import Fault
from tests.hero.short_runs import config_of, go_on, left, settings, trainer


@pytest.fixture(scope="module")
def whole(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer(config_of(model_path), run).run()
    return run


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def again(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change state.json, as a version or a program of another kind would have written it."""
    state = json.loads(path.read_text())
    path.write_text(json.dumps(change(state)))


def swap(folder: Path, name: str, write: Callable[[Path], Any]) -> None:
    """Another file in the checkpoint, with a checksum that is right."""
    write(folder / name)
    again(
        folder / "state.json",
        lambda state: {**state, "files": {**state["files"], name: checksum(folder / name)}},
    )


def with_nan(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)


def nan_moments(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    next(iter(state["optimizer"]["state"].values()))["exp_avg"].fill_(float("nan"))
    torch.save(state, path)


def other_shapes(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(3)
    torch.save(state, path)


WEIGHTS, OPTIMISER = "student.safetensors", "optimizer.pt"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit in the weights": (lambda f: flip(f / WEIGHTS), "student.*checksum"),
    "a flipped bit in the optimiser": (lambda f: flip(f / OPTIMISER), "optimizer.*checksum"),
    "a missing file": (lambda f: (f / "teacher.safetensors").unlink(), "teacher.* is missing"),
    "an empty optimiser": (
        lambda f: swap(f, OPTIMISER, lambda p: p.write_bytes(b"")), "optimizer.pt cannot be read",
    ),
    "a foreign optimiser": (
        lambda f: swap(f, OPTIMISER, lambda p: torch.save({"a": 1}, p)), "does not fit this run",
    ),
    "an optimiser of another model": (
        lambda f: swap(f, OPTIMISER, other_shapes), r"exp_avg is \[3\] for a parameter",
    ),
    "weights with NaN": (lambda f: swap(f, WEIGHTS, with_nan), "holds NaN"),
    "a state of a newer version": (
        lambda f: again(f / "state.json", lambda s: {**s, "flux": 1}), "not fit this run.*flux",
    ),
    "a number of the state changed": (
        lambda f: again(f / "state.json", lambda s: {**s, "update": s["update"] - 1}),
        "state.json cannot be read .*checksum",
    ),
    "a counter that is a text": (
        lambda f: again(f / "state.json", lambda s: {**s, "env_turns": "many"}),
        "not fit this run .env_turns: .* got 'many'",
    ),
    "a state without checksums of files": (
        lambda f: (again(f / "state.json", lambda s: {**s, "files": {}}), flip(f / WEIGHTS)),
        "student.*checksum",
    ),
    "moments with NaN": (lambda f: swap(f, OPTIMISER, nan_moments), "optimizer.pt holds NaN"),
    "a state that is a list": (
        lambda f: again(f / "state.json", lambda s: [1]), "not the state of a run of this version",
    ),
    "a state cut short": (
        lambda f: (f / "state.json").write_text('{"update"'), "state.json cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_message(
    model_path: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    spoil, message = BROKEN[name]
    spoil(tmp_path / "run" / "checkpoint")
    config = config_of(model_path, resume=str(tmp_path / "run"))
    with pytest.raises(BrokenCheckpoint, match=message):
        trainer(config, tmp_path / "run").run()


def test_the_good_checkpoint_beside_a_broken_one_is_taken(
    model_path: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(whole / "checkpoint", tmp_path / "run" / "checkpoint.old")
    flip(tmp_path / "run" / "checkpoint" / "student.safetensors")
    go_on(model_path, tmp_path / "run")
    assert left(tmp_path / "run") == left(whole)


@pytest.mark.parametrize("spoil", ["missing", "cut", "gone"])
def test_a_broken_best_model_is_named_at_the_end(
    model_path: Path, whole: Path, tmp_path: Path, spoil: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    model = tmp_path / "run" / "best" / "model.safetensors"
    if spoil == "gone":
        shutil.rmtree(model.parent)
    elif spoil == "missing":
        model.unlink()
    else:
        os.truncate(model, 1000)
    with pytest.raises(BrokenCheckpoint, match=r"The model in .*best cannot be read"):
        go_on(model_path, tmp_path / "run")


def test_a_cut_before_json_is_named(model_path: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "before.json").write_text('{"per_task": {')
    with pytest.raises(Fault, match=r"before.json cannot be read .* training itself is whole"):
        go_on(model_path, tmp_path / "run")


@pytest.mark.parametrize("content", ["[]", '{"per_task": {"a": 1}}', '{"per_task": {"a": {}}}'])
def test_a_foreign_before_json_is_named(
    model_path: Path, whole: Path, tmp_path: Path, content: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "before.json").write_text(content)
    with pytest.raises(Fault, match=r"before.json cannot be read .* training itself is whole"):
        go_on(model_path, tmp_path / "run")


@pytest.mark.parametrize("file", ["metrics.jsonl", "trajectories.jsonl"])
def test_a_foreign_line_of_a_log_is_named(
    model_path: Path, whole: Path, tmp_path: Path, file: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with (tmp_path / "run" / file).open("a") as log:
        log.write('{"step": "three", "update": "three"}\n')
    with pytest.raises(ValueError, match=rf"{file}, line \d+ is not one of a run.*Remove the line"):
        go_on(model_path, tmp_path / "run")


def test_a_broken_checkpoint_is_named(model_path: Path, tmp_path: Path) -> None:
    trainer(settings(model_path, updates=1), tmp_path).run()
    (tmp_path / "checkpoint" / "student.safetensors").write_bytes(b"rubbish")
    resumed = trainer(settings(model_path, resume=str(tmp_path)), tmp_path)
    with pytest.raises(BrokenCheckpoint, match=r"cannot be read .*best model so far"):
        resumed.run()


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as folder:
        (folder / "file").write_text("first")
    with pytest.raises(RuntimeError), replacing(tmp_path / "x") as folder:
        (folder / "file").write_text("second")
        raise RuntimeError
    assert (tmp_path / "x" / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
