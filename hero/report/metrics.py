"""The numbers of one update, under names users know where the meaning is the same."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import stdev

from hero.learner import Learned
from hero.types import FeedbackKind, Trajectory


class Clock:
    """Seconds spent in each stage of an update."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[stage] += now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        return {f"seconds/{stage}": seconds for stage, seconds in self._seconds.items()}


def update_metrics(
    trajectories: Sequence[Trajectory], stop_ids: Sequence[int], learned: Learned,
    unknown_id: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Rewards, turns, divergence and the state of the optimiser.

    `rollout/unknown_tokens` counts `unknown_id`, words that the vocabulary lacks, in what the
    student had read at the last turn of each episode.

    `divergence/error_turns` and `divergence/clean_turns` are means over tokens of turns whose
    observation reported an error or nothing found, and of all others: hindsight should disagree
    more with the former. `divergence/auc` is the chance that a turn of the former kind has the
    larger mean, 0.5 if divergence tells nothing; `divergence/pushed_down` the share of the tokens
    of clean turns that the teacher finds less likely than the student.
    """
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    rewards: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        if not trajectory.failed:
            rewards[trajectory.group_id].append(trajectory.reward)
    paid = [t.reward for t in trajectories if not t.failed]
    metrics = {
        "rewards/mean": _mean(paid),
        "rewards/std": stdev(paid) if len(paid) > 1 else 0.0,
        "rollout/success": _mean([float(t.success) for t in trajectories]),
        "rollout/env_errors": float(sum(t.failed for t in trajectories)),
        "rollout/turns_mean": _mean([float(len(t.turns)) for t in trajectories]),
        "rollout/error_rate": _mean([float(_is_error(turn.feedback_kind)) for turn in turns]),
        "completions/mean_length": _mean([float(len(turn.action_ids)) for turn in turns]),
        "completions/clipped_ratio": _mean(
            [float(turn.action_ids[-1] not in stop_ids) for turn in turns]
        ),
        "frac_reward_zero_std": _mean([float(max(r) - min(r) < 1e-6) for r in rewards.values()]),
        "optim/steps": learned.steps,
        "optim/skipped_steps": learned.skipped_steps,
        "loss": learned.loss,
        "grad_norm": learned.grad_norm,
        "entropy": learned.entropy,
    }
    if learned.drift is not None:
        metrics |= learned.drift.metrics()
    if unknown_id is not None:
        read = [t.turns[-1].prompt_ids for t in trajectories if t.turns]
        metrics["rollout/unknown_tokens"] = sum(ids.count(unknown_id) for ids in read)
    if len(learned.terms) > 1:
        metrics |= {f"loss/{name.replace(' ', '_')}": x for name, x in learned.terms.items()}
    return metrics | {
        f"divergence/{name}": x for name, x in mechanism(trajectories, learned).items()
    }


def mechanism(trajectories: Sequence[Trajectory], learned: Learned) -> dict[str, float]:
    """What the teacher does to turns with a fault and without; what no turn tells is left out."""
    means: dict[bool, list[float]] = {True: [], False: []}
    found: dict[str, list[float]] = defaultdict(list)
    for (t, k), values in learned.divergence.items():
        fault = _is_error(trajectories[t].turns[k].feedback_kind)
        means[fault].append(_mean(values))
        found["error_turns" if fault else "clean_turns"] += values
        found["mean"] += values
        if not fault:
            found["pushed_down"] += [float(gap < 0) for gap in learned.logprob_gap[t, k]]
    found["auc"] = [(x > y) + (x == y) / 2 for x in means[True] for y in means[False]]
    return {name: _mean(values) for name, values in found.items() if values}


def _is_error(kind: FeedbackKind) -> bool:
    """Whether an observation reports a fault; that few steps are left is none."""
    return kind not in (FeedbackKind.OK, FeedbackKind.DONE, FeedbackKind.BUDGET)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
