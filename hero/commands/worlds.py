"""`hero envs` and `hero env`: which environments there are, a new one, and whether one is sound."""

from __future__ import annotations

import importlib.util
import inspect
import keyword
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from hero.commands.base import Command, make_importable
from hero.config.kinds import EnvOptions
from hero.files import write_atomic
from hero.report.console import Console
from hero.types import Fault

SCAFFOLD = Path(__file__).parents[1] / "assets" / "scaffold"
SHOWN_TASKS = 30
"""Ids of one list that are printed."""


@dataclass(kw_only=True)
class OptionsOf:
    """The environment."""

    options: EnvOptions = field(default_factory=dict)
    """Its options: `--env.options.NAME VALUE`, or pairs of NAME and VALUE."""


@dataclass(kw_only=True)
class Envs(Command):
    """List the environments, what each lacks and how to get it; or describe one.

    `hero envs NAME` tells options, splits and what results depend on; `hero envs get NAME` fetches
    the data of one whose data may be fetched.
    """

    words: Annotated[list[str], Positional, arg(metavar="[get] NAME")] = field(default_factory=list)
    """Environment to describe, or `get` and the one whose data to fetch."""
    env: OptionsOf = field(default_factory=OptionsOf)

    def run(self) -> None:
        from hero.envs.registry import worlds

        console = Console()
        if self.words[:1] == ["get"] and len(self.words) == 2:
            _get(self.words[1], console)
            return
        if len(self.words) > 1:
            raise ValueError(f"Expected NAME or get NAME, got {' '.join(self.words)}.")
        if self.words:
            _describe(self.words[0], self.env, console)
            return
        found = worlds()
        for name, world in found.items():
            state = f"lacks {', '.join(world.missing)}" if world.missing else "installed"
            console.say(f"{name:<10} {world.summary} ({state})")
            if world.missing:
                console.say(f"{'':<10} to get it: {world.install}")
            if world.data:
                console.say(f"{'':<10} you bring {world.data}")
        console.say("\nhero envs NAME describes one; hero env init NAME starts one of your own.")


def _get(name: str, console: Console) -> None:
    from hero.envs.registry import find, imported, worlds

    place = find(name).fetch
    if not place:
        some = ", ".join(name for name, world in worlds().items() if world.fetch)
        raise ValueError(f"{name} has no data to fetch; expected {some}. `hero envs` says more.")
    console.say(f"Data: {imported(place)(console.say)}")


def _describe(name: str, env: OptionsOf, console: Console) -> None:
    from hero.envs import border
    from hero.envs.base import HasDiagnosis, HasOracle, HasTools, make_env
    from hero.envs.registry import find, load

    make_importable(name)
    world = find(name)
    factory = load(world)
    console.say(f"{name}: {world.summary or getattr(factory, '__name__', name)}\n")
    console.say(f"{inspect.getdoc(factory) or ''}\n\noptions: {_signature(factory)}")
    try:
        made = make_env(name, **env.options)
    except ValueError as reason:
        console.say(f"\nNot made here: {reason}")
        return
    sizes = [f"{split} {len(border.tasks(made, split))}" for split in ("train", "dev", "test")]
    console.say(f"\ntasks: {', '.join(sizes)}")
    has = {"oracle": HasOracle, "diagnosis": HasDiagnosis, "tools": HasTools}
    console.say(f"has: {', '.join(k for k, kind in has.items() if isinstance(made, kind)) or '-'}")
    for fact, value in border.facts(made).items():
        console.say(f"{fact}: {value}")
    if hasattr(made, "trivial_tasks"):
        trivial = sorted(made.trivial_tasks())
        more = " …" if len(trivial) > SHOWN_TASKS else ""
        shown = ", ".join(trivial[:SHOWN_TASKS])
        console.say(f"solved by doing nothing ({len(trivial)}): {shown or 'none'}{more}")


def _signature(factory: object) -> str:
    """The options and their defaults, one a line."""
    lines = []
    for option in inspect.signature(factory).parameters.values():  # type: ignore[arg-type]
        default = "needed" if option.default is option.empty else repr(option.default)
        lines.append(f"  {option.name.replace('_', '-'):<20} {default}")
    return "\n" + "\n".join(lines) if lines else "none"


@dataclass(kw_only=True)
class Env(Command):
    """An environment of your own: `init NAME` writes one to start from, `check NAME` tries it."""

    task: Annotated[Literal["init", "check"], Positional]
    """init: write NAME.py and NAME.yaml here. check: try every rule of the contract."""
    name: Annotated[str, Positional, arg(metavar="NAME")]
    """init: a Python name. check: an environment's name, or module:Class."""
    env: OptionsOf = field(default_factory=OptionsOf)
    episodes: int = 20
    """check: episodes played for each rule that needs some."""
    timeout: float = 60.0
    """check: seconds in which it must answer each time, and be made."""

    def run(self) -> None:
        if self.task == "init":
            _init(self.name, Console())
        else:
            self._check(Console())

    def _check(self, console: Console) -> None:
        from hero.envs.check import Verdict, check, table

        if self.episodes < 1:
            raise ValueError(f"episodes={self.episodes}; expected at least 1.")
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout:g}; expected a number of seconds above 0.")
        make_importable(self.name)
        findings = check(self.name, self.env.options, self.episodes, self.timeout)
        console.say(table(findings))
        faults = sum(finding.verdict is Verdict.FAULT for finding in findings)
        if faults:
            raise Fault(f"{self.name} breaks {faults} of {len(findings)} rules (see FAULT above).")


def _init(name: str, console: Console) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"{name!r} is not a module name: use lower-case letters, digits and _.")
    world = "".join(part.capitalize() for part in name.split("_")) + "Env"
    files = {Path(f"{name}{end}"): SCAFFOLD / f"custom_env{source}"
             for end, source in ((".py", ".py.txt"), (".yaml", ".yaml"))}  # fmt: skip
    for path in files:
        if path.exists():
            raise ValueError(f"{path} is there already: take another name, or move it away.")
    if keyword.iskeyword(name) or importlib.util.find_spec(name):
        raise ValueError(
            f"{name} is a word of Python's or a module that is installed; {name}.py would not be "
            "found, or be taken for it: use another name."
        )
    for path, source in files.items():
        text = source.read_text(encoding="utf-8")
        write_atomic(path, text.replace("custom_env", name).replace("NoteEnv", world))
    console.say(
        f"Written: {' and '.join(map(str, files))}. Next:\n"
        f"  hero env check {name}:{world}\n"
        f"  hero train --config {name}.yaml --model.path MODEL"
    )
