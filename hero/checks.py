"""From nested dictionaries to settings, with one clear message for what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from hero.algorithms import MODES
from hero.config import Settings, TrainConfig
from hero.config.secrets import check_variable

C = TypeVar("C", bound=Settings)

FROM_TRL = {
    "bf16": "model.dtype",
    "beta": "loss.beta",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "eval_steps": "eval.every",
    "gradient_accumulation_steps": "optim.micro_batch_tokens",
    "load_in_4bit": "model.quantize",
    "lr": "optim.learning_rate",
    "max_completion_length": "rollout.max_turn_tokens",
    "max_prompt_length": "rollout.max_episode_tokens",
    "max_steps": "updates",
    "model_name_or_path": "model.path",
    "num_generations": "rollout.group_size",
    "num_iterations": "optim.inner_epochs",
    "num_train_epochs": "updates",
    "output_dir": "output_dir",
    "per_device_train_batch_size": "rollout.tasks_per_update",
    "resume_from_checkpoint": "resume",
    "save_steps": "save_every",
    "torch_compile": "model.compile",
}
"""What the arguments of TRL's trainers are called here, where the names differ."""
FROM_TRL_SFT = {
    "gradient_accumulation_steps": "micro_batch_tokens",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch_size",
}
"""The same for a warm start."""


def from_dict(data: dict[str, Any], cls: type[C] = TrainConfig) -> C:  # type: ignore[assignment]
    """Settings of the class `cls` from nested dictionaries.

    Raises:
        ValueError: names every field that is unknown or out of range, what was got and what was
        expected.
    """
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        lines = [_explain(cls, item) for item in error.errors()]
    if len(lines) == 1:
        raise ValueError(f"{lines[0]}.")
    raise ValueError("The configuration has mistakes:\n" + "\n".join(f"  {x}" for x in lines))


def _explain(cls: type, item: Any) -> str:
    """One mistake that pydantic found, with the name of the field as a user writes it."""
    where = ".".join(str(part) for part in item["loc"]) or "The configuration"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        section, _, name = where.rpartition(".")
        if meant := elsewhere(cls, name, where):
            return f"{where}: unknown field; here it is {meant}"
        inside = f"{section}." if section else ""
        paths = [path.removeprefix(inside) for path in _paths(cls) if path.startswith(inside)]
        known = sorted({path.partition(".")[0] for path in paths})
        return f"{where}: unknown field; known here: {', '.join(known)}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should", "must")
    expected, colon, reason = message.partition(":")
    return f"{where} {expected}, got {item['input']!r}{colon}{reason}"


def elsewhere(cls: type, name: str, where: str = "") -> str:
    """The field of `cls` that is meant by the name of a field elsewhere, or in TRL; "" if none."""
    paths = [path for path in _paths(cls) if path != where]
    same = [path for path in paths if path.rpartition(".")[2] == name]
    for names in (FROM_TRL, FROM_TRL_SFT):
        if names.get(name) in paths:
            return names[name]
    return " or ".join(same)


def _paths(cls: Any) -> Iterator[str]:
    """Dotted names of all fields, nested ones included."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            yield from (f"{item.name}.{rest}" for rest in _paths(hints[item.name]))
        else:
            yield item.name


def check(config: TrainConfig) -> None:
    """Refuse settings of a training run that do not fit together.

    Raises:
        ValueError: with what was got, what was expected and what to do.
    """
    if config.mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {config.mode!r}.")
    _check_batches(config)
    _check_turns(config)
    _check_teacher(config)
    _check_model(config)
    _check_endpoint(config)
    _check_engine(config)
    _check_secrets(config)
    if config.resume not in ("never", "auto") and not Path(config.resume).is_dir():
        raise ValueError(
            f"resume must be 'never', 'auto' or the folder of a run, got {config.resume!r}."
        )


def check_ranks(config: TrainConfig, size: int) -> None:
    """Refuse what several processes cannot train together.

    Raises:
        ValueError: with what to use.
    """
    episodes = config.rollout.tasks_per_update * config.rollout.group_size
    if size > episodes:
        raise ValueError(
            f"{size} processes share the episodes of an update, and there are {episodes}: raise "
            f"--rollout.tasks-per-update so that there are at least {size}, or start fewer."
        )
    if size > 1 and config.engine.kind != "hero":
        raise ValueError(
            f"engine.kind={config.engine.kind} with {size} processes is not supported, as one of "
            "them would have to hand over the weights of all: start one process, or set "
            "--engine.kind hero."
        )
    model = config.model
    for option, is_set in (
        (f"model.quantize={model.quantize}", model.quantize != "none"),
        ("model.compile", model.compile),
        (f"optim.kind={config.optim.kind}", config.optim.kind != "adamw"),
        ("teacher.offload", config.teacher.offload),
        ("model.master_weights", model.master_weights),
    ):
        if size > 1 and is_set:
            raise ValueError(
                f"{option} is for one process, got {size}: leave it out. Several keep float32 "
                "weights, moments and teacher in shards and compute in the compute type anyway."
            )


def _check_batches(config: TrainConfig) -> None:
    rollout = config.rollout
    if MODES[config.mode].needs_groups and rollout.group_size < 2:
        raise ValueError(
            f"mode={config.mode} compares episodes of one task: rollout.group_size must be at "
            f"least 2, got {rollout.group_size}. Set --rollout.group-size 8."
        )
    group = rollout.group_size * rollout.max_turns
    if config.max_env_turns is not None and config.max_env_turns < group:
        raise ValueError(
            f"max_env_turns={config.max_env_turns} holds no group of {rollout.group_size} episodes "
            f"of up to {rollout.max_turns} turns: raise --max-env-turns to at least {group}, or "
            "lower --rollout.group-size or --rollout.max-turns."
        )
    episodes = rollout.tasks_per_update * rollout.group_size
    if MODES[config.mode].needs_batch and episodes < 2:
        raise ValueError(
            f"mode={config.mode} compares the episodes of an update: there must be at least 2, got "
            "1. Set --rollout.tasks-per-update 64."
        )
    if config.reflection.shuffle_hints != "off" and rollout.tasks_per_update < 2:
        raise ValueError(
            "reflection.shuffle_hints takes hints from other tasks, but an update has only 1: set "
            "--rollout.tasks-per-update to 2 or more."
        )
    if config.optim.minibatches > episodes:
        raise ValueError(
            f"optim.minibatches={config.optim.minibatches} must be at most the {episodes} episodes "
            f"of an update ({rollout.tasks_per_update} tasks x {rollout.group_size}): lower "
            "--optim.minibatches."
        )


def _check_turns(config: TrainConfig) -> None:
    choosing = [name for name, mode in MODES.items() if mode.chooses_turns]
    if config.loss.turns == "from_first_fault" and config.mode not in choosing:
        raise ValueError(
            f"loss.turns={config.loss.turns} is a choice of the modes {', '.join(choosing)}; got "
            f"mode={config.mode}: leave it at all."
        )


def _check_teacher(config: TrainConfig) -> None:
    teacher = config.teacher
    if teacher.refresh == "gated" and (teacher.path or teacher.weights != "frozen"):
        raise ValueError(
            "teacher.refresh=gated copies the student to a frozen teacher: expected "
            f"--teacher.weights frozen and no --teacher.path, got {teacher.weights} and "
            f"{teacher.path!r}."
        )
    if teacher.offload and (teacher.path or teacher.weights == "live"):
        raise ValueError(
            "teacher.offload keeps the teacher's copy of the student's weights in main memory, and "
            f"there is none: got weights={teacher.weights} and path={teacher.path!r}. Leave it "
            "out, or set --teacher.weights ema or frozen without --teacher.path."
        )


def _check_model(config: TrainConfig) -> None:
    model, engine = config.model, config.engine.kind
    if model.quantize != "none" and engine != "hero":
        raise ValueError(
            f"engine.kind={engine} has no weights in 4 bits as the student has, so it would sample "
            f"from another model; got model.quantize={model.quantize}: set --engine.kind hero or "
            "--model.quantize none."
        )


def _check_endpoint(config: TrainConfig) -> None:
    reflection = config.reflection
    if reflection.votes > 1 and (reflection.reflector == "rules" or reflection.temperature == 0):
        raise ValueError(
            f"reflection.votes={reflection.votes} compares reflections that differ; got "
            f"reflector={reflection.reflector} at temperature {reflection.temperature:g}, which "
            "always writes the same: set --reflection.votes 1, or --reflection.temperature 0.7 "
            "with another reflector."
        )
    if reflection.reflector != "openai":
        return
    if not (reflection.base_url and reflection.model):
        raise ValueError(
            "reflection.reflector=openai needs --reflection.base-url and --reflection.model, got "
            f"{reflection.base_url!r} and {reflection.model!r}."
        )


def _check_engine(config: TrainConfig) -> None:
    engine, rollout = config.engine, config.rollout
    if engine.kind == "server" and not engine.base_url:
        raise ValueError(
            "engine.kind=server needs --engine.base-url, the address of a vLLM server such as "
            "http://localhost:8000/v1; got ''."
        )
    if engine.kind == "transformers" and rollout.top_p < 1:
        raise ValueError(
            f"engine.kind=transformers tells log-probabilities of the nucleus alone; got "
            f"rollout.top_p={rollout.top_p:g}: set --rollout.top-p 1 or --engine.kind hero."
        )
    if engine.kind != "hero" and rollout.top_p < 1 and rollout.temperature != 1:
        raise ValueError(
            f"engine.kind={engine.kind} tells log-probabilities of the nucleus at another "
            f"temperature than 1; got rollout.temperature={rollout.temperature:g} and "
            f"rollout.top_p={rollout.top_p:g}: set one of them to 1, or --engine.kind hero."
        )


def _check_secrets(config: TrainConfig) -> None:
    for section in ("reflection", "engine"):
        check_variable(f"{section}.api_key_env", getattr(config, section).api_key_env)
    values = named_options(config.env.options)
    if config.reflection.reflector == "openai":
        values["reflection.base_url"] = config.reflection.base_url
    if config.engine.kind == "server":
        values["engine.base_url"] = config.engine.base_url
    refuse_blotted(values)


def named_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of an environment by the names that messages give them."""
    return {f"env.options {name}": value for name, value in options.items()}


def refuse_blotted(values: dict[str, Any]) -> None:
    """Raise a ValueError for a setting, by its name, that a run has saved without its secret."""
    for name, value in values.items():
        if "***" in str(value):
            raise ValueError(
                f"{name} was saved without its secret, got {value!r}: give it on the command line "
                "again."
            )
