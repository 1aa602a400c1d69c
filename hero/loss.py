"""One loss for every algorithm: a weighted sum over tokens of up to four terms.

    L = Σ_d w_d · min(exp(log S(y) - old), clip) · D(S, T)  -  Σ_p w_p · min(r·A, clip(r)·A)
        - λ/O · Σ_o log S(o)  +  κ/N · Σ_n KL(S, start)

The first two go over the action tokens that are distilled or follow an advantage, the third over
the O tokens of the observations that followed (ECHO, arXiv 2605.24517), the fourth over all N
action tokens. The weights hold the aggregation and its denominator for the whole minibatch, so
micro-batches only add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hero.config import LossConfig
from hero.packing import PackedBatch, Weighted
from hero.policy import Policy
from hero.teacher import Scorer
from hero.types import Gate, Sample
from hero_kernels import (
    DivergenceOutput,
    fused_linear_divergence,
    linear_logprobs,
    token_coefficients,
)

TERMS = ("distillation", "policy gradient", "observation", "KL to the start")
"""The terms of the loss, by the names that reports use."""


@dataclass(kw_only=True, slots=True)
class LossOutput:
    """The loss of a micro-batch, or one term of it, and what it saw; M tokens with a teacher."""

    loss: Tensor
    """[] the only one with a gradient."""
    divergence: Tensor
    """[M] per-token divergence without weights, nats."""
    logprob_gap: Tensor
    """[M] log T(y) - log S(y)."""
    drift: Tensor
    """[M] log S(y) - the sampler's log-probability of y, as it was sampled; like `entropy`."""
    entropy: Tensor
    """[M] of the student, [N] of all tokens if nothing is distilled, [0] if neither is seen."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """[] of each term of `TERMS` that there is, without gradient; their sum is the loss."""


def weigh(
    samples: Sequence[Sample], config: LossConfig, total: Callable[[float], float] = float
) -> list[Weighted]:
    """The samples of a minibatch, one optimiser step, with their tokens' coefficients.

    Those that no term of the loss trains are left out, after they counted in the denominators.
    `total` adds up a denominator over the processes that share the minibatch; each of them calls
    it four times.
    """
    skip = int(config.skip_first_token)
    distill = _coefficients(samples, [s.distill_weight for s in samples], config, skip, total)
    pg = _coefficients(samples, [s.pg_weight for s in samples], config, 0, total)
    observed = total(sum(sample.num_observed for sample in samples))
    acted = total(sum(len(sample.action_ids) for sample in samples))
    weighted = [
        Weighted(
            sample=sample, distill=d, pg=p,
            observation=config.observation_weight / max(1, observed),
            kl_to_start=config.kl_to_start / max(1, acted),
        )
        for sample, d, p in zip(samples, distill, pg, strict=True)
    ]  # fmt: skip
    return [item for item in weighted if item.losses]


def _coefficients(
    samples: Sequence[Sample], turn_weights: Sequence[float], config: LossConfig, skip: int,
    total: Callable[[float], float],
) -> Sequence[Tensor]:  # fmt: skip
    """Coefficients [len(action_ids)] of each sample's tokens, 0 for the `skip` first ones."""
    lengths = [len(sample.action_ids) for sample in samples]
    trajectories = torch.tensor([sample.trajectory for sample in samples], dtype=torch.long)
    # Numbered anew: ids must be smaller than the number of tokens, and a minibatch may hold few.
    trajectory_ids = trajectories.unique(return_inverse=True)[1]
    per_turn = torch.tensor(lengths, dtype=torch.long)
    counted = [float(i >= skip) for length in lengths for i in range(length)]
    summands = token_coefficients(
        torch.tensor(counted, dtype=torch.float64),
        turn_ids=torch.arange(len(samples)).repeat_interleave(per_turn),
        turn_weights=torch.tensor(turn_weights),
        trajectory_ids=trajectory_ids.repeat_interleave(per_turn),
        loss_aggregation=config.loss_aggregation,
        num_items=1,
    )
    whole = total(float(summands.sum()))
    return (summands / whole if whole else summands).float().split(lengths)


def compute_loss(
    policy: Policy,
    teacher: Scorer,
    batch: PackedBatch,
    config: LossConfig,
    temperature: float,
    start: Scorer | None = None,
) -> LossOutput:
    """Loss of one micro-batch.

    Args:
        policy: the student.
        teacher: scores the rows of the teacher.
        batch: both, with their weights.
        config: of the terms.
        temperature: the sampler's.
        start: scores with the weights at the start of training, for `kl_to_start`.
    """
    states = batch.student.states(policy)
    hidden = states[batch.student.index]
    terms: dict[str, LossOutput] = {}
    if batch.teacher is not None:
        teacher_hidden, head = teacher.states(batch.teacher), teacher.own_head()
        batch = gated(policy, teacher_hidden, head, batch, temperature)
        if any(weighted.sample.distill_weight for weighted in batch.samples):
            terms["distillation"] = divergence_term(
                policy, hidden, teacher_hidden, head, batch, config, temperature
            )
    if any("policy gradient" in weighted.losses for weighted in batch.samples):
        terms["policy gradient"] = policy_gradient_term(policy, hidden, batch, config, temperature)
    if batch.observation_weight and len(batch.observed_ids):
        terms["observation"] = observation_term(policy, states[batch.student.observed], batch)
    if start is not None:
        terms["KL to the start"] = start_term(policy, hidden, start, batch, config, temperature)
    # What was seen is reported by the first term: the divergence, where there is one.
    return replace(
        next(iter(terms.values())),
        loss=torch.stack([term.loss for term in terms.values()]).sum(),
        terms={name: term.loss.detach() for name, term in terms.items()},
    )


@torch.no_grad()
def gated(
    policy: Policy, teacher_hidden: Tensor, teacher_head: dict[str, Any], batch: PackedBatch,
    temperature: float,
) -> PackedBatch:  # fmt: skip
    """The batch with divergence weights and advantages as the gates of its samples make them.

    Arguments as those of `divergence_term`. The gap is that of the policy that sampled, so gates
    are constants of the step.
    """
    samples = [item.sample for item in batch.samples if item.sample.has_teacher]
    if not any(sample.distill_gate or sample.advantage_gate for sample in samples):
        return batch
    chosen = batch.distill_index
    scored = linear_logprobs(
        teacher_hidden, teacher_head.get("teacher_weight", policy.head_weight),
        batch.target_ids[chosen], bias=teacher_head.get("teacher_bias", policy.head.bias),
        temperature=temperature, **policy.head_options,
    )  # fmt: skip
    assert isinstance(scored, Tensor)
    gaps = (scored - batch.sampled_logprobs[chosen]).split([len(s.action_ids) for s in samples])

    def factors(gates: list[Gate | None]) -> Tensor:
        found = torch.ones_like(batch.advantages)
        pairs = zip(gates, gaps, strict=True)
        found[chosen] = torch.cat(
            [gate(gap) if gate else torch.ones_like(gap) for gate, gap in pairs]
        )
        return found

    return replace(
        batch,
        distill_weights=batch.distill_weights * factors([s.distill_gate for s in samples]),
        advantages=batch.advantages * factors([s.advantage_gate for s in samples]),
    )


def divergence_term(
    policy: Policy,
    hidden: Tensor,
    teacher_hidden: Tensor,
    teacher_head: dict[str, Any],
    batch: PackedBatch,
    config: LossConfig,
    temperature: float,
) -> LossOutput:
    """Divergence from the teacher on the distilled tokens.

    Args:
        policy: for its head.
        hidden: [N, H] the student's states of all action tokens.
        teacher_hidden: [M, H] the teacher's, of the distilled ones.
        teacher_head: its own head, {} if it is the student's.
        batch: targets and weights.
        config: which divergence.
        temperature: divides the logits of both.
    """
    chosen = batch.distill_index
    result = fused_linear_divergence(
        hidden[chosen],
        policy.head_weight,
        teacher_hidden,
        divergence=config.divergence,
        beta=config.beta,
        temperature=temperature,
        student_bias=policy.head.bias,
        token_weights=batch.distill_weights[chosen],
        target_ids=batch.target_ids[chosen],
        old_logprobs=batch.sampled_logprobs[chosen] if config.is_clip else None,
        is_clip=config.is_clip or None,
        support=config.support,
        top_k=config.top_k if config.support == "topk" else None,
        reduction="sum",
        return_stats=True,
        impl=config.impl,
        **teacher_head,
        **policy.head_options,
    )
    assert isinstance(result, DivergenceOutput)
    assert result.student_logprobs is not None and result.teacher_logprobs is not None
    return LossOutput(
        loss=result.loss,
        divergence=result.per_token,
        logprob_gap=result.teacher_logprobs - result.student_logprobs,
        drift=result.student_logprobs.detach() - batch.sampled_logprobs[chosen],
        entropy=result.student_entropy,
    )


def policy_gradient_term(
    policy: Policy, hidden: Tensor, batch: PackedBatch, config: LossConfig, temperature: float
) -> LossOutput:
    """PPO's clipped surrogate on all tokens, from their states `hidden` [N, H].

    The ratio of tokens that nobody sampled (NaN) is 1: with advantage 1 their gradient is that of
    the log-likelihood.
    """
    logprobs, entropy = policy.logprobs(hidden, batch.target_ids, temperature)
    sampled = batch.sampled_logprobs
    ratio = torch.exp(logprobs - torch.where(sampled.isnan(), logprobs.detach(), sampled))
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    loss = -(batch.pg_weights * gain).sum()
    return _without_teacher(loss, entropy.detach(), logprobs.detach() - sampled)


def observation_term(policy: Policy, hidden: Tensor, batch: PackedBatch) -> LossOutput:
    """Cross-entropy, at temperature 1, of the observation tokens after their states [O, H]."""
    logprobs, entropy = policy.logprobs(hidden, batch.observed_ids)
    nothing = entropy.new_zeros(0)
    return _without_teacher(-batch.observation_weight * logprobs.sum(), nothing, nothing)


def start_term(
    policy: Policy, hidden: Tensor, start: Scorer, batch: PackedBatch, config: LossConfig,
    temperature: float,
) -> LossOutput:  # fmt: skip
    """KL(student, starting weights) on all action tokens, from the student's states [N, H]."""
    loss = fused_linear_divergence(
        hidden, policy.head_weight, start.states(batch.student),
        divergence="reverse_kl", temperature=temperature, student_bias=policy.head.bias,
        reduction="sum", impl=config.impl, **start.own_head(), **policy.head_options,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    nothing = loss.new_zeros(0)
    return _without_teacher(batch.kl_to_start * loss, nothing, nothing)


def _without_teacher(loss: Tensor, entropy: Tensor, drift: Tensor) -> LossOutput:
    """A term that compares with no teacher."""
    nothing = entropy.new_zeros(0)
    return LossOutput(
        loss=loss, divergence=nothing, logprob_gap=nothing, drift=drift, entropy=entropy
    )
