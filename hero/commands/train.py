"""`hero train` and `hero sft`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from hero import recipes
from hero.checks import from_dict
from hero.commands.base import Command, make_importable, prepare_torch, saved_settings
from hero.config import SftConfig, TrainConfig
from hero.report.console import Console
from hero.report.tracking import METRICS, refuse_to_replace

if TYPE_CHECKING:
    from hero.trainer import Trainer


@dataclass(kw_only=True)
class Train(Command):
    """Train an agent: a recipe or a file of settings, and options that override it."""

    recipe: Annotated[str, Positional, arg(metavar="RECIPE")] = ""
    """Name of a recipe; `hero recipes` lists them."""
    config: str = ""
    """YAML file of settings, on top of the recipe."""
    settings: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)

    def with_defaults(self) -> Train:
        resume = self.settings.resume
        if resume in ("never", "auto"):
            return replace(self, settings=_settings(TrainConfig, self.recipe, self.config, "train"))
        data = saved_settings(Path(resume)) | {"output_dir": resume, "resume": resume}
        return replace(self, settings=from_dict(data))

    def run(self) -> None:
        config = self.settings
        if not self.recipe and not self.config and config == TrainConfig():
            raise ValueError(
                "hero train needs something to train. Take a recipe: hero train quickstart (`hero "
                "recipes` lists them); or a file: hero train --config my.yaml; or say it in "
                "options: hero train --env.name my_module:MyEnv --model.path MODEL."
            )
        name = self.recipe or (Path(self.config).stem if self.config else "train")
        run_dir = _run_folder(config, name)
        config.output_dir = str(run_dir)
        make_importable(config.env.name)

        from hero.checkpoint import BrokenCheckpoint
        from hero.report.viewer import render
        from hero.trainer import Trainer
        from hero.types import Fault

        prepare_torch(config.threads)
        console = Console()
        trainer = Trainer(config, run_dir, name, console)
        try:
            trainer.run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_go_on(trainer)) from None
        except BrokenCheckpoint:
            raise
        except (ValueError, OSError, Fault) as mistake:
            mistake.__notes__ = [_how_to_go_on(trainer)]  # type: ignore[union-attr]  # Python 3.10
            raise
        report = render(run_dir)
        console.say(f"Best model: {run_dir / 'best'}")
        console.say(
            f"Report:     {report}  (open it in a browser; hero view {run_dir} makes it again)"
        )


@dataclass(kw_only=True)
class Sft(Command):
    """Warm start: supervised episodes, answers with hindsight, diagnoses."""

    recipe: Annotated[str, Positional, arg(metavar="RECIPE")] = ""
    """Name of a recipe; `hero recipes` lists them."""
    config: str = ""
    """YAML file of settings, on top of the recipe."""
    settings: Annotated[SftConfig, arg(name="")] = field(default_factory=SftConfig)

    def with_defaults(self) -> Sft:
        return replace(self, settings=_settings(SftConfig, self.recipe, self.config, "sft"))

    def run(self) -> None:
        config = self.settings
        if not self.recipe and not self.config and config == SftConfig():
            raise ValueError(
                "hero sft needs something to train. Take a recipe: hero sft tiny-shop; or a file: "
                "hero sft --config my.yaml; or say it in options: hero sft --env.name "
                "my_module:MyEnv --model.path MODEL."
            )
        refuse_to_replace(Path(config.output_dir))
        make_importable(config.env.name)

        from hero.sft import train_sft

        prepare_torch(config.threads)
        console = Console()
        console.say(f"Model: {train_sft(config, console)}")


def _settings(cls: Any, recipe: str, file: str, kind: str) -> Any:
    data = recipes.load_recipe(recipe, kind) if recipe else {}
    if file:
        data = recipes.merge(data, recipes.load_file(file, kind))
    return from_dict(data, cls)


def _run_folder(config: TrainConfig, name: str) -> Path:
    """Where the run goes: the folder to go on from, or one that holds nothing of anybody else's."""
    from hero.checkpoint import find_state

    if config.resume not in ("never", "auto"):
        if Path(config.output_dir) != Path(config.resume):
            raise ValueError(
                f"--resume {config.resume} goes on in that folder, got --output-dir "
                f"{config.output_dir} too: leave one of them out."
            )
        return Path(config.resume)
    if config.resume == "auto" and not config.output_dir:
        raise ValueError(
            "--resume auto needs --output-dir: it goes on from the checkpoint there, if there is "
            "one."
        )
    run_dir = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if find_state(run_dir) is None:
        if not (run_dir / METRICS).is_file():  # of a run that ended before its first checkpoint
            refuse_to_replace(run_dir)
    elif config.resume == "never":
        raise ValueError(
            f"{run_dir} already holds a run: go on from it with --resume {run_dir}, or name "
            "another --output-dir."
        )
    return run_dir


def _how_to_go_on(trainer: Trainer) -> str:
    if trainer.state.update == 0:
        return "No update was finished, so nothing is lost."
    update, run = trainer.state.update, trainer.run_dir
    return f"Saved after update {update}. Go on with: hero train --resume {run}"
