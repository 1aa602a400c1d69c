"""One loss for every algorithm: a weighted sum over action tokens of divergence and policy
gradient.

Token weights hold the aggregation and its denominator for the whole minibatch, so micro-batches
only add up:
    L = Σ_d w_d · min(exp(log S(y) - old), clip) · D(S, T)  -  Σ_p w_p · min(r·A, clip(r)·A)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hero.config import LossConfig
from hero.packing import Packed, PackedBatch
from hero.policy import Policy
from hero.teacher import TeacherWeights
from hero.types import Sample
from hero_kernels import DivergenceOutput, fused_linear_divergence, linear_logprobs


@dataclass(kw_only=True, slots=True)
class LossOutput:
    """The loss of a micro-batch and what it saw, detached; M tokens with a teacher."""

    loss: Tensor
    divergence: Tensor
    """[M] per-token divergence without weights, nats."""
    logprob_gap: Tensor
    """[M] log T(y) - log S(y)."""
    entropy: Tensor
    """[M] of the student, or [P] of the policy-gradient tokens if nothing is distilled."""


def token_weights(
    samples: Sequence[Sample],
    weights: Sequence[float],
    aggregation: str,
    skip_first_token: bool = False,
) -> list[Tensor]:
    """Weights [len(action_ids)] of each sample's tokens; they sum to 1 over the batch (or to 0).

    Args:
        samples: all turns of one optimiser step. weights: m_ik of each turn. aggregation: `token`:
        m·a / Σ m·a; `turn`: mean over a turn's tokens, then over turns; `trajectory`:
            turn means, then means over trajectories.
        skip_first_token: leave out each action's first token.
    """
    masks = [torch.tensor(sample.loss_mask, dtype=torch.float32) for sample in samples]
    if skip_first_token:
        for mask in masks:
            mask[0] = 0.0
    counts = [float(mask.sum()) for mask in masks]
    turn_weights = [w if count else 0.0 for w, count in zip(weights, counts, strict=True)]
    if aggregation == "token":
        total = max(1.0, sum(w * count for w, count in zip(turn_weights, counts, strict=True)))
        return [mask * (w / total) for mask, w in zip(masks, turn_weights, strict=True)]
    shares = turn_weights
    if aggregation == "trajectory":
        sums: dict[int, float] = {}
        for sample, w in zip(samples, turn_weights, strict=True):
            sums[sample.trajectory] = sums.get(sample.trajectory, 0.0) + w
        shares = [
            w / sums[sample.trajectory] if w else 0.0
            for sample, w in zip(samples, turn_weights, strict=True)
        ]
    elif aggregation != "turn":
        raise ValueError(
            f"Unknown loss_aggregation {aggregation!r}: expected token, turn or trajectory."
        )
    total = sum(shares) or 1.0
    return [
        mask * (s / total / max(c, 1.0)) for mask, s, c in zip(masks, shares, counts, strict=True)
    ]


def compute_loss(
    policy: Policy,
    teacher_weights: TeacherWeights,
    batch: PackedBatch,
    config: LossConfig,
    temperature: float,
) -> LossOutput:
    """Loss of one micro-batch; `temperature` is the sampler's."""
    hidden = _action_states(policy, batch.student)
    loss = hidden.sum() * 0.0
    empty = hidden.new_zeros(0, dtype=torch.float32)
    output = LossOutput(loss=loss, divergence=empty, logprob_gap=empty, entropy=empty)
    if batch.teacher is not None:
        _add_divergence(output, policy, teacher_weights, batch, config, hidden, temperature)
    if bool((batch.policy_weights * batch.advantages).any()):
        _add_policy_gradient(output, policy, batch, config, hidden, temperature)
    return output


def _action_states(policy: Policy, packed: Packed) -> Tensor:
    """[N, H] the states that predict each action token."""
    hidden = policy.hidden(**packed.inputs())
    return hidden.flatten(0, 1)[packed.index]


@torch.no_grad()
def _teacher_states(policy: Policy, weights: TeacherWeights, packed: Packed) -> Tensor:
    with weights.applied():
        return _action_states(policy, packed)


def _add_divergence(
    output: LossOutput,
    policy: Policy,
    teacher_weights: TeacherWeights,
    batch: PackedBatch,
    config: LossConfig,
    hidden: Tensor,
    temperature: float,
) -> None:
    assert batch.teacher is not None
    chosen = batch.distill_index
    head = policy.head_options
    result = fused_linear_divergence(
        hidden[chosen],
        policy.head_weight,
        _teacher_states(policy, teacher_weights, batch.teacher),
        divergence=config.divergence,
        beta=config.beta,
        temperature=temperature,
        softcap=head["softcap"],
        logit_scale=head["logit_scale"],
        student_bias=head["bias"],
        token_weights=batch.distill_weights[chosen],
        target_ids=batch.target_ids[chosen],
        old_logprobs=batch.sampled_logprobs[chosen] if config.is_clip else None,
        is_clip=config.is_clip or None,
        support=config.support,
        top_k=config.top_k if config.support == "topk" else None,
        reduction="sum",
        return_stats=True,
        impl=config.impl,
    )
    assert isinstance(result, DivergenceOutput)
    assert result.student_logprobs is not None and result.teacher_logprobs is not None
    assert result.student_entropy is not None
    output.loss = output.loss + result.loss
    output.divergence = result.per_token.detach()
    output.logprob_gap = (result.teacher_logprobs - result.student_logprobs).detach()
    output.entropy = result.student_entropy.detach()


def _add_policy_gradient(
    output: LossOutput,
    policy: Policy,
    batch: PackedBatch,
    config: LossConfig,
    hidden: Tensor,
    temperature: float,
) -> None:
    head = policy.head_options
    logprobs, entropy = linear_logprobs(
        hidden,
        policy.head_weight,
        batch.target_ids,
        bias=head["bias"],
        temperature=temperature,
        softcap=head["softcap"],
        logit_scale=head["logit_scale"],
        return_entropy=True,
    )
    ratio = torch.exp(logprobs - batch.sampled_logprobs)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    output.loss = output.loss - (batch.policy_weights * gain).sum()
    if not output.entropy.numel():
        output.entropy = entropy.detach()
