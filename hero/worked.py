"""Worked episodes: tasks that the environment's oracle solves, as chat turns before a task.

A weak model that has read one writes well-formed actions, where it copies a mere description. They
stand in the context of student and teacher alike, and count in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hero.envs import border
from hero.envs.base import Environment, HasOracle, HasTools
from hero.renderer import Renderer
from hero.types import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Worked:
    """A successful episode of the oracle."""

    observation: str
    """The first one, which tells the task."""
    turns: tuple[tuple[str, border.Step], ...]
    """(action, what it gave) of each turn."""


def work_out(env: Environment, task: str, max_turns: int) -> Worked | None:
    """The oracle's episode of a task; None if it does not succeed in `max_turns`.

    Raises:
        EnvironmentFault: the environment raised or broke its contract.
    """
    observation, _ = border.reset(env, task)
    turns: list[tuple[str, border.Step]] = []
    while len(turns) < max_turns:
        action = border.action(env, "oracle", where=f"task {task!r}")
        step = border.step(env, action, task, len(turns))
        turns.append((action, step))
        if step.terminated or step.truncated:
            return Worked(observation=observation, turns=tuple(turns)) if step.success else None
    return None


def worked_episodes(
    env: Environment, tasks: Sequence[str], number: int, max_turns: int, renderer: Renderer
) -> tuple[list[Worked], list[str]]:
    """The first `number` of `tasks` that the oracle solves, worked out, and all other tasks.

    Args:
        env: has an oracle, unless `number` is 0.
        tasks: those of the training split: what is shown is of another task than any that is
            played, as the tasks shown are no longer among those returned.
        number: `env.demonstrations`.
        max_turns: cap of turns of an episode.
        renderer: says how tool calls are written.

    Raises:
        ValueError: there is no oracle, or it does not solve enough tasks.
    """
    if number and not isinstance(env, HasOracle):
        raise ValueError(
            f"env.demonstrations={number} needs an environment with an oracle, and "
            f"{type(env).__name__} has none: write oracle() -> str, or set --env.demonstrations 0."
        )
    if number and isinstance(env, HasTools):
        env.tool_format = renderer.tool_format
    shown: dict[str, Worked] = {}
    for task in tasks:
        if len(shown) == number:
            break
        if (worked := work_out(env, task, max_turns)) is not None:
            shown[task] = worked
    others = [task for task in tasks if task not in shown]
    if len(shown) < number or not others:
        raise ValueError(
            f"env.demonstrations={number}: the oracle of {type(env).__name__} solves {len(shown)} "
            f"of {len(tasks)} training tasks within {max_turns} turns, and one has to be left to "
            "train on. Lower --env.demonstrations, or raise --rollout.max-turns."
        )
    return list(shown.values()), others


def opening(
    renderer: Renderer, rules: str, observation: str, shown: Sequence[Worked] = (),
    tools: Sequence[dict[str, Any]] = (),
) -> list[int]:  # fmt: skip
    """Ids of an episode's first prompt.

    Args:
        renderer: messages to ids.
        rules: the system prompt, "" for none.
        observation: the first one of the task to come.
        shown: episodes before it, each as its observations and actions in turn; what follows its
            last action is the first observation of the next episode.
        tools: schemas for the template, as `Renderer.start` takes them.
    """
    first, *following = [*(worked.observation for worked in shown), observation]
    messages: list[Message] = [{"role": "system", "content": rules}] if rules else []
    ids = renderer.start([*messages, {"role": "user", "content": first}], tools)
    for worked, after in zip(shown, following, strict=True):
        answers = [(step.role, step.observation) for _, step in worked.turns[:-1]]
        for (action, _), answer in zip(worked.turns, [*answers, ("user", after)], strict=True):
            said = [*renderer.encode(action), renderer.end_id]
            ids = ids + said + renderer.observe(said, *answer)
    return ids
