"""What a study compares, read from YAML, and what may not differ between its arms."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import MinLen

from hero.checks import from_dict
from hero.config import Count, Settings, TrainConfig
from hero.config.kinds import Positive
from hero.files import write_atomic
from hero.recipes import load_recipe, merge
from hero.types import Fault

FORMAT = 1
"""Of the study's folder; raised when rows of before cannot stand beside rows of now."""
SAME = ("env.name", "env.reward", "prompts", "rollout.max_turns", "rollout.max_turn_tokens",
        "rollout.max_episode_tokens", "rollout.temperature", "rollout.top_p")  # fmt: skip
"""Settings in which arms that are compared may not differ."""
FREE_OPTIONS = ("hints",)
"""Options of the environment that change what a reflector says, and not the world."""


@dataclass(kw_only=True)
class StudyConfig(Settings):
    """A grid of arms, starts and seeds, each run judged at several budgets of environment turns."""

    base: str
    """Recipe that all arms are based on."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of all arms on top of it."""
    starts: Annotated[dict[str, dict[str, Any]], MinLen(1)]
    """Warm starts by name: settings of `hero sft` (made once), or a `model` to take as it is."""
    arms: Annotated[dict[str, dict[str, Any]], MinLen(1)]
    """Settings of each arm on top of those of all."""
    seeds: Count = 5
    """Runs of each arm, seeds 0, 1, …"""
    fewer_seeds: dict[str, Count] = field(default_factory=dict)
    """Arms that have fewer, such as controls."""
    only: dict[str, list[str]] = field(default_factory=dict)
    """Starts at which a part of the arms is run: arms by start."""
    marks: Annotated[list[Count], MinLen(1)]
    """Budgets of environment turns, rising. A run goes through all of them."""
    learning_rates: Annotated[list[Positive], MinLen(1)]
    """Each arm takes the one that is best for it on dev tasks."""
    tuning_seeds: Count = 2
    """Runs of each learning rate, with seeds that are not used again."""
    tuning_marks: Count = 1
    """Marks, from the first, that a learning rate is judged at."""
    dev_tasks: Count = 100
    test_tasks: Count = 200
    jobs: Count = 2
    """Runs side by side, one thread each."""

    def of(self, arm: str) -> dict[str, Any]:
        """The settings of an arm, nested."""
        return merge(merge(load_recipe(self.base), self.settings), self.arms[arm])

    def arms_at(self, start: str) -> list[str]:
        return self.only.get(start, list(self.arms))

    def seeds_of(self, arm: str) -> int:
        return min(self.seeds, self.fewer_seeds.get(arm, self.seeds))


def load_study(name: str) -> StudyConfig:
    """A shipped study by name, or the user's own YAML file.

    Raises:
        ValueError: it cannot be read, its arms cannot be compared, or a name is unknown.
    """
    shipped = Path(__file__).parents[1] / "recipes" / "study" / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        known = ", ".join(sorted(p.stem for p in shipped.parent.glob("*.yaml")))
        raise ValueError(
            f"Cannot read the study {name}: {error}. Shipped studies: {known}."
        ) from error
    study = from_dict(data, StudyConfig)
    _check(study)
    return study


def _check(study: StudyConfig) -> None:
    if study.marks != sorted(set(study.marks)):
        raise ValueError(f"marks must rise, got {study.marks}.")
    for start, arms in study.only.items():
        if start not in study.starts:
            raise ValueError(f"only: unknown start {start!r}; there are {', '.join(study.starts)}.")
        if unknown := set(arms) - set(study.arms):
            raise ValueError(f"only.{start}: unknown arms {', '.join(sorted(unknown))}.")
    if unknown := set(study.fewer_seeds) - set(study.arms):
        raise ValueError(f"fewer_seeds: unknown arms {', '.join(sorted(unknown))}.")
    first, *others = ((arm, _comparable(study.of(arm))) for arm in study.arms)
    for arm, settings in others:
        for name, value in settings.items():
            if value != first[1][name]:
                raise ValueError(
                    f"The arms {first[0]} and {arm} cannot be compared: {name} is "
                    f"{first[1][name]!r} for one and {value!r} for the other. Give both the same."
                )


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    config = from_dict(settings, TrainConfig)
    found = {}
    for name in SAME:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = value
    options = config.env.options
    found["env.options"] = {k: options[k] for k in sorted(options) if k not in FREE_OPTIONS}
    return found


def claim_folder(study: StudyConfig, folder: Path) -> None:
    """Mark the folder as this study's; arms, starts and seeds may be added to one that exists.

    Raises:
        Fault: it holds another study; names the first difference.
    """
    now = {"format": FORMAT, **asdict(study)}
    path = folder / "study.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in ("format", "base", "settings", "marks", "learning_rates", "tuning_seeds",
                     "tuning_marks", "dev_tasks", "test_tasks"):  # fmt: skip
            _same(folder, name, before.get(name), now[name])
        for kind in ("starts", "arms"):
            for name in before[kind].keys() & now[kind].keys():
                _same(folder, f"{kind}.{name}", before[kind][name], now[kind][name])
    elif folder.is_dir() and any(folder.iterdir()):
        raise Fault(f"{folder} is not empty and holds no study: name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(now, indent=1))


def _same(folder: Path, name: str, before: Any, now: Any) -> None:
    if before != now:
        raise Fault(
            f"{folder} holds a study with {name} = {before!r}, and this one has {now!r}: rows of "
            "both may not be mixed. Name another folder."
        )
