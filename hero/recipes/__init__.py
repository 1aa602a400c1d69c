"""Recipes: settings in YAML files, shipped here or the user's own, one based on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hero.config import EnvConfig

FOLDER = Path(__file__).parent
KINDS = ("train", "sft", "study")
"""Commands that take recipes."""


def recipe_names(kind: str = "train") -> list[str]:
    return sorted(path.stem for path in (FOLDER / kind).glob("*.yaml"))


def recipe_summary(name: str, kind: str = "train") -> str:
    """The recipe's first line, a comment that says what it is for."""
    first = (FOLDER / kind / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ")


def load_recipe(name: str, kind: str = "train") -> dict[str, Any]:
    """The settings of a shipped recipe, nested, on top of those of its `base`.

    Raises:
        ValueError: there is no recipe of that name.
    """
    return load_file(recipe_path(name, kind), kind)


def recipe_path(name: str, kind: str) -> Path:
    """Where a shipped recipe lies.

    Raises:
        ValueError: there is no recipe of that name.
    """
    names = recipe_names(kind)
    if name not in names:
        own = "its path, ending in .yaml" if kind == "study" else "--config FILE"
        raise ValueError(
            f"Unknown recipe {name!r}: expected one of {', '.join(names)}. A file of your own goes "
            f"with {own}."
        )
    return FOLDER / kind / f"{name}.yaml"


def load_file(path: str | Path, kind: str = "train") -> dict[str, Any]:
    """The settings in a YAML file; `base: RECIPE` in it names the recipe that it changes.

    Raises:
        ValueError: the file cannot be read, or does not hold a mapping.
    """
    data = read_yaml(path)
    base = data.pop("base", None)
    return merge(load_recipe(base, kind) if base else {}, data)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, as it stands there.

    Raises:
        ValueError: the file cannot be read, or does not hold a mapping.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Strict)
    except OSError as error:
        raise ValueError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(data).__name__}.")
    return data


class _Strict(yaml.SafeLoader):
    """A setting that is given twice is a mistake: else the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key.value, str)]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{twice[0]} stands there twice: write its settings once",
                node.start_mark,
            )
        return super().construct_mapping(node, deep)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, nested.

    Options belong to the environment they were written for: naming another `env.name` starts with
    none, and `options: null` drops those of the base.
    """
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict):
            stands = merged.get(key)
            old = stands if isinstance(stands, dict) else {}
            named = old.get("name", EnvConfig.name)
            if key == "env" and value.get("name", named) != named:
                old = {name: setting for name, setting in old.items() if name != "options"}
            value = merge(old, value)
        merged[key] = {} if key == "options" and value is None else value
    return merged
