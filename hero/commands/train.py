"""`hero train` and `hero sft`."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from hero import recipes
from hero.checkpoint import BrokenCheckpoint
from hero.checks import from_dict
from hero.commands.base import Command, make_importable, prepare_torch, saved_settings
from hero.config import SftConfig, TrainConfig
from hero.files import refuse_to_replace
from hero.interrupt import Stopped
from hero.models import existing_model
from hero.ranks import open_ranks
from hero.report.console import Console
from hero.run_folder import RunFolder

if TYPE_CHECKING:
    from hero.trainer import Trainer


@dataclass(kw_only=True)
class FromRecipe(Command):
    """Base of the commands whose settings come from a recipe, a file and options, in this order."""

    recipe: Annotated[str, Positional, arg(metavar="RECIPE")] = ""
    """Name of a recipe; `hero recipes` lists them."""
    config: str = ""
    """YAML file of settings, on top of the recipe."""
    settings: Any

    def _stored(self, kind: str) -> dict[str, Any]:
        data = recipes.load_recipe(self.recipe, kind) if self.recipe else {}
        return recipes.merge(data, recipes.load_file(self.config, kind)) if self.config else data

    def _refuse_nothing(self, command: str, recipe: str) -> None:
        """Defaults alone are nobody's wish: say what the command needs."""
        if not self.recipe and not self.config and self.settings == type(self.settings)():
            raise ValueError(
                f"{command} needs something to train. Take a recipe: {command} {recipe} (`hero "
                f"recipes` lists them); or a file: {command} --config my.yaml; or say it in "
                f"options: {command} --env.name my_module:MyEnv --model.path MODEL."
            )


@dataclass(kw_only=True)
class Train(FromRecipe):
    """Train an agent: a recipe or a file of settings, and options that override it."""

    settings: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    takes_ranks = True

    def with_defaults(self) -> Train:
        data, resume = self._stored("train"), self.settings.resume
        if resume not in ("never", "auto"):
            if self.recipe:
                raise ValueError(
                    f"--resume {resume} goes on with the settings of that run: leave the recipe "
                    f"{self.recipe!r} out, and give what shall change as options."
                )
            data = recipes.merge(saved_settings(Path(resume)), data)
            data |= {"output_dir": resume, "resume": resume}
        return replace(self, settings=from_dict(data))

    def run(self) -> None:
        self._refuse_nothing("hero train", "quickstart")
        config = self.settings
        name = self.recipe or (Path(self.config).stem if self.config else "train")
        ranks = open_ranks(config.model.device)
        run_dir = ranks.on_first(partial(_run_folder, config, name))
        config.output_dir = str(run_dir)
        ranks.on_first(partial(RunFolder(run_dir).check, config))
        for model in filter(None, (config.model.path, config.teacher.path)):
            existing_model(model)
        make_importable(config.env.name)

        from hero.report.viewer import render
        from hero.trainer import Trainer
        from hero.types import Fault

        prepare_torch(config.threads, self.debug)
        console = Console()
        trainer = Trainer(config, run_dir, name, console, ranks=ranks)
        try:
            trainer.run()
        except KeyboardInterrupt as stop:
            number = getattr(stop, "number", signal.SIGINT)
            raise Stopped(number, _how_to_go_on(trainer)) from None
        except BrokenCheckpoint:
            raise
        except (ValueError, OSError, Fault) as mistake:
            if trainer.is_begun:  # else the folder was refused, and going on would be too
                mistake.add_note(_how_to_go_on(trainer))
            raise
        report = ranks.on_first(partial(render, trainer.run_dir))
        ranks.close()
        if not ranks.is_first:
            return
        console.say(f"Best model: {run_dir / 'best'}")
        if (run_dir / "selected").is_dir():
            console.say(f"Selected:   {run_dir / 'selected'}  (--eval.select)")
        again = f"hero view {quote(str(run_dir))}"
        console.say(f"Report:     {report}  (open it in a browser; {again} makes it again)")


@dataclass(kw_only=True)
class Sft(FromRecipe):
    """Warm start: supervised episodes, answers with hindsight, diagnoses."""

    settings: Annotated[SftConfig, arg(name="")] = field(default_factory=SftConfig)

    def with_defaults(self) -> Sft:
        return replace(self, settings=from_dict(self._stored("sft"), SftConfig))

    def run(self) -> None:
        self._refuse_nothing("hero sft", "tiny-shop")
        config = self.settings
        refuse_to_replace(Path(config.output_dir))
        if config.model.path:
            existing_model(config.model.path)
        make_importable(config.env.name)

        from hero.sft import train_sft

        prepare_torch(config.threads, self.debug)
        console = Console()
        try:
            console.say(f"Model: {train_sft(config, console)}")
        except KeyboardInterrupt as stop:
            number = getattr(stop, "number", signal.SIGINT)
            raise Stopped(number, "\n".join(getattr(stop, "__notes__", []))) from None


def _run_folder(config: TrainConfig, name: str) -> Path:
    """Where the run goes."""
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
    return Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _how_to_go_on(trainer: Trainer) -> str:
    if not trainer.is_begun:
        return "Nothing was begun, so nothing is lost."
    saved = f"after update {trainer.state.update}"
    if trainer.is_torn:
        saved = "at the last checkpoint, as the update was interrupted half-way"
    return f"Saved {saved}. Go on with: hero train --resume {quote(str(trainer.run_dir))}"
