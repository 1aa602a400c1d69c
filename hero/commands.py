"""What each `hero` command does with its arguments."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from hero import config as configuration
from hero.config import EnvConfig, ModelConfig, RolloutConfig, TrainConfig
from hero.console import Console
from hero.envs.base import make_env
from hero.evaluation import summarise, trials
from hero.fetch import MODELS, fetch_model
from hero.files import BrokenCheckpoint, find_checkpoint, write_atomic
from hero.health import checkup
from hero.policy import Policy
from hero.reflection import ReflectionError
from hero.rollout import EnvironmentFault
from hero.rollout import rollout as run_rollout
from hero.sampler import HFSampler
from hero.sft import SftConfig, train_sft
from hero.trainer import TeacherGate, Trainer
from hero.types import to_json
from hero.viewer import render

MISTAKES = (ValueError, ImportError, OSError, EnvironmentFault, ReflectionError, TeacherGate)
"""Faults with a message for the user; anything else is a bug and keeps its traceback."""

C = TypeVar("C")


def train(arguments: list[str], console: Console) -> None:
    """hero train [RECIPE] [--config FILE] [--resume RUN] [overrides]"""
    recipe, rest = _positional(arguments)
    file, rest = _option(rest, "--config")
    resume, rest = _option(rest, "--resume")
    resumes_run = resume not in (None, "auto", "never")
    data: dict[str, Any] = {}
    if resumes_run:
        saved = Path(str(resume)) / "config.json"
        if not saved.is_file():
            raise ValueError(
                f"--resume {resume}: {saved} is not there; expected the folder of a run."
            )
        data = json.loads(saved.read_text(encoding="utf-8"))
    elif recipe:
        data = configuration.load_recipe(recipe)
    if file:
        data = configuration.merge(data, configuration.load_config_file(file))
    name = recipe or (Path(file).stem if file else "train")
    if resumes_run:
        data |= {"output_dir": str(resume), "resume": str(resume)}
        name = Path(str(resume)).name
    elif resume:
        data |= {"resume": resume}
    config = _parse(TrainConfig, data, rest, "hero train [RECIPE] [--config FILE] [--resume RUN]")
    if config.resume == "auto" and not config.output_dir:
        raise ValueError(
            "resume=auto needs --output-dir: it goes on from the checkpoint there, if there is one."
        )
    run_dir = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume not in ("never", "auto"):
        run_dir = Path(config.resume)
    if config.resume == "never" and find_checkpoint(run_dir) is not None:
        raise ValueError(
            f"{run_dir} already holds a run: go on from it with --resume {run_dir}, or name "
            "another --output-dir."
        )
    config.output_dir = str(run_dir)
    trainer = Trainer(config, run_dir, name, console)
    try:
        trainer.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(trainer)) from None
    except BrokenCheckpoint:
        raise
    except MISTAKES as mistake:
        raise _noted(mistake, _how_to_go_on(trainer)) from mistake
    report = render(run_dir)
    console.say(f"Best model: {run_dir / 'best'}")
    console.say(f"Report:     {report}  (open it in a browser; hero view {run_dir} makes it again)")


def _how_to_go_on(trainer: Trainer) -> str:
    if trainer.state.update == 0:
        return "No update was finished, so nothing is lost."
    update, run = trainer.state.update, trainer.run_dir
    return f"Saved after update {update}. Go on with: hero train --resume {run}"


def _noted(mistake: Exception, note: str) -> Exception:
    mistake.__notes__ = [note]  # type: ignore[attr-defined]  # add_note is Python 3.11
    return mistake


def sft(arguments: list[str], console: Console) -> None:
    """hero sft [RECIPE] [--config FILE] [overrides]"""
    recipe, rest = _positional(arguments)
    file, rest = _option(rest, "--config")
    data = configuration.load_recipe(recipe, "sft") if recipe else {}
    if file:
        data = configuration.merge(data, configuration.load_config_file(file, "sft"))
    config = _parse(SftConfig, data, rest, "hero sft [RECIPE] [--config FILE]")
    folder = train_sft(config, console)
    console.say(f"Model: {folder}")


@dataclass(kw_only=True)
class PlayConfig:
    """Playing a model without training it."""

    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    device: str = "auto"
    """auto, cpu, cuda, …"""
    dtype: str = "auto"
    """auto, float32 or bfloat16."""
    split: str = "test"
    """train, dev or test."""
    tasks: int = 100
    """How many tasks of the split, from its start."""
    trials: int = 1
    """Episodes a task."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    seed: int = 0
    output: str = ""
    """File of the results (JSON for eval, JSON lines for rollout); "" prints only."""


def _play_config(arguments: list[str], prog: str) -> tuple[str, PlayConfig]:
    """MODEL is a folder, a hub id or a run; a run brings its own environment and caps."""
    model, rest = _positional(arguments)
    wants_help = "--help" in rest or "-h" in rest
    if model is None and not wants_help:
        raise ValueError(f"{prog}: name a model: a folder, a hub id, or the folder of a run.")
    data: dict[str, Any] = {}
    recipe, rest = _option(rest, "--recipe")
    if recipe:
        chosen = configuration.load_recipe(recipe)
        data = {key: chosen[key] for key in ("env", "rollout") if key in chosen}
    if model and (Path(model) / "config.json").is_file() and (Path(model) / "best").is_dir():
        saved = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        data = {
            "env": saved["env"],
            "rollout": saved["rollout"],
            "temperature": saved["eval"]["temperature"],
        }
        model = str(Path(model) / "best")
    return model or "", _parse(PlayConfig, data, rest, prog)


def _player(model: str, config: PlayConfig) -> tuple[Any, Any]:
    if config.rollout.batch_size < 1 or config.temperature < 0:
        raise ValueError(
            "rollout.batch_size must be positive and temperature not negative, got "
            f"{config.rollout.batch_size} and {config.temperature}."
        )
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    policy = Policy.load(ModelConfig(path=model, device=config.device, dtype=config.dtype))  # type: ignore[arg-type]
    envs = [
        make_env(config.env.name, **config.env.options) for _ in range(config.rollout.batch_size)
    ]
    play = partial(
        run_rollout, envs=envs, sampler=HFSampler(policy, config.rollout.batch_size),
        renderer=policy.renderer, config=config.rollout,
    )  # fmt: skip
    return play, envs[0]


def evaluate(arguments: list[str], console: Console) -> None:
    """hero eval MODEL [--recipe NAME] [overrides]"""
    model, config = _play_config(arguments, "hero eval MODEL [--recipe NAME]")
    play, env = _player(model, config)
    tasks = env.tasks(config.split)[: config.tasks]
    assignments = trials(tasks, config.trials)
    result = summarise(play(assignments, seed=config.seed, temperature=config.temperature))
    console.say(
        f"{model} on {len(tasks)} {config.split} tasks x {config.trials}: success "
        f"{result.success:.1%}, "
        f"score {result.score:.3f}, average turns {result.turns:.1f}"
    )
    if config.output:
        write_atomic(Path(config.output), json.dumps(result.to_dict(), indent=1))


def rollout(arguments: list[str], console: Console) -> None:
    """hero rollout MODEL [--recipe NAME] [overrides]"""
    model, config = _play_config(arguments, "hero rollout MODEL [--recipe NAME]")
    play, env = _player(model, config)
    tasks = env.tasks(config.split)[: config.tasks]
    assignments = trials(tasks, config.trials)
    trajectories = play(assignments, seed=config.seed, temperature=config.temperature)
    if config.output:
        write_atomic(Path(config.output), "".join(to_json(t) + "\n" for t in trajectories))
        console.say(f"{len(trajectories)} trajectories: {config.output}")
        return
    for trajectory in trajectories:
        console.say(f"\n{trajectory.task_id}: {trajectory.instruction}")
        for number, turn in enumerate(trajectory.turns, 1):
            console.say(f"  {number}. {turn.action_text}\n     {turn.observation}")
        console.say(f"  reward {trajectory.reward:.2f}, {trajectory.stop_reason}")


def view(arguments: list[str], console: Console) -> None:
    """hero view RUN [--output FILE]"""
    run, rest = _positional(arguments)
    output, rest = _option(rest, "--output")
    if run is None or rest:
        raise ValueError("usage: hero view RUN [--output FILE], with the folder of a run.")
    console.say(f"Report: {render(Path(run), Path(output) if output else None)}")


def model(arguments: list[str], console: Console) -> None:
    """hero model NAME [--output FOLDER]"""
    name, rest = _positional(arguments)
    output, rest = _option(rest, "--output")
    if name is None or rest:
        raise ValueError(f"usage: hero model NAME [--output FOLDER]; names: {', '.join(MODELS)}.")
    folder = fetch_model(name, Path(output) if output else Path("models") / name, console.say)
    console.say(f"Model: {folder}")


def recipes(arguments: list[str], console: Console) -> None:
    """hero recipes [NAME]"""
    if arguments:
        console.say(
            yaml.safe_dump(configuration.load_recipe(arguments[0]), sort_keys=False).strip()
        )
        return
    for kind in configuration.RECIPE_KINDS:
        console.say(f"hero {kind} …")
        for name in configuration.recipe_names(kind):
            console.say(f"  {name:<22} {configuration.recipe_summary(name, kind)}")


def doctor(arguments: list[str], console: Console) -> None:
    """hero doctor"""
    for line in checkup():
        console.say(line)


def _parse(cls: type[C], data: dict[str, Any], arguments: list[str], prog: str) -> C:
    """Settings from a recipe or file, with dotted overrides on top."""
    default = configuration.from_dict(data, cls)
    try:
        return tyro.cli(cls, default=default, args=arguments, prog=prog)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError("The command line has mistakes, see above.") from None


def _positional(arguments: list[str]) -> tuple[str | None, list[str]]:
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def _option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take `name VALUE` or `name=VALUE` out of the arguments."""
    for i, argument in enumerate(arguments):
        if argument == name:
            if i + 1 == len(arguments):
                raise ValueError(f"{name} needs a value.")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2], arguments[:i] + arguments[i + 1 :]
    return None, arguments
