"""Rollouts: the student acts in many environments at once, one batched generation for each turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hero.config import RolloutConfig
from hero.envs.base import Environment, HasOracle
from hero.renderer import Renderer
from hero.sampler import Sampler, Sampling
from hero.types import Fault, FeedbackKind, Message, StopReason, Trajectory, Turn


class EnvironmentFault(Fault):
    """An environment raised: which one, in which task and turn."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Assignment:
    """An episode to come: its task and the group it belongs to."""

    id: str
    group_id: str
    task_id: str


def assignments_of_update(
    tasks: Sequence[str], config: RolloutConfig, seed: int, update: int
) -> list[Assignment]:
    """The episodes of one update, counted from 1.

    Tasks go by in an order drawn anew for each epoch; a group shares its task.
    """
    first = config.tasks_per_update * (update - 1)
    assignments = []
    for position in range(first, first + config.tasks_per_update):
        epoch, place = divmod(position, len(tasks))
        order = random.Random(derive_seed(seed, epoch)).sample(range(len(tasks)), len(tasks))
        group = f"u{update}-{position}"
        assignments += [
            Assignment(id=f"{group}-{member}", group_id=group, task_id=tasks[order[place]])
            for member in range(config.group_size)
        ]
    return assignments


class _Running:
    """An episode under way."""

    def __init__(self, env: Environment, assignment: Assignment, renderer: Renderer) -> None:
        self.env = env
        self.renderer = renderer
        with _blame(env, assignment.task_id, 0):
            observation, info = env.reset(assignment.task_id)
        messages: list[Message] = []
        if env.system_prompt:
            messages.append({"role": "system", "content": env.system_prompt})
        messages.append({"role": "user", "content": observation})
        self.prompt_ids = renderer.start(messages)
        self.stopped = False
        self.trajectory = Trajectory(
            id=assignment.id, group_id=assignment.group_id, task_id=assignment.task_id,
            instruction=info.get("instruction", observation), turns=[], reward=0.0, success=False,
            stop_reason=StopReason.MAX_TURNS,
        )  # fmt: skip

    def stop(self, reason: StopReason) -> None:
        self.trajectory.stop_reason = reason
        self.stopped = True

    def stop_if_full(self, config: RolloutConfig) -> None:
        """Stop if the context may not hold another turn."""
        if len(self.prompt_ids) + config.max_turn_tokens <= config.max_episode_tokens:
            return
        if not self.trajectory.turns:
            raise ValueError(
                f"Task {self.trajectory.task_id} starts with {len(self.prompt_ids)} tokens; with "
                f"rollout.max_turn_tokens={config.max_turn_tokens} this passes "
                f"rollout.max_episode_tokens={config.max_episode_tokens}. Raise the latter."
            )
        self.stop(StopReason.MAX_TOKENS)

    def act(self, ids: list[int], logprobs: list[float]) -> None:
        """Take the sampled action in the environment and write the turn down."""
        text = self.renderer.decode(ids)
        with _blame(self.env, self.trajectory.task_id, len(self.trajectory.turns)):
            observation, reward, terminated, truncated, info = self.env.step(text)
            kind = FeedbackKind(info.get("feedback_kind", FeedbackKind.OK))
            if not isinstance(observation, str):
                raise TypeError(f"the observation must be text, got {type(observation).__name__}")
        self.trajectory.turns.append(
            Turn(
                prompt_ids=self.prompt_ids,
                action_ids=ids,
                sampled_logprobs=logprobs,
                action_text=text,
                observation=observation,
                feedback_kind=kind,
                is_error=not info.get("valid", True),
                parse_ok=info.get("parse_ok", True),
            )
        )
        self.trajectory.reward += float(reward)
        if terminated or truncated:
            self.trajectory.success = bool(info.get("success", False))
            self.stop(StopReason.DONE if terminated else StopReason.TRUNCATED)
            return
        answer = self.renderer.observe(ids, info.get("role", "user"), observation)
        self.prompt_ids = self.prompt_ids + ids + answer


def rollout(
    assignments: Sequence[Assignment],
    *,
    envs: Sequence[Environment],
    sampler: Sampler,
    renderer: Renderer,
    config: RolloutConfig,
    seed: int,
    temperature: float | None = None,
    count: Callable[[int, int], None] = lambda done, total: None,
) -> list[Trajectory]:
    """Run every episode to its end; `envs` are reused, one for each episode under way.

    Args:
        assignments: which episodes.
        envs: at least one environment; as many episodes run at once as there are environments.
        sampler: of the student's actions.
        renderer: messages to ids.
        config: caps and sampling.
        seed: of the sampling; the same seed, weights and assignments give the same trajectories.
        temperature: instead of the config's (evaluation).
        count: called after every turn with the number of finished episodes and of all.

    Raises:
        EnvironmentFault: an environment raised.
        ValueError: a first prompt already passes `max_episode_tokens`.
    """
    trajectories: list[Trajectory] = []
    for start in range(0, len(assignments), len(envs)):
        batch = [
            _Running(env, assignment, renderer)
            for env, assignment in zip(envs, assignments[start : start + len(envs)], strict=False)
        ]
        active = batch
        for turn in range(config.max_turns):
            for running in active:
                running.stop_if_full(config)
            active = [running for running in active if not running.stopped]
            if not active:
                break
            sampling = Sampling(
                max_tokens=config.max_turn_tokens,
                seed=derive_seed(seed, start, turn),
                temperature=config.temperature if temperature is None else temperature,
                top_p=config.top_p,
            )
            completions = sampler.generate([running.prompt_ids for running in active], sampling)
            for running, completion in zip(active, completions, strict=True):
                running.act(completion.ids, completion.logprobs)
            active = [running for running in active if not running.stopped]
            count(start + len(batch) - len(active), len(assignments))
        trajectories += [running.trajectory for running in batch]
    return trajectories


def rewarded(trajectories: list[Trajectory], kind: str) -> list[Trajectory]:
    """The trajectories; for `env.reward=success` each pays 1 for success and 0 for the rest."""
    for trajectory in trajectories if kind == "success" else ():
        trajectory.reward = float(trajectory.success)
    return trajectories


def gold_episodes(
    env: Environment, tasks: Iterable[str], max_turns: int
) -> dict[str, tuple[tuple[str, str], ...]]:
    """(action, observation) of each turn of the oracle's episodes, by task.

    Only those that succeed; none at all if the environment has no oracle.
    """
    if not isinstance(env, HasOracle):
        return {}
    gold: dict[str, tuple[tuple[str, str], ...]] = {}
    for task in tasks:
        turns: list[tuple[str, str]] = []
        ended = False
        with _blame(env, task, 0):
            env.reset(task)
            while not ended and len(turns) < max_turns:
                action = env.oracle()
                observation, _, terminated, truncated, info = env.step(action)
                turns.append((action, observation))
                ended = terminated or truncated
            if ended and info.get("success"):
                gold[task] = tuple(turns)
    return gold


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, mixed as in splitmix: the same in every process."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 29)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 32
    return state >> 1


@contextmanager
def _blame(env: Environment, task_id: str, turn: int) -> Iterator[None]:
    """Turn any exception of an environment into one that names environment, task and turn."""
    try:
        yield
    except Exception as error:
        raise EnvironmentFault(
            f"{type(env).__name__} raised in task {task_id!r}, turn {turn}: "
            f"{type(error).__name__}: {error}"
        ) from error
