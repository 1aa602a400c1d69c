"""What a study compares, read from YAML, and what may not differ between its arms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen

from hero.checks import from_dict
from hero.config import Count, Settings, SftConfig, TrainConfig, redacted
from hero.config.kinds import Positive
from hero.files import write_atomic
from hero.recipes import load_recipe, merge, read_yaml, recipe_path
from hero.types import Fault

FORMAT = 1
"""Of the study's folder; raised when rows of before cannot stand beside rows of now."""
SAME = ("env.name", "env.reward", "prompts", "rollout.max_turns", "rollout.max_turn_tokens",
        "rollout.max_episode_tokens", "rollout.temperature", "rollout.top_p")  # fmt: skip
"""Settings in which arms that are compared may not differ."""
RATES = "rates.json"
"""Dev success of each learning rate, by `START/ARM`."""
BASE = "base"
"""The arm that is not trained: the start itself."""
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
    like: dict[str, str] = field(default_factory=dict)
    """Arms that have settings and learning rate of another, but for their own settings."""
    controls: list[str] = field(default_factory=list)
    """Arms that must lose the gain of the first arm. They may be paid otherwise (`env.reward`)."""
    compared: list[str] = field(default_factory=list)
    """Arms that the report compares with all others, besides the first."""
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
    smoke: dict[str, Any] = field(default_factory=dict)
    """Changes for `--smoke`: minutes, to see that it runs. null takes an arm or a start away."""

    def of(self, arm: str) -> dict[str, Any]:
        """The settings of an arm, nested."""
        like = self.like.get(arm)
        basis = self.of(like) if like else merge(load_recipe(self.base), self.settings)
        return merge(basis, self.arms[arm])

    def rate_of(self, arm: str) -> str:
        """The arm whose learning rate an arm has."""
        return self.rate_of(self.like[arm]) if arm in self.like else arm

    def arms_at(self, start: str) -> list[str]:
        return self.only.get(start, list(self.arms))

    def seeds_of(self, arm: str) -> int:
        return min(self.seeds, self.fewer_seeds.get(arm, self.seeds))


def load_study(name: str, smoke: bool = False) -> StudyConfig:
    """A shipped study by name, or the user's own YAML file.

    Raises:
        ValueError: it cannot be read, its arms cannot be compared, or a name is unknown.
    """
    is_file = name.endswith((".yaml", ".yml"))
    data = read_yaml(name if is_file else recipe_path(name, "study"))
    if smoke:
        data = _without_null(merge(data, data.get("smoke") or {}))
    study = from_dict(data, StudyConfig)
    _check(study)
    return study


def _without_null(data: dict[str, Any]) -> dict[str, Any]:
    """A study without the arms and starts that are null, wherever they are named."""
    gone = {key for kind in ("starts", "arms") for key, v in data[kind].items() if v is None}
    for kind in ("starts", "arms", "only", "like", "fewer_seeds"):
        data[kind] = {k: v for k, v in data.get(kind, {}).items() if k not in gone}
    data["only"] = {k: [arm for arm in v if arm not in gone] for k, v in data["only"].items()}
    for kind in ("controls", "compared"):
        data[kind] = [arm for arm in data.get(kind, []) if arm not in gone]
    return data


def _check(study: StudyConfig) -> None:
    if study.marks != sorted(set(study.marks)):
        raise ValueError(f"marks must rise, got {study.marks}.")
    arms = {name: list(named) for name, named in (
        ("fewer_seeds", study.fewer_seeds), ("like", [*study.like, *study.like.values()]),
        ("controls", study.controls), ("compared", study.compared),
        *((f"only.{s}", a) for s, a in study.only.items()),
    )}  # fmt: skip
    for name, named in arms.items():
        _known(name, named, study.arms)
    _known("only", study.only, study.starts)
    for name in study.arms:
        if name == BASE or "/" in name:
            raise ValueError(f"An arm cannot be called {name!r}: it names a folder of its own.")
        _refuse_circle(study, name)
    first, *others = (
        (arm, _comparable(study.of(arm), is_control=arm in study.controls)) for arm in study.arms
    )
    for arm, settings in others:
        for name, value in settings.items():
            if value != first[1][name]:
                raise ValueError(
                    f"The arms {first[0]} and {arm} cannot be compared: {name} is "
                    f"{first[1][name]!r} for one and {value!r} for the other. Give both the same."
                )
    for start, settings in study.starts.items():
        _check_start(start, settings, first[1])


def _known(name: str, named: Iterable[str], there: Iterable[str]) -> None:
    if unknown := set(named) - set(there):
        raise ValueError(
            f"{name}: unknown {', '.join(sorted(unknown))}; there are {', '.join(there)}."
        )


def _refuse_circle(study: StudyConfig, arm: str) -> None:
    seen = [arm]
    while (following := study.like.get(seen[-1])) is not None:
        if following in seen:
            raise ValueError(f"like goes in a circle: {' -> '.join([*seen, following])}.")
        seen.append(following)


def _check_start(start: str, settings: dict[str, Any], world: dict[str, Any]) -> None:
    """A start that is made must be made in the arms' world and wording."""
    if set(settings) == {"model"}:
        return
    config = from_dict(settings, SftConfig)
    for name, own in (("prompts", config.prompts), ("env.name", config.env.name)):
        if own != world[name]:
            raise ValueError(
                f"The start {start} cannot be compared: its {name} is {own!r}, and that of the "
                f"arms {world[name]!r}. Give both the same."
            )


def _comparable(settings: dict[str, Any], is_control: bool) -> dict[str, Any]:
    config = from_dict(settings, TrainConfig)
    found: dict[str, Any] = {}
    for name in SAME:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = value
    options = config.env.options
    found["env.options"] = {k: options[k] for k in sorted(options) if k not in FREE_OPTIONS}
    if is_control:
        del found["env.reward"]
    return found


def claim_folder(study: StudyConfig, folder: Path) -> None:
    """Mark the folder as this study's; arms, starts and seeds may be added to one that exists.

    Raises:
        Fault: it holds another study; names the first difference.
    """
    resolved = {arm: study.of(arm) for arm in study.arms}
    now = {"format": FORMAT, **asdict(study), "resolved": resolved, "tasks": _tasks(study)}
    now = redacted(now)
    path = folder / "study.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in ("format", "base", "settings", "marks", "learning_rates", "tuning_seeds",
                     "tuning_marks", "dev_tasks", "test_tasks", "tasks"):  # fmt: skip
            if name in before:
                _same(folder, name, before[name], now[name])
        for kind in ("starts", "arms", "resolved"):
            there = before.get(kind, {})
            for name in there.keys() & now[kind].keys():
                _same(folder, f"{kind}.{name}", there[name], now[kind][name])
            now[kind] = there | now[kind]  # rows of what this study leaves out are still there
    elif folder.is_dir() and any(folder.iterdir()):
        raise Fault(f"{folder} is not empty and holds no study: name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(now, indent=1))


def chosen_rates(study: StudyConfig, folder: Path) -> dict[tuple[str, str], float]:
    """The learning rate of each (start, arm) that has one: `rates.json`'s best, ties the lower.

    Raises:
        ValueError: the study has not come to choosing them.
    """
    pairs = [(start, arm) for start in study.starts for arm in study.arms_at(start)]
    if len(study.learning_rates) == 1:
        return dict.fromkeys(pairs, study.learning_rates[0])
    try:
        text = (folder / RATES).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{folder} holds no finished run: hero study has to run first.") from error
    means: dict[str, dict[str, float]] = json.loads(text)
    best = {
        key: float(max(sorted(of, key=float), key=lambda rate: of[rate]))
        for key, of in means.items()
    }
    keys = {(start, arm): f"{start}/{study.rate_of(arm)}" for start, arm in pairs}
    return {pair: best[key] for pair, key in keys.items() if key in best}


def _tasks(study: StudyConfig) -> str:
    """A digest of the tasks of all splits in order, in which another catalogue shows."""
    from hero.envs import border
    from hero.envs.base import make_env

    config = from_dict(study.of(next(iter(study.arms))), TrainConfig)
    env = make_env(config.env.name, **config.env.options)
    splits = [border.tasks(env, split) for split in ("train", "dev", "test")]
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]


def _same(folder: Path, name: str, before: Any, now: Any) -> None:
    """Raise with the first setting that differs."""
    while isinstance(before, dict) and isinstance(now, dict) and before != now:
        keys = sorted(before.keys() | now.keys())
        key = next(key for key in keys if before.get(key) != now.get(key))
        name, before, now = f"{name}.{key}", before.get(key), now.get(key)
    if before != now:
        raise Fault(
            f"{folder} holds a study with {name} = {before!r}, and this one has {now!r}: rows of "
            "both may not be mixed. Name another folder."
        )
