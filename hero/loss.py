"""One loss for every algorithm: a weighted sum over action tokens of divergence and policy
gradient.

    L = Σ_d w_d · min(exp(log S(y) - old), clip) · D(S, T)  -  Σ_p w_p · min(r·A, clip(r)·A)

The weights w hold the aggregation and its denominator for the whole minibatch, so micro-batches
only add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hero.config import LossConfig
from hero.packing import Packed, PackedBatch, Weighted
from hero.policy import Policy
from hero.teacher import TeacherWeights
from hero.types import Sample
from hero_kernels import DivergenceOutput, fused_linear_divergence, token_coefficients


@dataclass(kw_only=True, slots=True)
class LossOutput:
    """The loss of a micro-batch, or one term of it, and what it saw; M tokens with a teacher."""

    loss: Tensor
    """[] the only one with a gradient."""
    divergence: Tensor
    """[M] per-token divergence without weights, nats."""
    logprob_gap: Tensor
    """[M] log T(y) - log S(y)."""
    entropy: Tensor
    """[M] of the student, or [N] of all tokens if nothing is distilled."""


def weigh(samples: Sequence[Sample], config: LossConfig) -> list[Weighted]:
    """The samples of a minibatch, one optimiser step, with their tokens' coefficients.

    Those that no term of the loss trains are left out, after they counted in the denominators.
    """
    if not samples:
        return []
    skip = int(config.skip_first_token)
    distill = _coefficients(samples, [s.distill_weight for s in samples], config, skip)
    pg = _coefficients(samples, [s.pg_weight for s in samples], config, 0)
    weighted = [
        Weighted(sample=sample, distill=d, pg=p)
        for sample, d, p in zip(samples, distill, pg, strict=True)
    ]
    return [item for item in weighted if item.losses]


def _coefficients(
    samples: Sequence[Sample], turn_weights: Sequence[float], config: LossConfig, skip: int
) -> Sequence[Tensor]:
    """Coefficients [len(action_ids)] of each sample's tokens, 0 for the `skip` first ones."""
    lengths = [len(sample.action_ids) for sample in samples]
    trajectories = torch.tensor([sample.trajectory for sample in samples])
    # Numbered anew: ids must be smaller than the number of tokens, and a minibatch may hold few.
    trajectory_ids = trajectories.unique(return_inverse=True)[1]
    per_turn = torch.tensor(lengths)
    return token_coefficients(
        torch.tensor([float(i >= skip) for length in lengths for i in range(length)]),
        turn_ids=torch.arange(len(samples)).repeat_interleave(per_turn),
        turn_weights=torch.tensor(turn_weights),
        trajectory_ids=trajectory_ids.repeat_interleave(per_turn),
        loss_aggregation=config.loss_aggregation,
    ).split(lengths)


def compute_loss(
    policy: Policy,
    teacher_weights: TeacherWeights,
    batch: PackedBatch,
    config: LossConfig,
    temperature: float,
) -> LossOutput:
    """Loss of one micro-batch; `temperature` is the sampler's."""
    hidden = _action_states(policy, batch.student)
    terms = []
    if batch.teacher is not None:
        with torch.no_grad(), teacher_weights.applied():
            teacher_hidden = _action_states(policy, batch.teacher)
        head = teacher_weights.own_head(policy)
        terms.append(
            divergence_term(policy, hidden, teacher_hidden, head, batch, config, temperature)
        )
    if any("policy gradient" in weighted.losses for weighted in batch.samples):
        terms.append(policy_gradient_term(policy, hidden, batch, config, temperature))
    # What was seen is reported by the first term: the divergence, where there is one.
    return replace(terms[0], loss=torch.stack([term.loss for term in terms]).sum())


def _action_states(policy: Policy, packed: Packed) -> Tensor:
    """[N, H] the states that predict each action token."""
    hidden = policy.hidden(**packed.inputs())
    return hidden.flatten(0, 1)[packed.index]


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
    nothing = entropy.new_zeros(0)
    return LossOutput(
        loss=-(batch.pg_weights * gain).sum(),
        divergence=nothing,
        logprob_gap=nothing,
        entropy=entropy.detach(),
    )
