"""What a run leaves on disk while it goes on: `metrics.jsonl` and `trajectories.jsonl`.

Both files hold one JSON object a line and survive a crash at any moment: a line is written and
flushed in one piece, an unfinished last line is cut off when the run is opened again, and a resumed
run drops what was logged after the checkpoint it starts from. JSON is strict: NaN and infinities
become null. Metrics can go to a dashboard too (wandb, trackio, tensorboard).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hero.files import write_atomic
from hero.report.dashboards import Metrics, open_dashboard
from hero.text import shorten
from hero.types import Diagnosis, Trajectory

if TYPE_CHECKING:  # the report needs no torch
    from hero.learner import Learned

METRICS = "metrics.jsonl"
TRAJECTORIES = "trajectories.jsonl"
MAX_TEXT = 4000
"""Characters of one text of a logged trajectory; of a longer one head and tail are kept."""


class Tracker:
    """Appends metrics and trajectories to the files of a run, and metrics to a dashboard."""

    def __init__(
        self, run_dir: Path, report_to: str, config: dict[str, Any], resume_at: int | None
    ) -> None:
        """Open the run's files, repairing what a crash left behind.

        Args:
            run_dir: folder of the run; made if there is none.
            report_to: none, wandb, trackio or tensorboard.
            config: nested settings, shown by wandb and trackio.
            resume_at: number of the last update that still counts; later lines are dropped. None
                keeps every line: whether a folder may be used again is the caller's decision.

        Raises:
            ValueError: the package of `report_to` is missing, or a file holds a broken line.
        """
        self._dashboard = open_dashboard(report_to, run_dir, config, resume_at)
        run_dir.mkdir(parents=True, exist_ok=True)
        last = math.inf if resume_at is None else resume_at
        repair(run_dir / METRICS, lambda line: line["step"] <= last)
        # A run that goes on has not come to its end: what was played there is played again.
        ended = "after" if resume_at is not None else ""
        repair(
            run_dir / TRAJECTORIES,
            lambda record: record["update"] <= last and record["split"] != ended,
        )
        self._metrics = (run_dir / METRICS).open("ab")
        self._trajectories = (run_dir / TRAJECTORIES).open("ab")

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one line; `step` is the number of the update, 0 what was measured before any."""
        self._append(self._metrics, json_line({"step": step, **metrics}))
        if self._dashboard is not None:
            self._dashboard.log(step, metrics)

    def log_trajectories(self, records: Sequence[dict[str, Any]]) -> None:
        """Append records made by `trajectory_record`."""
        self._append(self._trajectories, b"".join(map(json_line, records)))

    @staticmethod
    def _append(file: BinaryIO, lines: bytes) -> None:
        """On the disk before the checkpoint that says so: a machine may lose its power."""
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())

    def close(self) -> None:
        self._metrics.close()
        self._trajectories.close()
        if self._dashboard is not None:
            self._dashboard.close()


def trajectory_record(
    trajectory: Trajectory, diagnoses: Iterable[Diagnosis], learned: Learned, *,
    pieces: Callable[[list[int]], list[str]], update: int | None, split: str, number: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """One trajectory as `hero view` shows it; no text is longer than about `MAX_TEXT`.

    Args:
        trajectory: the episode.
        diagnoses: at most one for each turn, in any order.
        learned: what its turns did in training.
        pieces: the text of each token.
        update: number of the update; 0 is before training, None is without one.
        split: train, or before / after for the held-out tasks; without training that of the tasks.
        number: of the trajectory among those `learned` is about.
    """
    diagnosis_of = {
        diagnosis.turn: {
            name: shorten(value, MAX_TEXT) if isinstance(value, str) else value
            for name, value in asdict(diagnosis).items()
            if name != "turn"
        }
        for diagnosis in diagnoses
    }
    turns = [
        {
            "action_text": shorten(turn.action_text, MAX_TEXT),
            "observation": turn.observation and shorten(turn.observation, MAX_TEXT),
            "feedback_kind": str(turn.feedback_kind),
            "parse_ok": turn.parse_ok,
            "is_error": turn.is_error,
            "tokens": pieces(turn.action_ids),
            "divergence": learned.divergence.get((number, k)),
            "logprob_gap": learned.logprob_gap.get((number, k)),
            "diagnosis": diagnosis_of.get(k),
            "trained": list(learned.trained.get((number, k), ())),
        }
        for k, turn in enumerate(trajectory.turns)
    ]
    return {
        "update": update,
        "split": split,
        "id": trajectory.id,
        "task_id": trajectory.task_id,
        "instruction": shorten(trajectory.instruction, MAX_TEXT),
        "reward": trajectory.reward,
        "success": trajectory.success,
        "stop_reason": str(trajectory.stop_reason),
        "error": shorten(trajectory.error, MAX_TEXT),
        "turns": turns,
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a file: an unfinished last one (a crash, a run going on) is left out.

    Raises:
        ValueError: there is no such file, or a complete line is not a JSON object.
    """
    try:
        # Split at "\n" alone: str.splitlines would also split at U+2028, which JSON text may hold.
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is not valid JSON: {error}. Remove the line."
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {number} must be a JSON object, got {type(record).__name__}."
            )
        records.append(record)
    return records


def finite_or_null(value: Any) -> Any:
    """`value` with None for every NaN and infinity in it: strict JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def json_line(record: Mapping[str, Any]) -> bytes:
    """A record as a line of a file."""
    text = json.dumps(finite_or_null(record), ensure_ascii=False, allow_nan=False)
    # Agents can produce lone surrogates; their backslash form is the JSON escape for them.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def repair(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave the complete lines that `keep` wants.

    Raises:
        ValueError: a line is not what is written there.
    """
    if not path.is_file():
        return
    kept = []
    for number, line in enumerate(read_jsonl(path), start=1):
        try:
            kept += [json_line(line)] * keep(line)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is not one of a run ({type(error).__name__}: {error}). "
                "Remove the line."
            ) from error
    write_atomic(path, b"".join(kept))
