"""Where a run stands: the counters that a resumed run goes on from, and when it has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hero.collapse import MAX_BAD_EVALUATIONS, WATCHED, signs_of_collapse
from hero.config import Settings, TrainConfig
from hero.gate import GATE, gate_opens
from hero.reflection.base import ReflectionStats
from hero.types import Trajectory

CEILING = 0.99
"""Dev success from which on nothing is expected to be gained."""
MAX_SATISFIED = 3
"""Evaluations in a row at the ceiling without a hint, after which a run ends."""


@dataclass(kw_only=True, slots=True)
class State(Settings):
    """Counters of a run.

    Every seed is derived from the number of its update. So with the weights and the optimiser's
    state these counters are all that a resumed run needs to end with the very same weights.
    """

    update: int = 0
    """Number of the last update whose weights are here."""
    is_begun: bool = False
    """What is measured before the first update is measured and logged."""
    pending: dict[str, Any] | None = None
    """What was measured of `update` and is not logged yet; None if all is."""
    env_turns: int = 0
    generated_tokens: int = 0
    """Of actions and reflections."""
    reflection_tokens: int = 0
    reflection_seconds: float = 0.0
    steps_taken: int = 0
    best_update: int = -1
    best_dev: float = -1.0
    bad_evaluations: int = 0
    """Evaluations in a row whose dev success was far below the best."""
    watched: dict[str, float] = field(default_factory=dict)
    """Metrics of the best evaluation that a collapse shows in."""
    collapse: str = ""
    """What spoke for a collapse in the last evaluation; "" if nothing did."""
    rescues: int = 0
    """Times that the best weights were loaded again; each halved the learning rate."""
    blind: str = ""
    """What spoke against the reflector in the last evaluation; "" if nothing did."""
    satisfied: int = 0
    """Evaluations in a row at which nothing was left to learn."""
    refreshes: int = 0
    """Times that a frozen teacher took over the student's weights."""
    at_refresh: dict[str, float] = field(default_factory=dict)
    """Metrics of the evaluation at the last of them, or before training."""
    idle_updates: int = 0
    """Updates in a row without an optimiser step, or without a reflection that could be read."""
    stopped: str = ""
    """Why the run has ended; "" while it goes on."""
    fixed: str = ""
    """`Policy.fixed` of the models that the run was begun with."""

    @classmethod
    def of(cls, saved: dict[str, Any]) -> State:
        """What was saved.

        Raises:
            ValueError: fields that are unknown, missing or of another type.
        """
        try:
            return TypeAdapter(cls).validate_python(saved)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {first['msg']}, got {first['input']!r}") from None

    @property
    def logged(self) -> int:
        """Number of the last update that is wholly logged; -1 before the first measurement."""
        if not self.is_begun:
            return -1
        return self.update - 1 if self.pending else self.update

    def judge(self, metrics: Mapping[str, float], update: int, drop: float) -> bool:
        """Take in an evaluation; returns whether it is the best so far.

        Args:
            metrics: of the evaluation and of the update before it.
            update: its number.
            drop: `eval.stop_drop`.
        """
        success = metrics["dev/success"]
        watched = {name: metrics[name] for name in WATCHED if name in metrics}
        if success > self.best_dev:
            self.best_dev, self.best_update = success, update
            self.watched, self.bad_evaluations, self.collapse = watched, 0, ""
            return True
        self.watched = watched | self.watched  # before training some are not known
        if drop >= 1:
            return False
        signs = signs_of_collapse(metrics, self.watched | {"dev/success": self.best_dev}, drop)
        fell = success < self.best_dev - drop
        self.bad_evaluations = self.bad_evaluations + 1 if fell else 0
        if self.bad_evaluations >= MAX_BAD_EVALUATIONS:
            signs = [
                f"dev success was more than {drop:.2f} below its best ({self.best_dev:.2f}, update "
                f"{self.best_update}) twice in a row"
            ]
        self.collapse = ", ".join(signs)
        return False

    def watch(self, metrics: Mapping[str, float], config: TrainConfig) -> bool:
        """Take in what an evaluation says of teacher and reflector; returns whether to refresh.

        Args:
            metrics: of the evaluation and of the update before it.
            config: bounds.
        """
        unhinted = metrics.get("reflection/non_empty_rate", 1.0) == 0
        done = unhinted and metrics["dev/success"] >= CEILING
        self.satisfied = self.satisfied + 1 if done else 0
        now = {name: metrics[name] for name in GATE}
        refresh = config.teacher.refresh == "gated" and bool(self.at_refresh)
        refresh = refresh and gate_opens(now, self.at_refresh)
        self.refreshes += refresh
        if refresh or not self.at_refresh:
            self.at_refresh = now
        bound, self.blind = config.reflection.min_agreement, ""
        agreed = metrics.get("agreement/recall", metrics.get("agreement/consistency"))
        if bound is not None and agreed is not None and agreed < bound and not refresh:
            partner = "the rules" if "agreement/recall" in metrics else "itself"
            self.blind = (
                f"the reflector agrees with {partner} on {agreed:.0%} of the faults, less than "
                f"reflection.min_agreement={bound:g}"
            )
        return refresh

    def count(self, trajectories: Sequence[Trajectory], stats: ReflectionStats) -> int:
        """Take in what an update played and wrote; returns the tokens that were generated."""
        generated = sum(t.num_action_tokens for t in trajectories) + stats.generated_tokens
        self.env_turns += sum(len(trajectory.turns) for trajectory in trajectories)
        self.generated_tokens += generated
        self.reflection_tokens += stats.generated_tokens
        self.reflection_seconds += stats.seconds
        return generated

    def totals(self) -> dict[str, float]:
        """What has been played and written so far, as metrics."""
        names = ("env_turns", "generated_tokens", "reflection_tokens", "reflection_seconds")
        return {name: getattr(self, name) for name in names}

    def count_idle(self, idle: bool) -> None:
        """Take in whether an update came to nothing."""
        self.idle_updates = self.idle_updates + 1 if idle else 0

    def affordable(self, config: TrainConfig, played: int = 0) -> int:
        """Episodes, in whole groups, that surely fit into the rest of the budget of turns.

        Args:
            played: turns of this update so far, which `env_turns` does not hold yet.
        """
        size = config.rollout.group_size
        if config.max_env_turns is None:
            return config.rollout.tasks_per_update * size
        left = config.max_env_turns - self.env_turns - played
        return left // (size * config.rollout.max_turns) * size

    def finished(self, config: TrainConfig) -> bool:
        """Whether the run has come to its end; `stopped` then says why."""
        self.stopped = ""
        if self.update >= config.updates:
            self.stopped = f"all {config.updates} updates done"
        elif not self.affordable(config):
            self.stopped = (
                f"the budget of {config.max_env_turns} environment turns is used up: after "
                f"{self.env_turns}, what is left may not hold another group of episodes"
            )
        elif self.collapse:
            self.stopped = f"collapse: {self.collapse}"
        elif self.blind:
            self.stopped = self.blind
        elif self.satisfied >= MAX_SATISFIED:
            self.stopped = (
                f"nothing is left to learn: no turn had a hint and dev success was at least "
                f"{CEILING:.0%} at {MAX_SATISFIED} evaluations in a row"
            )
        else:
            self.stopped = idle_reason(self.idle_updates, config.max_idle_updates)
        return bool(self.stopped)


def idle_reason(updates: int, most: int) -> str:
    """Why a run ends in which so many updates in a row came to nothing; "" if it goes on.

    `most` is `max_idle_updates`, 0 for no bound.
    """
    if not 0 < most <= updates:
        return ""
    return (
        f"in {updates} updates in a row nothing was trained or no reflection could be read: no "
        "turn had a hint, an observation or an advantage to learn from, or no gradient was finite "
        "(max_idle_updates)"
    )
