"""The nouns of the pipeline: what flows from `envs` to the optimiser.

    envs -> rollout -> reflection -> algorithm -> packing -> loss -> learner
            Trajectory  Diagnosis    Sample       PackedBatch

Token ids are the currency: a prompt is the ids the sampler saw, an action is the ids it sampled
(the end token included). Text is never tokenised a second time, so what is trained is what was
sampled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Message = dict[str, str]
"""One chat message: `{"role": "system" | "user" | "assistant" | "tool", "content": text}`."""


class Fault(RuntimeError):
    """Ends a command with a message for the user, who can do something about it: not a bug."""


class StopReason(StrEnum):
    """Why an episode ended."""

    DONE = "done"  # the environment terminated
    TRUNCATED = "truncated"  # the environment's own limit
    MAX_TURNS = "max_turns"  # the trainer's cap of turns an episode
    MAX_TOKENS = "max_tokens"  # the trainer's cap of tokens an episode
    ENV_ERROR = "env_error"  # the environment raised or broke its contract: nothing is learnt


class FeedbackKind(StrEnum):
    """What an observation says about the action before it."""

    OK = "ok"
    NO_RESULTS = "no_results"
    INVALID_ACTION = "invalid_action"
    PARSE_ERROR = "parse_error"
    INSUFFICIENT = "insufficient"
    BUDGET = "budget"
    DONE = "done"


@dataclass(kw_only=True, slots=True)
class Turn:
    """One decision of the student and what the environment answered."""

    prompt_ids: list[int]
    """The exact ids the sampler saw: the student's decision context h_k."""
    action_ids: list[int]
    """The exact ids it sampled, with the end token unless the turn was cut off by length."""
    sampled_logprobs: list[float]
    """Log-probability of each action id at the sampling temperature."""
    action_text: str
    observation: str | None = None
    """What followed; None only if the environment never answered."""
    feedback_kind: FeedbackKind = FeedbackKind.OK
    is_error: bool = False
    parse_ok: bool = True

    def __post_init__(self) -> None:
        if len(self.action_ids) != len(self.sampled_logprobs):
            raise ValueError(
                f"A turn has {len(self.action_ids)} action_ids and {len(self.sampled_logprobs)} "
                "sampled_logprobs: every sampled token needs its log-probability."
            )


@dataclass(kw_only=True, slots=True)
class Trajectory:
    """One whole episode."""

    id: str
    group_id: str
    """Episodes of one group share task and initial state (GRPO, successful siblings)."""
    task_id: str
    instruction: str
    turns: list[Turn]
    reward: float
    success: bool
    stop_reason: StopReason
    error: str = ""
    """What went wrong, if `stop_reason` is `env_error`."""

    def fail(self, cause: object) -> None:
        """End the episode because of its environment: it did not succeed and is not trained."""
        self.stop_reason, self.error, self.success = StopReason.ENV_ERROR, str(cause), False

    @property
    def failed(self) -> bool:
        return self.stop_reason is StopReason.ENV_ERROR

    @property
    def num_action_tokens(self) -> int:
        return sum(len(turn.action_ids) for turn in self.turns)


@dataclass(kw_only=True, slots=True)
class Diagnosis:
    """The reflector's reading of one turn. An empty `hint` masks the turn."""

    turn: int
    """0-based index into `Trajectory.turns`."""
    necessary: bool = True
    valid: bool = True
    failure_cause: str = ""
    corrected_action: str = ""
    hint: str = ""
    source: str = ""
    """Which reflector wrote it: self, teacher, rules, openai, or "" for none."""


Gate = Callable[["Tensor"], "Tensor"]
"""From the teacher's gap of each token [n], log T(y) - log S(y), to a factor of its weight [n]."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One turn, annotated by an algorithm: what the loss needs and nothing else."""

    trajectory: int
    """Index into the batch's trajectories."""
    turn: int
    prompt_ids: list[int]
    action_ids: list[int]
    sampled_logprobs: list[float]
    branch_at: int = 0
    """Position in `prompt_ids` where the last message's content ends."""
    privileged_ids: list[int] = field(default_factory=list)
    """The teacher's privileged context; empty when the turn has no teacher."""
    distill_weight: float = 0.0
    """m_ik of the distillation loss: 0 masks the turn, and then no teacher pass is spent on it."""
    pg_weight: float = 0.0
    """Weight of the turn in the policy-gradient loss; 0 leaves it out."""
    advantage: float = 0.0
    """For the policy-gradient loss; a turn of advantage 0 still counts in its denominator."""
    distill_gate: Gate | None = None
    """Factors of the tokens' divergence, S being the policy that sampled."""
    advantage_gate: Gate | None = None
    """Factors of the tokens' advantage, likewise."""
    following_ids: list[int] = field(default_factory=list)
    """What stands behind the action in the next prompt, up to the end of the observation."""
    num_observed: int = 0
    """Its last so many tokens are the observation, those before belong to the chat template."""

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher scores the turn."""
        return self.distill_weight != 0 or self.advantage_gate is not None

    @property
    def teacher_prompt_ids(self) -> list[int]:
        """The student's own context with the privileged context spliced in at `branch_at`."""
        before, after = self.prompt_ids[: self.branch_at], self.prompt_ids[self.branch_at :]
        return before + self.privileged_ids + after


def to_json(trajectory: Trajectory) -> str:
    """One line of JSON."""
    return json.dumps(asdict(trajectory), ensure_ascii=False)
