"""Rollouts: the student acts in many environments at once, one batched generation for each turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hero.config import RolloutConfig
from hero.envs import border
from hero.envs.base import Environment, HasGenerator, HasOracle, HasTools
from hero.envs.border import EnvironmentFault
from hero.renderer import Renderer
from hero.sampler import Sampler, Sampling
from hero.types import Message, StopReason, Trajectory, Turn
from hero.worked import Worked, opening, work_out

CHARS_PER_TOKEN = 8
"""Of `max_episode_tokens`: what is longer is cut before it is tokenised. Prose has four."""


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

    def __init__(
        self, env: Environment, assignment: Assignment, renderer: Renderer, config: RolloutConfig,
        generate: Callable[[list[Message], int], str] | None = None, shown: Sequence[Worked] = (),
    ) -> None:  # fmt: skip
        self.env, self.renderer, self.config = env, renderer, config
        self.max_chars = CHARS_PER_TOKEN * config.max_episode_tokens
        self.prompt_ids: list[int] = []
        self.stopped = False
        self.trajectory = Trajectory(
            id=assignment.id, group_id=assignment.group_id, task_id=assignment.task_id,
            instruction="", turns=[], reward=0.0, success=False, stop_reason=StopReason.MAX_TURNS,
        )  # fmt: skip
        try:
            if isinstance(env, HasTools):
                env.tool_format = renderer.tool_format
            if isinstance(env, HasGenerator) and generate is not None:
                env.use_generator(generate)
            rules = border.system_prompt(env)
            observation, instruction = border.reset(env, assignment.task_id, self.max_chars)
            tools = border.tools(env)
        except EnvironmentFault as fault:
            self.fail(fault)
            return
        self.trajectory.instruction = instruction
        self.rules, self.tools, self.shown = rules, tools, shown
        self.prompt_ids = self.started_with(observation)

    def started_with(self, text: str) -> list[int]:
        """Ids of a conversation in which nothing was said before `text`."""
        return opening(self.renderer, self.rules, text, self.shown, self.tools)

    def fail(self, cause: object) -> None:
        self.trajectory.fail(cause)
        self.stopped = True

    def stop(self, reason: StopReason) -> None:
        self.trajectory.stop_reason = reason
        self.stopped = True

    def stop_if_full(self) -> None:
        """Stop if the context may not hold another turn."""
        config = self.config
        if len(self.prompt_ids) + config.max_turn_tokens <= config.max_episode_tokens:
            return
        if self.trajectory.turns:
            self.stop(StopReason.MAX_TOKENS)
            return
        self.fail(
            f"{type(self.env).__name__}, task {self.trajectory.task_id!r}: it starts with "
            f"{len(self.prompt_ids)} tokens; with rollout.max_turn_tokens={config.max_turn_tokens} "
            f"this passes rollout.max_episode_tokens={config.max_episode_tokens}. Raise the latter."
        )

    def act(self, ids: list[int], logprobs: list[float]) -> None:
        """Take the sampled action in the environment and write the turn down."""
        trajectory, text = self.trajectory, self.renderer.decode(ids)
        turn = Turn(
            prompt_ids=self.prompt_ids, action_ids=ids, sampled_logprobs=logprobs, action_text=text
        )
        number = len(trajectory.turns)
        trajectory.turns.append(turn)
        try:
            step = border.step(self.env, text, trajectory.task_id, number, self.max_chars)
        except EnvironmentFault as fault:
            self.fail(fault)
            return
        turn.observation, turn.feedback_kind = step.observation, step.feedback_kind
        turn.is_error, turn.parse_ok = not step.valid, step.parse_ok
        trajectory.reward += step.reward
        if step.terminated or step.truncated:
            trajectory.success = step.success
            self.stop(StopReason.DONE if step.terminated else StopReason.TRUNCATED)
            return
        if step.next_prompt:
            self.prompt_ids = self.started_with(step.next_prompt)
            return
        answer = self.renderer.observe(ids, step.role, step.observation)
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
    shown: Sequence[Worked] = (),
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
        shown: worked episodes before each task (`env.demonstrations`).

    Raises:
        EnvironmentFault: every episode failed. One that fails among others ends with `env_error`.
    """
    trajectories: list[Trajectory] = []

    def generate(messages: list[Message], salt: int) -> str:
        """The student's answer where an environment lets it play another part."""
        sampling = Sampling(
            max_tokens=config.max_turn_tokens, seed=derive_seed(seed, salt),
            temperature=config.temperature if temperature is None else temperature,
        )  # fmt: skip
        (answer,) = sampler.generate([renderer.start(messages)], sampling)
        return renderer.decode(answer.ids)

    for start in range(0, len(assignments), len(envs)):
        batch = [
            _Running(env, assignment, renderer, config, generate, shown)
            for env, assignment in zip(envs, assignments[start : start + len(envs)], strict=False)
        ]
        active = [running for running in batch if not running.stopped]
        for turn in range(config.max_turns):
            for running in active:
                running.stop_if_full()
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
    border.stop_if_all_failed(trajectories)
    return trajectories


def rewarded(trajectories: list[Trajectory], kind: str) -> list[Trajectory]:
    """The trajectories, paid as `env.reward` says."""
    for trajectory in trajectories if kind != "score" else ():
        trajectory.reward = float(trajectory.success == (kind == "success"))
    return trajectories


def gold_episodes(
    env: Environment, tasks: Iterable[str], max_turns: int
) -> dict[str, tuple[tuple[str, str], ...]]:
    """(action, observation) of each turn of the oracle's episodes, by task.

    Only those that succeed; none at all if the environment has no oracle.

    Raises:
        EnvironmentFault: of every task; a task of which it is raised among others has no episode.
    """
    if not isinstance(env, HasOracle):
        return {}
    gold: dict[str, tuple[tuple[str, str], ...]] = {}
    faults, played = [], 0
    for task in tasks:
        played += 1
        try:
            worked = work_out(env, task, max_turns)
        except EnvironmentFault as fault:
            faults.append(fault)
            continue
        if worked is not None:
            gold[task] = tuple((action, step.observation) for action, step in worked.turns)
    if faults and len(faults) == played:
        raise faults[0]
    return gold


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, mixed as in splitmix: the same in every process."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 29)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 32
    return state >> 1
