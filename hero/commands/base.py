"""What all commands share.

Whatever needs torch is imported where a command runs, so that help and mistakes are answered at
once.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import FlagCreatePairsOff

from hero.checks import from_dict
from hero.envs.registry import find

RUNS_OWN = {"env", "eval", "mode", "model", "rollout"}
"""Settings that every run has saved, and no other program's config.json."""
OF_THE_USER = ("tools", "gym")
"""Environments whose options may name a class or function of the user."""


@dataclass(kw_only=True)
class Command(ABC):
    """Base of all commands."""

    debug: Annotated[bool, FlagCreatePairsOff] = False
    """Show the traceback of a mistake."""
    takes_ranks: ClassVar[bool] = False
    """Whether several processes of a launcher can run it together."""

    def with_defaults(self) -> Command:
        """The command with the settings of the recipe, file or run that it names."""
        return self

    @abstractmethod
    def run(self) -> None:
        """Do what the command is for."""


def saved_settings(run: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        ValueError: `run` is not the folder of a run of this version.
    """
    saved = run / "config.json"
    try:
        settings = json.loads(saved.read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or not settings.keys() >= RUNS_OWN:
            raise ValueError(f"expected the settings {', '.join(sorted(RUNS_OWN))} and others")
        return asdict(from_dict(settings))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{run} is not the folder of a run: cannot read {saved}: {error}"
        ) from error


def make_importable(env_name: str) -> None:
    """Let a class of the user be found in this folder, after all that is installed.

    Raises:
        ValueError: there is no such environment, or something that it needs is not installed.
    """
    find(env_name)
    if (":" in env_name or env_name in OF_THE_USER) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def prepare_torch(threads: int | None, debug: bool = False) -> None:
    """Settings of the whole process; what libraries have to say is heard only with `debug`."""
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    if not debug:
        warnings.simplefilter("ignore")
        set_verbosity_error()
        disable_progress_bar()  # of weights being read and written
    if threads:
        torch.set_num_threads(threads)
