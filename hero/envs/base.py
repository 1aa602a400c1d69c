"""The contract every environment keeps, and the registry that finds one by name.

`reset(task_id) -> (observation, info)`; `step(text) -> (observation, reward, terminated, truncated,
info)`. A task is named by its id, never by a worker's index; its goal is drawn from a fixed seed.
The last observation is returned too: it is the last turn's feedback. `truncated` is the
environment's own limit.

Keys of `info`: after `reset` `task_id`, `instruction`; after `step` `valid` (bool), `feedback_kind`
(FeedbackKind), `parse_ok` (bool), `executed_action` (str | None), `role` ("user" | "tool", the role
under which the observation is shown, default "user"), `success` (bool, when the episode has ended).
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, runtime_checkable

from hero.types import Diagnosis, Trajectory

StepResult = tuple[str, float, bool, bool, dict[str, Any]]


@runtime_checkable
class Environment(Protocol):
    """A multi-turn text environment; an instance holds one episode."""

    @property
    def system_prompt(self) -> str:
        """The rules, tools and action format the agent is told; "" for none."""
        ...

    def tasks(self, split: str) -> list[str]:
        """Task ids of `split` in a fixed order: "train", "dev" and "test" are disjoint."""
        ...

    def reset(self, task_id: str) -> tuple[str, dict[str, Any]]:
        """Start the task; raises KeyError naming the task if there is none of that id."""
        ...

    def step(self, text: str) -> StepResult:
        """Take the agent's turn; a bad action gets feedback and never raises."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class HasOracle(Protocol):
    """Environments that know how their tasks are solved."""

    def oracle(self) -> str:
        """The text of a best action in the present state."""
        ...


@runtime_checkable
class HasDiagnosis(Protocol):
    """Environments that supply their own deterministic reflector (`reflection.reflector=rules`)."""

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        """One diagnosis for each turn; leaves the running episode alone."""
        ...


BUILTIN = {"shop": "hero.envs.shop:ShopEnv"}


def make_env(name: str, **options: Any) -> Environment:
    """Build an environment by its short name or by `"package.module:Class"`.

    Raises:
        ValueError: unknown name, or options that the environment does not take.
    """
    target = BUILTIN.get(name, name)
    module_name, _, attribute = target.partition(":")
    if not attribute:
        raise ValueError(
            f"Unknown environment {name!r}: expected one of {sorted(BUILTIN)} or "
            "'package.module:Class'."
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Environment {name!r} cannot be imported: {error}") from error
    try:
        env = factory(**options)
    except TypeError as error:
        raise ValueError(
            f"Environment {name!r} does not take these options {options}: {error}"
        ) from error
    if not isinstance(env, Environment):
        raise ValueError(
            f"{target} is no Environment: it needs system_prompt, tasks, reset, step, close."
        )
    return env
