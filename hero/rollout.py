"""Episodes: the student acts in many environments at once, one batched generation a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hero.config import RolloutConfig
from hero.envs.base import Environment, HasOracle
from hero.generation.base import Generator, Sampling
from hero.renderer import Renderer
from hero.types import Fault, FeedbackKind, Message, StopReason, Trajectory, Turn


class EnvironmentFault(Fault):
    """An environment raised: which one, in which task and turn."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Episode:
    """What to play: a task and the group it belongs to."""

    id: str
    group_id: str
    task_id: str


class _Running:
    """An episode under way."""

    def __init__(
        self, env: Environment, episode: Episode, renderer: Renderer, seed: int, policy_version: int
    ) -> None:
        self.env = env
        with _blame(env, episode.task_id, 0):
            observation, info = env.reset(episode.task_id)
        messages: list[Message] = []
        if env.system_prompt:
            messages.append({"role": "system", "content": env.system_prompt})
        messages.append({"role": "user", "content": observation})
        self.prompt_ids = renderer.start(messages)
        self.stopped = False
        self.trajectory = Trajectory(
            id=episode.id, group_id=episode.group_id, task_id=episode.task_id, seed=seed,
            instruction=info.get("instruction", observation), turns=[], reward=0.0, success=False,
            stop_reason=StopReason.MAX_TURNS, policy_version=policy_version,
        )  # fmt: skip

    def stop(self, reason: StopReason) -> None:
        self.trajectory.stop_reason = reason
        self.stopped = True

    def act(self, ids: list[int], logprobs: list[float], renderer: Renderer) -> None:
        """Take the sampled action in the environment and write the turn down."""
        turn_number = len(self.trajectory.turns)
        text = renderer.decode(ids)
        with _blame(self.env, self.trajectory.task_id, turn_number):
            observation, reward, terminated, truncated, info = self.env.step(text)
            kind = FeedbackKind(info.get("feedback_kind", FeedbackKind.OK))
            if not isinstance(observation, str):
                raise TypeError(f"the observation must be text, got {type(observation).__name__}")
        self.trajectory.turns.append(
            Turn(
                prompt_ids=self.prompt_ids,
                action_ids=ids,
                sampled_logprobs=logprobs,
                loss_mask=[True] * len(ids),
                action_text=text,
                observation=observation,
                observation_role=info.get("role", "user"),
                feedback_kind=kind,
                is_error=not info.get("valid", True),
                parse_ok=info.get("parse_ok", True),
                executed_action=info.get("executed_action"),
            )
        )
        self.trajectory.reward += float(reward)
        if terminated or truncated:
            self.trajectory.success = bool(info.get("success", False))
            self.stop(StopReason.DONE if terminated else StopReason.TRUNCATED)
            return
        role = info.get("role", "user")
        self.prompt_ids = self.prompt_ids + ids + renderer.observe(ids, role, observation)


def rollout(
    episodes: Sequence[Episode],
    *,
    envs: Sequence[Environment],
    generator: Generator,
    renderer: Renderer,
    config: RolloutConfig,
    seed: int,
    policy_version: int = 0,
    temperature: float | None = None,
) -> list[Trajectory]:
    """Play every episode to its end; `envs` are reused, one for each episode under way.

    Args:
        episodes: what to play.
        envs: at least one environment; as many episodes run at once as there are environments.
        generator: the sampler.
        renderer: messages to ids.
        config: caps and sampling.
        seed: of the sampling; the same seed, weights and episodes give the same trajectories.
        policy_version: written into the trajectories.
        temperature: instead of the config's (evaluation).

    Raises:
        EnvironmentFault: an environment raised.
        ValueError: a first prompt already passes `max_episode_tokens`.
    """
    trajectories: list[Trajectory] = []
    for start in range(0, len(episodes), len(envs)):
        batch = [
            _Running(env, episode, renderer, seed, policy_version)
            for env, episode in zip(envs, episodes[start : start + len(envs)], strict=False)
        ]
        for turn in range(config.max_turns):
            active = [running for running in batch if not running.stopped]
            for running in active:
                if len(running.prompt_ids) + config.max_turn_tokens > config.max_episode_tokens:
                    if turn == 0:
                        raise ValueError(
                            f"Task {running.trajectory.task_id} starts with "
                            f"{len(running.prompt_ids)} tokens; with "
                            f"rollout.max_turn_tokens={config.max_turn_tokens} this passes "
                            "rollout.max_episode_tokens="
                            f"{config.max_episode_tokens}. Raise the latter."
                        )
                    running.stop(StopReason.MAX_TOKENS)
            active = [running for running in active if not running.stopped]
            if not active:
                break
            sampling = Sampling(
                max_tokens=config.max_turn_tokens,
                seed=derive_seed(seed, start, turn),
                temperature=config.temperature if temperature is None else temperature,
                top_p=config.top_p,
            )
            completions = generator.generate([running.prompt_ids for running in active], sampling)
            for running, completion in zip(active, completions, strict=True):
                running.act(completion.ids, completion.logprobs, renderer)
        trajectories += [running.trajectory for running in batch]
    return trajectories


def gold_episode(env: Environment, task_id: str, max_turns: int) -> tuple[tuple[str, str], ...]:
    """(action, observation) of each turn of the environment's oracle; () if it does not end in
    success."""
    assert isinstance(env, HasOracle)
    turns = []
    with _blame(env, task_id, 0):
        env.reset(task_id)
        for _ in range(max_turns):
            action = env.oracle()
            observation, _, terminated, truncated, info = env.step(action)
            turns.append((action, observation))
            if terminated or truncated:
                return tuple(turns) if info.get("success") else ()
    return ()


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers (splitmix-style mixing), independent of Python's
    hash."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 29)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 32
    return state >> 1


class _blame:
    """Turns any exception of an environment into one that names environment, task and turn."""

    def __init__(self, env: Environment, task_id: str, turn: int) -> None:
        self.where = f"{type(env).__name__} raised in task {task_id!r}, turn {turn}"

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise EnvironmentFault(f"{self.where}: {type(error).__name__}: {error}") from error
