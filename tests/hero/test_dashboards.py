"""The same metrics in wandb, trackio and TensorBoard. Oracle: what each package reads back from its
own files."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hero.report.dashboards import named
from hero.report.tracking import Tracker

LOGGED = {
    "loss": 0.5, "rewards/mean": 0.25, "rewards/std": 0.1, "grad_norm": 2.0, "generated_tokens": 40,
    "learning_rate": 1e-3, "entropy": 1.5, "seconds/rollout": 2.0, "seconds/train": 1.0,
    "seconds/evaluation": 9.0, "dev/success": 0.75, "frac_reward_zero_std": 0.5,
}  # fmt: skip
SHOWN = {
    "train/loss": 0.5, "train/reward": 0.25, "train/reward_std": 0.1, "train/grad_norm": 2.0,
    "train/num_tokens": 40, "train/learning_rate": 1e-3, "train/entropy": 1.5,
    "train/seconds/rollout": 2.0, "train/seconds/train": 1.0, "train/seconds/evaluation": 9.0,
    "train/step_time": 3.0, "eval/success": 0.75, "train/frac_reward_zero_std": 0.5,
}  # fmt: skip


def test_names_are_those_of_trl() -> None:
    assert named(LOGGED) == SHOWN
    assert named({"dev/score": 0.5}) == {"eval/score": 0.5}


@pytest.mark.parametrize("package", ["wandb", "trackio", "tensorboard"])
def test_missing_dashboard_names_the_extra(tmp_path: Path, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=rf"pip install 'hero-kernels\[{package}\]'"):
        Tracker(tmp_path, package, {}, None)


def of_tensorboard(run_dir: Path) -> list[dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault(event.step, {})[tag] = event.value
    return [found[step] for step in sorted(found)]


def of_wandb(run_dir: Path) -> list[dict[str, float]]:
    """From the file that `wandb sync` would upload: protocol buffers in LevelDB's log format, in
    blocks of 32 KiB behind 7 bytes, each piece behind its checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2

    [path] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for a header: the block's end is empty
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
                found.append({n: json.loads(v) for n, v in items.items() if not n.startswith("_")})
    return found


def of_trackio(run_dir: Path) -> list[dict[str, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("hero", run_dir.name)
    return [{n: v for n, v in log.items() if n not in ("step", "timestamp")} for log in logs]


READ: dict[str, Callable[[Path], list[dict[str, float]]]] = {
    "tensorboard": of_tensorboard, "wandb": of_wandb, "trackio": of_trackio,
}  # fmt: skip


RUN = """
import json, math, sys
from pathlib import Path
from hero.report.tracking import Tracker
tracker = Tracker(Path(sys.argv[1]), sys.argv[2], {"seed": 3}, None)
tracker.log(1, json.loads(sys.argv[3]) | {"broken": math.nan})
tracker.log(2, {"loss": 0.25})
tracker.close()
"""


@pytest.mark.parametrize("package", READ)
def test_a_dashboard_gets_them_without_a_network(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own: wandb's service writes the last of a file when it ends."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(package, reason=f"{package} is missing: .ci/extras hub")
    run_dir = tmp_path / "a-run"
    run_dir.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RUN, run_dir, package, json.dumps(LOGGED)],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = READ[package](run_dir)
    shown: dict[str, Any] = {n: v for n, v in first.items() if n != "train/broken"}
    assert shown == pytest.approx(SHOWN, rel=1e-6)
    assert second == pytest.approx({"train/loss": 0.25})
    if package != "tensorboard":  # the only one that can show that a number is none
        assert "train/broken" not in first
