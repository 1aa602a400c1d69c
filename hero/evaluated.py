"""Evaluations on disk: the folder that `hero eval` fills, and what else can be read as one.

A folder holds settings.json, episodes.jsonl (one line an episode, written when it is over) and, at
the end, eval.json. An interrupted evaluation goes on with the episodes that are missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hero.evaluation import Evaluation, figures, summarise_figures
from hero.files import refuse_to_replace, write_atomic
from hero.learner import Learned
from hero.report.tracking import TRAJECTORIES, json_line, read_jsonl, repair, trajectory_record
from hero.run_folder import CONFIG, SUMMARY, flat, played_settings
from hero.types import Trajectory

SETTINGS, EPISODES, RESULT = "settings.json", "episodes.jsonl", "eval.json"
FREE = {"device"}
"""Settings that say where an evaluation runs, not what it is."""


@dataclass(kw_only=True)
class Evaluated:
    """An evaluation of one model, from wherever."""

    name: str
    result: dict[str, Any]
    """An `Evaluation`; of a run only success, score and turns may be known."""
    episodes: list[dict[str, Any]] = field(default_factory=list)
    """Records as `hero view` shows them, of all episodes or of some."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Names of settings, with dots, and their values; empty if they are not known."""
    world: dict[str, str] = field(default_factory=dict)
    """What the results depend on beside them: versions of data, who played the user."""


class EvalFolder:
    """The evaluation of one model under way."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Begin, or go on with what is there.

        Raises:
            ValueError: the folder holds an evaluation with other settings, or something else.
        """
        self.path, self.split = path, settings["split"]
        saved = path / SETTINGS
        if saved.is_file():
            changed = difference(_read(saved), json.loads(json.dumps(settings)))
            if changed:
                raise ValueError(
                    f"{path} holds an evaluation with other settings:\n" + "\n".join(changed) + "\n"
                    "Name another --output, or repeat its settings to go on with it."
                )
            is_over = (path / RESULT).is_file()  # else broken episodes are played again
            repair(path / EPISODES, lambda record: is_over or not record["figures"]["error"])
        else:
            refuse_to_replace(path)
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(saved, json.dumps(settings, indent=1))
        lines = read_jsonl(path / EPISODES) if (path / EPISODES).is_file() else []
        self.done = {record["id"] for record in lines}
        """Episodes that need not be played any more."""
        self._last = time.monotonic()

    def add(self, trajectory: Trajectory, pieces: Callable[[list[int]], list[str]]) -> None:
        """Write an episode down; `seconds` is the time since the one before it."""
        now = time.monotonic()
        record = trajectory_record(
            trajectory, (), Learned(), pieces=pieces, update=None, split=self.split
        )
        record |= {"figures": figures(trajectory), "seconds": now - self._last}
        self._last = now
        with (self.path / EPISODES).open("ab") as file:
            file.write(json_line(record))

    def close(self, world: dict[str, str]) -> Evaluation:
        """Write eval.json from all episodes; the folder is complete."""
        records = read_jsonl(self.path / EPISODES)
        result = summarise_figures([(r["task_id"], r["figures"]) for r in records])
        seconds = sum(record["seconds"] for record in records)
        found = {"world": world, "seconds": seconds, **result.to_dict()}
        write_atomic(self.path / RESULT, json.dumps(found, indent=1))
        return result


def difference(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lines that say which settings differ."""
    one, other = flat(before), flat(now)
    return [
        f"  {name}: {one.get(name)!r} there, {other.get(name)!r} here"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name) and name not in FREE
    ]


def read_evaluated(path: Path) -> Evaluated | None:
    """The evaluation in a folder of `hero eval`, or the one at the end of a run; None if neither.

    Raises:
        ValueError: it is not finished, or cannot be read.
    """
    folder = path.parent if path.name == RESULT else path
    if (folder / SETTINGS).is_file() and (folder / EPISODES).is_file():
        if not (folder / RESULT).is_file():
            raise ValueError(
                f"{folder} holds an evaluation that is not finished: run the same hero eval again, "
                "it goes on where it stopped."
            )
        settings = _read(folder / SETTINGS)
        name, _ = settings.pop("model"), settings.pop("weights")
        result, episodes = _read(folder / RESULT), read_jsonl(folder / EPISODES)
        return Evaluated(name=name, result=result, settings=settings, episodes=episodes,
                         world=result.get("world", {}))  # fmt: skip
    summary = _read(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    if after := summary.get("after"):
        kept = folder / TRAJECTORIES
        records = read_jsonl(kept) if kept.is_file() else []
        records = [record for record in records if record["split"] == "after"]
        settings = played_settings(_read(folder / CONFIG))
        return Evaluated(name=str(path), result=after, episodes=records, settings=settings,
                         world=summary.get("world", {}))  # fmt: skip
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"Cannot read {path}: {error}") from error
