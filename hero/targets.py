"""What a warm start learns from: episodes of an imperfect demonstrator, hindsight, and diagnoses.

Three kinds of targets:

- plain: the demonstrator's own actions. This makes the student, with the demonstrator's faults.
- hindsight: a turn with a privileged context, then the right action. This makes the teacher.
- diagnosis: the reflection request, then the environment's own diagnoses. This makes the reflector.

The last two also come from near-perfect and from noisy episodes, so that they hold on the states
that the student will visit while it gets better (docs/method.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hero.algorithms.base import Demonstration
from hero.config import RolloutConfig, SftConfig
from hero.envs import border
from hero.episodes import Assignment, derive_seed, gold_episodes, rewarded, rollout
from hero.prompts import Hindsight, Prompts, make_prompts
from hero.renderer import Renderer
from hero.sampling import Completion, Sampling
from hero.scratch import diagnosis_json
from hero.types import Diagnosis, Sample, Trajectory, Turn
from hero.worked import worked_episodes

KINDS = ("plain", "hindsight", "diagnosis")
FAULTLESS = Diagnosis(turn=-1)
"""Written as turn 0: what the request asks for where no turn has a fault."""


def make_targets(
    config: SftConfig,
    env: Any,
    renderer: Renderer,
    count: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[list[Sample]]]:
    """Roll out all episodes on training tasks; targets of each kind, episode by episode."""
    prompts, demonstrations = make_prompts(config.prompts), config.env.demonstrations
    train = border.tasks(env, "train")
    shown, tasks = worked_episodes(env, train, demonstrations, config.max_turns, renderer)
    rules = border.system_prompt(env)
    targets: dict[str, list[list[Sample]]] = {kind: [] for kind in KINDS}
    for number in range(config.demonstrator_episodes + config.coverage_episodes):
        count(number, config.demonstrator_episodes + config.coverage_episodes)
        rng = random.Random(derive_seed(config.seed, 2, number))
        demonstrated = number < config.demonstrator_episodes
        noise = config.coverage_noise[number % len(config.coverage_noise)]
        demonstrate = partial(border.action, env, "demonstrate", rng)
        act = demonstrate if demonstrated else Wanderer(env, rng, noise)
        right: list[str] = []  # the oracle's action in the state of each turn
        sampler = Scripted(partial(_noting, env, right, act), renderer)
        played = rollout(
            [Assignment(id=str(number), group_id=str(number), task_id=rng.choice(tasks))],
            envs=[env], sampler=sampler, renderer=renderer,
            config=RolloutConfig(max_turns=config.max_turns), seed=number, shown=shown,
        )  # fmt: skip
        [trajectory] = rewarded(played, config.env.reward)
        diagnoses = border.diagnose(env, trajectory)
        if demonstrated:
            targets["plain"].append([_sample(t.prompt_ids, t.action_ids) for t in trajectory.turns])
        task = trajectory.task_id
        demo = gold_episodes(env, [task], config.max_turns).get(task, ())
        told = hindsight_samples(
            trajectory, diagnoses, right, demo, prompts, renderer, rng, config.look_ahead
        )
        if demonstrated:
            told += blank_samples(trajectory, config.blank_contexts, prompts, renderer, rng)
        if told:
            targets["hindsight"].append(sorted(told, key=lambda sample: len(sample.prompt_ids)))
        request = renderer.start(
            [{"role": "user", "content": prompts.reflection(trajectory, rules)}]
        )
        listed = [d for d in diagnoses if config.diagnoses == "all" or _is_faulty(d)]
        answer = "\n".join(map(diagnosis_json, listed or [FAULTLESS]))
        ids = [*renderer.encode(answer), renderer.end_id]
        targets["diagnosis"].append([_sample(request, ids)])
    return targets


class Scripted:
    """A sampler that says what a function says: demonstrations go the way of all rollouts."""

    def __init__(self, act: Callable[[], str], renderer: Renderer) -> None:
        self.act = act
        self.renderer = renderer

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """One scripted answer for each prompt."""
        answers = [[*self.renderer.encode(self.act()), self.renderer.end_id] for _ in prompts]
        return [Completion(ids=ids, logprobs=[0.0] * len(ids)) for ids in answers]


def _noting(env: Any, right: list[str], act: Callable[[], str]) -> str:
    """An action, after the oracle's was written down."""
    right.append(border.action(env, "oracle"))
    return act()


LOOP = 0.7
"""Chance that a repeated action is repeated once more."""


class Wanderer:
    """The oracle's actions; with probability `noise` a random one, or the last one again.

    A student that learns meets states that the demonstrator never does: it gets stuck in loops of
    one click, which the reflector has to have seen.
    """

    def __init__(self, env: Any, rng: random.Random, noise: float) -> None:
        self.env, self.rng, self.noise = env, rng, noise
        self.last, self.is_stuck = "", False

    def __call__(self) -> str:
        draw = self.rng.random()
        self.is_stuck = bool(self.last) and draw < (LOOP if self.is_stuck else self.noise / 2)
        if not self.is_stuck:
            wanders = draw < self.noise
            self.last = (
                border.action(self.env, "random_action", self.rng)
                if wanders
                else border.action(self.env, "oracle")
            )
        return self.last


def _is_faulty(diagnosis: Diagnosis) -> bool:
    return diagnosis != Diagnosis(turn=diagnosis.turn, source=diagnosis.source)


def hindsight_samples(
    trajectory: Trajectory,
    diagnoses: Sequence[Diagnosis],
    oracle: Sequence[str],
    demonstration: Demonstration,
    prompts: Prompts,
    renderer: Renderer,
    rng: random.Random,
    look_ahead: int = 1,
) -> list[Sample]:
    """Answers with hindsight: the right action after a hint, the same action after a good turn.

    The right action is the corrected one, or the oracle's in the state of the turn (`oracle`). A
    turn is left out if it was faulty and nothing better is known.

    What of the hindsight is shown is drawn at random, each kind equally often, so that the teacher
    of every mode has been met: all of it, the diagnosis alone, observation and reward, the outcome,
    a successful episode. Observation means those of the next turns, up to `look_ahead` of them.
    """
    samples = []
    for k, (turn, diagnosis, best) in enumerate(
        zip(trajectory.turns, diagnoses, oracle, strict=True)
    ):
        faulty = _is_faulty(diagnosis)
        right = diagnosis.corrected_action or best if faulty else turn.action_text
        if faulty and right.strip() in ("", turn.action_text.strip()):
            continue
        further = rng.randrange(look_ahead) if look_ahead > 1 else 0
        after = trajectory.turns[k + 1 : k + 1 + further]
        raw = Hindsight(
            observation=turn.observation,
            later=tuple(t.observation for t in after if t.observation is not None),
            reward=trajectory.reward,
            parse_ok=turn.parse_ok,
        )
        told = Hindsight(
            necessary=diagnosis.necessary,
            valid=diagnosis.valid,
            failure_cause=diagnosis.failure_cause,
            hint=diagnosis.hint,
            corrected_action=diagnosis.corrected_action,
        )
        both = replace(
            told,
            observation=raw.observation,
            later=raw.later,
            reward=raw.reward,
            parse_ok=raw.parse_ok,
        )
        others = [raw, Hindsight(outcome=trajectory.success)]
        others += [Hindsight(demonstration=demonstration)] if demonstration else []
        if diagnosis.hint:
            seen = rng.choice([both, told, replace(both, corrected_action=""), *others])
        elif not faulty and rng.random() < 0.5:
            seen = rng.choice(others)
        else:
            continue
        samples.append(_told(turn, right, seen, prompts, renderer))
    return samples


def blank_samples(
    trajectory: Trajectory, share: float, prompts: Prompts, renderer: Renderer, rng: random.Random
) -> list[Sample]:
    """The same action again behind a context that says nothing, for this share of the turns."""
    return [
        _told(turn, turn.action_text, Hindsight(), prompts, renderer)
        for turn in trajectory.turns
        if rng.random() < share
    ]


def _told(turn: Turn, action: str, seen: Hindsight, prompts: Prompts, renderer: Renderer) -> Sample:
    """An action behind a privileged context."""
    sample = _sample(turn.prompt_ids, [*renderer.encode(action), renderer.end_id])
    sample.privileged_ids = renderer.encode(prompts.privileged_context(seen))
    sample.branch_at = renderer.branch_at(turn.prompt_ids)
    sample.distill_weight = 1.0
    return sample


def _sample(prompt_ids: list[int], action_ids: list[int]) -> Sample:
    """A supervised target; `trajectory` is set when a batch is drawn."""
    return Sample(
        trajectory=0, turn=0, prompt_ids=prompt_ids, action_ids=action_ids,
        sampled_logprobs=[0.0] * len(action_ids),
    )  # fmt: skip
