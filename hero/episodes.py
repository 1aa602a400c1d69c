"""Rollouts: the student acts in many environments at once.

An episode that has ended makes room for the next at once. What is sampled depends on the seed, the
episode and the turn, not on which other episodes are under way.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from hero.config import RolloutConfig
from hero.envs import border
from hero.envs.base import Environment, HasOracle
from hero.envs.border import Beginning, EnvironmentFault, Step
from hero.envs.workers import Given, Workers
from hero.ranks import Ranks
from hero.renderer import Renderer
from hero.sampling import Completion, Mixing, Sampler, Sampling, Wanted, stream_of
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

    @cache
    def order_of(epoch: int) -> list[int]:
        return random.Random(derive_seed(seed, epoch)).sample(range(len(tasks)), len(tasks))

    for position in range(first, first + config.tasks_per_update):
        epoch, place = divmod(position, len(tasks))
        order, group = order_of(epoch), f"u{update}-{position}"
        assignments += [
            Assignment(id=f"{group}-{member}", group_id=group, task_id=tasks[order[place]])
            for member in range(config.group_size)
        ]
    return assignments


class _Running:
    """An episode under way."""

    def __init__(
        self, assignment: Assignment, renderer: Renderer, config: RolloutConfig,
        shown: Sequence[Worked],
    ) -> None:  # fmt: skip
        self.renderer, self.config, self.shown = renderer, config, shown
        self.salt = zlib.crc32(assignment.id.encode())
        """Of its sampling, which does not depend on the episodes around it."""
        self.max_chars = CHARS_PER_TOKEN * config.max_episode_tokens
        self.prompt_ids: list[int] = []
        self.stopped = False
        self.trajectory = Trajectory(
            id=assignment.id, group_id=assignment.group_id, task_id=assignment.task_id,
            instruction="", turns=[], reward=0.0, success=False, stop_reason=StopReason.MAX_TURNS,
        )  # fmt: skip

    def started_with(self, text: str) -> list[int]:
        """Ids of a conversation in which nothing was said before `text`."""
        begun = self.beginning
        return opening(self.renderer, begun.rules, text, self.shown, begun.tools)

    def stop(self, reason: StopReason) -> None:
        self.trajectory.stop_reason = reason
        self.stopped = True

    def fail(self, cause: object) -> None:
        self.trajectory.fail(cause)
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
            f"{self.beginning.world}, task {self.trajectory.task_id!r}: it starts with "
            f"{len(self.prompt_ids)} tokens; with rollout.max_turn_tokens={config.max_turn_tokens} "
            f"this passes rollout.max_episode_tokens={config.max_episode_tokens}. Raise the latter."
        )
        return False

    def act(self, completion: Completion) -> tuple[Any, ...]:
        """Write the sampled action down; returns the job that takes it in the environment."""
        turns, task, ids = self.trajectory.turns, self.trajectory.task_id, completion.ids
        text = self.renderer.decode(ids)
        turns.append(Turn(
            prompt_ids=self.prompt_ids, action_ids=ids, sampled_logprobs=completion.logprobs,
            action_text=text,
        ))  # fmt: skip
        return border.step, text, task, len(turns) - 1, self.max_chars

    def take(self, answer: Beginning | Step | EnvironmentFault) -> None:
        """What the environment answered to `begin` or to an action."""
        if isinstance(answer, EnvironmentFault):
            self.fail(self._placed(answer))
        elif isinstance(answer, Beginning):
            self.beginning, self.trajectory.instruction = answer, answer.instruction
            self.prompt_ids = self.started_with(answer.observation)
        else:
            self._observe(answer)

    def _placed(self, fault: EnvironmentFault) -> str:
        """What a fault says, with the episode it ended."""
        task, said = f"task {self.trajectory.task_id!r}", str(fault)
        turn = max(0, len(self.trajectory.turns) - 1)
        return said if task in said else f"{task}, turn {turn}: {said}"

    def _observe(self, step: Step) -> None:
        trajectory = self.trajectory
        turn = trajectory.turns[-1]
        turn.observation, turn.feedback_kind = step.observation, step.feedback_kind
        turn.is_error, turn.parse_ok = not step.valid, step.parse_ok
        trajectory.reward += step.reward
        if step.terminated or step.truncated:
            trajectory.success = step.success
            self.stop(StopReason.DONE if step.terminated else StopReason.TRUNCATED)
        elif step.next_prompt:
            self.prompt_ids = self.started_with(step.next_prompt)
        else:
            ids = turn.action_ids
            answer = self.renderer.observe(ids, step.role, step.observation)
            self.prompt_ids = self.prompt_ids + ids + answer


def rollout(
    assignments: Sequence[Assignment],
    *,
    envs: Sequence[Environment] | Workers,
    sampler: Sampler,
    renderer: Renderer,
    config: RolloutConfig,
    seed: int,
    temperature: float | None = None,
    count: Callable[[int, int], None] = lambda done, total: None,
    shown: Sequence[Worked] = (),
    ended: Callable[[Trajectory], Wanted | None] = lambda trajectory: None,
    beside: Sequence[bool] = (),
    ranks: Ranks | None = None,
) -> list[Trajectory]:
    """Run every episode to its end; `envs` are reused, one for each episode under way.

    Args:
        assignments: which episodes.
        envs: at least one environment, or the workers that run some; as many episodes run at once
            as there are environments.
        sampler: of the student's actions.
        renderer: messages to ids.
        config: caps and sampling.
        seed: of the sampling; the same seed and weights give the same episode for an assignment,
            whatever else is played.
        temperature: instead of the config's (evaluation).
        count: called with the number of finished episodes and of all, whenever one has ended.
        shown: worked episodes before each task (`env.demonstrations`).
        ended: called with each episode that is over, for those who keep them at once. What it wants
            is sampled on rows that no episode needs any more, if the sampler can do that.
        beside: of each finished episode of the same batch, whether it failed: they count in
            `config.max_env_errors`.
        ranks: who share the episodes, each with environments of its own; None is this process.

    Raises:
        EnvironmentFault: all episodes failed, or more than `config.max_env_errors`. Others end with
            `env_error`.
    """
    ranks = ranks or Ranks()
    sampling = Sampling(
        max_tokens=config.max_turn_tokens, seed=seed, top_p=config.top_p,
        temperature=config.temperature if temperature is None else temperature,
    )  # fmt: skip
    play = partial(
        _play, envs=envs, sampler=sampler, renderer=renderer, config=config, sampling=sampling,
        count=count, shown=shown, ended=ended,
    )  # fmt: skip
    trajectories = ranks.shared(assignments, play)
    most = config.max_env_errors
    ranks.on_first(lambda: border.stop_if_failed(trajectories, most, beside))
    return trajectories


def _play(
    assignments: Sequence[Assignment], *, envs: Sequence[Environment] | Workers, sampler: Sampler,
    renderer: Renderer, config: RolloutConfig, sampling: Sampling,
    count: Callable[[int, int], None], shown: Sequence[Worked],
    ended: Callable[[Trajectory], Wanted | None],
) -> list[Trajectory]:  # fmt: skip
    """The episodes of one process."""
    seed = sampling.seed
    workers = Given(envs) if isinstance(envs, Sequence) else envs
    stream = stream_of(sampler, workers.rows, sampling, config.max_episode_tokens)

    def generate(messages: list[Message], salt: int) -> str:
        """The student's answer where an environment lets it play another part."""
        own = replace(sampling, seed=derive_seed(seed, salt), top_p=1.0)
        (answer,) = sampler.generate([renderer.start(messages)], own)
        return renderer.decode(answer.ids)

    episodes: list[_Running] = []
    running: dict[int, _Running] = {}  # by the row of the stream, which is that of its environment
    acting: set[int] = set()  # rows whose environment is at work
    wanted: deque[Wanted] = deque()
    aside: dict[int, Wanted] = {}  # by the row on which it is sampled

    def work(row: int, job: Callable[..., Any], *arguments: Any) -> None:
        acting.add(row)
        workers.submit(row, job, *arguments)

    def begin(row: int) -> None:
        """The next episode, or else what is wanted beside them, if there is any."""
        if len(episodes) < len(assignments):
            assignment = assignments[len(episodes)]
            running[row] = _Running(assignment, renderer, config, shown)
            episodes.append(running[row])
            lent = generate if workers.share_memory else None
            arguments = (assignment.task_id, renderer.tool_format, lent, running[row].max_chars)
            work(row, border.begin, *arguments)
        elif wanted and isinstance(stream, Mixing):
            aside[row] = wanted.popleft()
            stream.submit_other(row, aside[row])

    try:
        for row in range(workers.rows):
            begin(row)
        while running or aside:
            for row, completion in stream.step():
                if row in aside:
                    aside.pop(row).done(completion)
                    begin(row)
                else:
                    work(row, *running[row].act(completion))
            for row, answer in workers.done(wait=len(acting) == len(running) and not aside):
                acting.discard(row)
                episode = running[row]
                episode.take(answer)
                if episode.goes_on():
                    turn_seed = derive_seed(seed, episode.salt, len(episode.trajectory.turns))
                    stream.submit(row, episode.prompt_ids, turn_seed)
                    continue
                if (more := ended(running.pop(row).trajectory)) is not None:
                    wanted.append(more)
                count(len(episodes) - len(running), len(assignments))
                begin(row)
    except BaseException:
        with suppress(EnvironmentFault):
            workers.close()  # what is under way must not answer in the next rollout
        raise
    return [episode.trajectory for episode in episodes]


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
