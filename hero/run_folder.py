"""The folder of a run: who may write there, what a run that goes on may change, what is kept.

A run leaves config.json, metrics.jsonl, trajectories.jsonl, before.json, best/ (the best model on
dev), checkpoint/ (to go on from), summary.json, and `lock`, which says who is writing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from hero.checkpoint import checkpoints
from hero.checks import from_dict
from hero.config import Settings, TrainConfig, redacted
from hero.files import LOCK, only_writer, refuse_to_replace, sweep, write_atomic
from hero.report.tracking import METRICS
from hero.types import Fault

CONFIG, BEFORE, SUMMARY, BEST, SELECTED = (
    "config.json", "before.json", "summary.json", "best", "selected",
)  # fmt: skip
FREE = {"updates", "max_env_turns", "threads", "output_dir", "resume", "resume_anyway",
        "save_every", "save_trajectories", "report_to", "eval", "engine", "model.device",
        "model.gradient_checkpointing", "model.compile", "teacher.offload",
        "optim.micro_batch_tokens", "micro_batch_tokens",
        "rollout.batch_size", "loss.impl", "reflection.base_url",
        "reflection.api_key_env"}  # fmt: skip
"""Settings that a run may change when it goes on: where, how long and how fast, not what."""


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes here meanwhile; the lock of a process that was killed does not hold.

        Raises:
            Fault: another process has the folder.
            ValueError: it holds what is not a run's.
        """
        self._refuse_foreign()
        self.path.mkdir(parents=True, exist_ok=True)
        with only_writer(self.path, "training", "--output-dir"):
            sweep(self.path)
            yield

    def check(self, config: TrainConfig) -> None:
        """Refuse, before anything is loaded or written, what must not be done in this folder.

        Raises:
            ValueError: there is nothing to go on from, something is here that would be lost, or
                the run that is here was made with other settings.
        """
        if checkpoints(self.path):
            if config.resume == "never":
                raise ValueError(
                    f"{self.path} already holds a run: go on from it with --resume "
                    f"{quote(str(self.path))}, or name another --output-dir."
                )
            self._same_run(config)
            return
        if config.resume not in ("never", "auto"):
            raise ValueError(
                f"{self.path} holds no checkpoint to go on from. Start anew with --resume never "
                "and another --output-dir."
            )
        if (self.path / METRICS).is_file():
            raise ValueError(
                f"{self.path} holds the logs of a run, but no checkpoint: nothing of it is "
                "replaced. Put its checkpoint/ back, or name another --output-dir."
            )
        self._refuse_foreign()

    def _refuse_foreign(self) -> None:
        """Only a folder that a run has locked before, or an empty one, is taken."""
        lock = self.path / LOCK
        locked = lock.read_bytes() if lock.is_file() else b""
        unsaid = lock.is_file() and not locked and len(os.listdir(self.path)) == 1  # killed there
        if not (unsaid or locked.startswith(b"process ") or checkpoints(self.path)):
            refuse_to_replace(self.path)

    def begin(self, config: TrainConfig) -> bool:
        """Write config.json; returns whether the run goes on from a checkpoint.

        Raises:
            ValueError: as `check`.
        """
        self.check(config)
        kept = {**redacted(config), "resume_anyway": False}  # it was said once, not for ever
        write_atomic(self.path / CONFIG, json.dumps(kept, indent=1))
        return bool(checkpoints(self.path))

    def _same_run(self, config: TrainConfig) -> None:
        changed = self.differences(config)
        if changed and not config.resume_anyway:
            raise ValueError(
                f"{self.path} holds a run with other settings:\n" + "\n".join(changed) + "\n"
                "Go on with the run's own, name another --output-dir, or, if the change is meant, "
                "add --resume-anyway."
            )

    def differences(self, config: Settings) -> list[str]:
        """What differs from the settings that the run here was made with, a line each.

        Raises:
            ValueError: they cannot be read.
        """
        saved = self.path / CONFIG
        try:
            text = saved.read_text(encoding="utf-8")
            before = flat(redacted(from_dict(json.loads(text), type(config))))
        except OSError as error:
            raise ValueError(f"Cannot read {saved}: {error.strerror}.") from error
        except ValueError as error:
            raise ValueError(
                f"{saved} is not the configuration of a run of this version: {error}"
            ) from error
        return [
            f"  {name}: {before.get(name)!r} in the run, {value!r} now"
            for name, value in flat(redacted(config)).items()
            if before.get(name) != value and not _is_free(name)
        ]

    def read_before(self) -> dict[str, Any] | None:
        """The evaluation before training; None if there was none.

        Raises:
            Fault: it was cut or changed.
        """
        path = self.path / BEFORE
        if not path.exists():
            return None
        try:
            before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if not before["per_task"]:
                raise ValueError("it holds no task")
            for figures in (before, *before["per_task"].values()):
                if missing := {"success", "score", "turns"} - figures.keys():
                    raise ValueError(f"it lacks {min(missing)}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Fault(
                f"{path} cannot be read ({type(error).__name__}: {error}). The training itself is "
                "whole: remove the file to go without the comparison, or evaluate with hero eval."
            ) from error
        return before


def played_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """How the settings of a run have its test tasks played, named as `hero eval` names them."""
    found = {name: saved[name] for name in ("env", "rollout", "seed")}
    found |= {name: saved["eval"][name] for name in ("temperature", "trials")}
    return found | {name: saved["model"][name] for name in ("device", "dtype")}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; the options of an environment stay together."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name != "options":
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _is_free(name: str) -> bool:
    return name in FREE or name.partition(".")[0] in FREE
