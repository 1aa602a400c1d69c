"""Environments by name: those of the box, those of installed packages, those a program registers.

A package adds its own by an entry point of the group `hero.envs`:

    [project.entry-points."hero.envs"]
    crossword = "my_package.crossword:CrosswordEnv"
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, cast

GROUP = "hero.envs"
INSTALL = "pip install 'hero-kernels[{}]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """One environment that has a name."""

    factory: str | Callable[..., Any]
    """`module:Class`, or what makes an environment from the options."""
    summary: str = ""
    """One line for `hero envs`."""
    modules: tuple[str, ...] = ()
    """What must be importable, beyond hero itself."""
    install: str = ""
    """The command that brings `modules`."""
    data: str = ""
    """What the user must bring, and with which option it is named."""
    fetch: str = ""
    """`module:function` that `hero envs get NAME` calls."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The modules that are not installed."""
        return tuple(name for name in self.modules if importlib.util.find_spec(name) is None)


BUILTIN = {
    "shop": World(
        factory="hero.envs.shop:ShopEnv",
        summary="WebShop's protocol on a synthetic catalogue; plays anywhere",
    ),
    "tiny-desk": World(
        factory="hero.envs.tiny_desk:TinyDeskEnv",
        summary="customer service by house rules that show late, for small agents",
    ),
    "webshop": World(
        factory="hero.envs.webshop:WebShopEnv",
        summary="WebShop on its own products and goals",
        modules=("Stemmer",),
        install=INSTALL.format("webshop"),
        data="WebShop's files: --env.options.data-dir DIR",
    ),
    "tau": World(
        factory="hero.envs.tau:TauEnv",
        summary="tau-bench: customer service with tools, a policy and a user",
        modules=("tau2", "mcp"),
        install=INSTALL.format("tau"),
    ),
    "bfcl": World(
        factory="hero.envs.bfcl:BfclEnv",
        summary="BFCL multi-turn: function calls over several requests of a user",
        data="its data, 2 MB: hero envs get bfcl",
        fetch="hero.envs.bfcl.package:fetch",
    ),
    "tools": World(
        factory="hero.envs.tools:ToolsEnv",
        summary="a Python class whose public methods are the tools",
        data="your class: --env.options.factory module:Class",
    ),
    "gym": World(
        factory="hero.envs.gym:GymEnv",
        summary="gymnasium's text worlds, with discrete actions as words",
        modules=("gymnasium",),
        install=INSTALL.format("gym"),
    ),
    "textarena": World(
        factory="hero.envs.textarena:TextArenaEnv",
        summary="TextArena's games for one player",
        modules=("textarena",),
        install=INSTALL.format("textarena"),
    ),
    "textworld": World(
        factory="hero.envs.textworld:TextWorldEnv",
        summary="TextWorld-Express: eight text games, needs Java",
        modules=("textworld_express",),
        install=INSTALL.format("textworld"),
    ),
    "openenv": World(
        factory="hero.envs.openenv:OpenEnv",
        summary="any OpenEnv server, over its client",
        modules=("openenv",),
        install=INSTALL.format("openenv"),
        data="a running server: --env.options.url URL",
    ),
}
_registered: dict[str, World] = {}


def register(
    name: str, factory: str | Callable[..., Any], *, summary: str = "", install: str = ""
) -> None:
    """Give an environment a name, for `env.name` and `make_env`.

    Args:
        name: letters, digits, `-` and `_`.
        factory: class or function that makes an environment from the options, or where it is,
            `module:Class`. Runs in other processes find it by an entry point only.
        summary: one line for `hero envs`.
        install: what to run if it cannot be imported.

    Raises:
        ValueError: the name is taken, or is none.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(
            f"{name!r} is not a name for an environment: use letters, digits, - and _."
        )
    known = worlds().get(name)
    if known is not None and known.factory != factory:
        raise ValueError(
            f"An environment named {name!r} is there already ({known.factory}): use another name."
        )
    _registered[name] = World(factory=factory, summary=summary, install=install)


def worlds() -> dict[str, World]:
    """All environments that have a name; ours win over those of packages."""
    return {**_of_packages(), **_registered, **BUILTIN}


@cache
def _of_packages() -> dict[str, World]:
    return {
        entry.name: World(
            factory=entry.value,
            summary=f"of the package {entry.dist.name}" if entry.dist else "of a package",
        )
        for entry in entry_points(group=GROUP)
    }


def find(name: str) -> World:
    """The environment of a name, or of `module:Class`.

    Raises:
        ValueError: there is none, or something that it needs is not installed.
    """
    world = worlds().get(name) or World(factory=name)
    if isinstance(world.factory, str) and ":" not in world.factory:
        raise ValueError(
            f"Unknown environment {name!r}: expected one of {', '.join(sorted(worlds()))} (`hero "
            "envs` describes them) or 'package.module:Class'."
        )
    if world.missing:
        raise ValueError(
            f"The environment {name!r} needs {' and '.join(world.missing)}, not installed here. "
            f"Run: {world.install}"
        )
    return world


def load(world: World) -> Callable[..., Any]:
    """What makes the environment; imports it."""
    return world.factory if callable(world.factory) else imported(world.factory)


def imported(place: str) -> Callable[..., Any]:
    """The class or function at `module:name`."""
    module, _, attribute = place.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return cast(Callable[..., Any], found)
