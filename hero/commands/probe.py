"""`hero probe`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from hero import recipes
from hero.checks import from_dict
from hero.commands.play import PlayConfig, PlayOne
from hero.config import Count, PromptStyle
from hero.files import check_writable, write_atomic
from hero.report.console import Console
from hero.types import Trajectory


@dataclass(kw_only=True)
class ProbeConfig(PlayConfig):
    """What is probed."""

    split: str = "dev"  # type: ignore[assignment]
    """Which tasks: train, dev or test."""
    tasks: Count = 64
    """How many tasks of the split, from its start."""
    group_tasks: Count = 16
    """Tasks that are played eight times, to see what GRPO would see."""
    prompts: PromptStyle = "standard"
    """Wording of what teachers and reflectors read."""


@dataclass(kw_only=True)
class Probe(PlayOne):
    """Before training: can this model learn here, and from what? Minutes, nothing is trained."""

    study: str = ""
    """Folder of a study of this world: its fit of gap to gain tells what gain to expect."""
    settings: Annotated[ProbeConfig, arg(name="")] = field(default_factory=ProbeConfig)

    def with_defaults(self) -> Probe:
        played = super().with_defaults()
        data = asdict(played.settings)
        data |= {"split": "dev", "tasks": ProbeConfig.tasks}
        if self.recipe:
            data["prompts"] = recipes.load_recipe(self.recipe).get("prompts", ProbeConfig.prompts)
        return replace(self, settings=from_dict(data, ProbeConfig))

    def run(self) -> None:
        config = self.settings
        out = Path(self.output or "probe").absolute()
        beside = out.with_suffix(".html")
        if self.output:
            check_writable(self.output, '"well_formed"')
            check_writable(beside, "<title>hero probe")
        from hero.report.probe import page, report
        from hero.study.page import write_page

        trajectories, _ = self.played(self.model)
        of_tasks = replace(config, tasks=config.group_tasks, trials=8)
        grouped, _ = replace(self, settings=of_tasks).played(self.model)
        gaps, reflecting = self._contexts(trajectories)
        line = None
        if self.study:
            line = json.loads((Path(self.study) / "fit.json").read_text(encoding="utf-8"))
        text, figures = report(
            self.model, trajectories, grouped, config.env.reward, gaps, reflecting, line
        )
        Console().say(text)
        if self.output:
            write_atomic(out, json.dumps(figures, indent=1))
            write_page("\n".join(page(text, gaps)), None, beside, f"hero probe {self.model}")
            Console().say(f"Figures: {self.output}. Page with examples: {beside}.")

    def _contexts(self, trajectories: list[Trajectory]) -> Any:
        from hero.envs.base import make_env
        from hero.episodes import derive_seed
        from hero.probe import contexts

        config = self.settings
        basis = recipes.load_recipe(self.recipe) if self.recipe else {}
        own = {name: asdict(getattr(config, name)) for name in ("env", "rollout")}
        data = recipes.merge(basis, own | {"prompts": config.prompts})
        env = make_env(config.env.name, **config.env.options)
        return contexts(
            self.policy(self.model), data, env, trajectories, derive_seed(config.seed, 9)
        )
