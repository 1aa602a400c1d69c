"""From the words of a command line to a command with its settings."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, get_origin

import tyro
import yaml
from tyro.conf import subcommand
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from hero.checks import elsewhere, from_dict
from hero.commands.base import Command
from hero.commands.evaluate import Compare, Eval
from hero.commands.play import Play, Rollout
from hero.commands.probe import Probe
from hero.commands.study import Study
from hero.commands.tools import Doctor, Memory, Merge, Model, Recipes, View
from hero.commands.train import Sft, Train
from hero.commands.worlds import Env, Envs
from hero.config import Settings, SftConfig, TrainConfig
from hero.config.secrets import is_secret

HELP = ("-h", "--help")
OPTIONS = "--env.options"
NAMED: dict[str, type[Settings]] = {"train": TrainConfig, "sft": SftConfig}
"""Commands that know what their options are called in other tools."""
AnyCommand = (
    Annotated[Train, subcommand("train")]
    | Annotated[Sft, subcommand("sft")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Rollout, subcommand("rollout")]
    | Annotated[Probe, subcommand("probe")]
    | Annotated[Study, subcommand("study")]
    | Annotated[Memory, subcommand("memory")]
    | Annotated[View, subcommand("view")]
    | Annotated[Model, subcommand("model")]
    | Annotated[Merge, subcommand("merge")]
    | Annotated[Recipes, subcommand("recipes")]
    | Annotated[Envs, subcommand("envs")]
    | Annotated[Env, subcommand("env")]
    | Annotated[Doctor, subcommand("doctor")]
)


def parse(arguments: list[str]) -> Command:
    """The command of a command line, with its settings checked.

    It is read twice: first to know the recipe, file or run, then with their settings as defaults.
    Options of the environment change those of the recipe; `--env.options` alone drops them.

    Raises:
        SystemExit: after help (0), or after saying what cannot be read (2).
        ValueError: unknown recipes, settings that are out of range, and keys.
    """
    first: Any
    default: Any
    _refuse_secrets(arguments)
    arguments = _joined(arguments)
    try:
        first = _read([a for a in arguments if a not in HELP], tyro.MISSING_NONPROP, False)
        flags = {item.name: False for item in fields(first) if item.default is False}
        default = replace(first.with_defaults(), **flags)  # else a flag that is given turns it off
    except SystemExit:
        first = default = tyro.MISSING_NONPROP
    try:
        command = _read(arguments, default, True)
    except SystemExit as stop:
        if stop.code and arguments and arguments[0] in NAMED:
            _hint_at_names(arguments, NAMED[arguments[0]])
        raise
    if isinstance(command, Train | Sft | Play | Memory):
        data, env = asdict(command.settings), default.settings.env
        given = first.settings.env.options
        emptied = OPTIONS in arguments and not given
        kept = {} if emptied or env.name != command.settings.env.name else env.options
        data["env"]["options"] = kept | given
        command.settings = from_dict(data, type(command.settings))
    return command


def _refuse_secrets(arguments: list[str]) -> None:
    """Raise a ValueError for an option that would hold a key, which the parser would repeat."""
    for word in arguments:
        option = word.partition("=")[0]
        if option.startswith("--") and not option.startswith(OPTIONS) and is_secret(option):
            raise ValueError(
                f"There is no option {option}: others could read the key. Export it, and name its "
                "variable: --reflection.api-key-env NAME, or --engine.api-key-env NAME."
            )


def _joined(arguments: list[str]) -> list[str]:
    """With every `--env.options.data-dir DIR` as a pair of `--env.options`, at the end.

    Raises:
        ValueError: such an option has no value, or pairs would be lost.
    """
    words, pairs, rest = [], [], iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if not name.startswith(f"{OPTIONS}."):
            words.append(word)
            continue
        if not equals and (value := next(rest, "--")).startswith("--"):
            raise ValueError(f"{name} needs a value: {name} VALUE.")
        pairs += [name.removeprefix(f"{OPTIONS}.").replace("-", "_"), value]
    if sum(word.partition("=")[0] == OPTIONS for word in words) > 1:
        raise ValueError(
            f"{OPTIONS} is given twice, and the pairs of the first would be lost: put all pairs "
            f"behind one {OPTIONS}."
        )
    if not pairs:
        return words
    if OPTIONS not in words:
        return [*words, OPTIONS, *pairs]
    at = words.index(OPTIONS) + 1
    return words[:at] + pairs + words[at:]


def _read(arguments: list[str], default: Any, is_shown: bool) -> Command:
    registry = ConstructorRegistry()
    registry.primitive_rule(_pairs)
    return tyro.cli(  # type: ignore[call-overload,no-any-return]
        AnyCommand, prog="hero", args=arguments, default=default, registry=registry,
        console_outputs=is_shown, description="HERO: agents that learn from hindsight.",
    )  # fmt: skip


def _pairs(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Dictionaries are written `KEY VALUE KEY VALUE …`, with values as in YAML."""
    if get_origin(info.type) is not dict:
        return None

    def read(words: list[str]) -> dict[str, Any]:
        if len(words) % 2:
            raise ValueError(f"expected pairs of KEY and VALUE, got {' '.join(words)}")
        return {
            name: _value(name, word) for name, word in zip(words[::2], words[1::2], strict=True)
        }

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY VALUE …",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
    )


def _value(name: str, word: str) -> Any:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError as error:
        raise ValueError(
            f"the value of {name} is not YAML: put quotation marks around it within those of the "
            """shell, as '"this"'"""
        ) from error


def _hint_at_names(arguments: list[str], settings: type[Settings]) -> None:
    """Say what an option of another tool is called here."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and (meant := elsewhere(settings, name, name)):
            flags = " or ".join(f"--{path}" for path in meant.replace("_", "-").split(" or "))
            print(f"hint: {argument} is {flags} here", file=sys.stderr)
