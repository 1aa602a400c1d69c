"""Rollouts: the student acts in many environments at once.

An episode that has ended makes room for the next at once. What is sampled depends on the seed, the
episode and the turn, not on which other episodes are under way.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from hero.config import RolloutConfig
from hero.envs import border
from hero.envs.base import Environment, HasGenerator, HasOracle, HasTools
from hero.envs.border import EnvironmentFault
from hero.renderer import Renderer
from hero.sampler import Sampler, Sampling, stream_of
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
        generate: Callable[[list[Message], int], str], shown: Sequence[Worked],
    ) -> None:  # fmt: skip
        self.env, self.renderer, self.config = env, renderer, config
        self.salt = zlib.crc32(assignment.id.encode())
        """Of its sampling, which does not depend on the episodes around it."""
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
            if isinstance(env, HasGenerator):
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

    def goes_on(self) -> bool:
        """Whether there is another turn; if not, why is written down."""
        config = self.config
        if self.stopped or len(self.trajectory.turns) == config.max_turns:
            return False
        if len(self.prompt_ids) + config.max_turn_tokens <= config.max_episode_tokens:
            return True
        if self.trajectory.turns:
            self.stop(StopReason.MAX_TOKENS)
            return False
        self.fail(
            f"{type(self.env).__name__}, task {self.trajectory.task_id!r}: it starts with "
            f"{len(self.prompt_ids)} tokens; with rollout.max_turn_tokens={config.max_turn_tokens} "
            f"this passes rollout.max_episode_tokens={config.max_episode_tokens}. Raise the latter."
        )
        return False

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
    ended: Callable[[Trajectory], None] = lambda trajectory: None,
) -> list[Trajectory]:
    """Run every episode to its end; `envs` are reused, one for each episode under way.

    Args:
        assignments: which episodes.
        envs: at least one environment; as many episodes run at once as there are environments.
        sampler: of the student's actions.
        renderer: messages to ids.
        config: caps and sampling.
        seed: of the sampling; the same seed and weights give the same episode for an assignment,
            whatever else is played.
        temperature: instead of the config's (evaluation).
        count: called with the number of finished episodes and of all, whenever one has ended.
        shown: worked episodes before each task (`env.demonstrations`).
        ended: called with each episode that is over, for those who keep them at once.

    Raises:
        EnvironmentFault: every episode failed. One that fails among others ends with `env_error`.
    """
    sampling = Sampling(
        max_tokens=config.max_turn_tokens, seed=seed, top_p=config.top_p,
        temperature=config.temperature if temperature is None else temperature,
    )  # fmt: skip
    stream = stream_of(sampler, len(envs), sampling, config.max_episode_tokens)

    def generate(messages: list[Message], salt: int) -> str:
        """The student's answer where an environment lets it play another part."""
        own = replace(sampling, seed=derive_seed(seed, salt), top_p=1.0)
        (answer,) = sampler.generate([renderer.start(messages)], own)
        return renderer.decode(answer.ids)

    episodes: list[_Running] = []
    running: dict[int, _Running] = {}  # by the row of the stream, which is that of its environment

    def go_on(row: int) -> None:
        """Ask for the next turn on a row: of its episode, or of the next one that has any."""
        while row not in running or not running[row].goes_on():
            if over := running.pop(row, None):
                ended(over.trajectory)
            count(len(episodes) - len(running), len(assignments))
            if len(episodes) == len(assignments):
                return
            assignment = assignments[len(episodes)]
            episodes.append(_Running(envs[row], assignment, renderer, config, generate, shown))
            running[row] = episodes[-1]
        episode = running[row]
        turn_seed = derive_seed(seed, episode.salt, len(episode.trajectory.turns))
        stream.submit(row, episode.prompt_ids, turn_seed)

    for row in range(len(envs)):
        go_on(row)
    while running:
        for row, completion in stream.step():
            running[row].act(completion.ids, completion.logprobs)
            go_on(row)
    trajectories = [episode.trajectory for episode in episodes]
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
