"""The definition of everything in this package: dense, in textbook form, differentiated by
autograd.

Tests and benchmarks compare with it, documentation points at it. It holds whole logits [N, V]
several times over and rounds in the type of its inputs: call it in fp64 for the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from hero_kernels.aggregation import Weighting
from hero_kernels.objective import DivergenceOutput, Objective, ObjectiveKwargs


def scaled_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """z [N, V] = cap((h·Wᵀ + bias) · logit_scale) / temperature over the real tokens."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = logits[:, :vocab_size] * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1, 1)
    return logits / temperature


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p | q) [N] = sum p·(log p - log q); outcomes of probability 0 count nothing."""
    possible = logp > -torch.inf
    terms = logp.exp() * (logp.where(possible, 0.0) - logq.where(possible, 0.0))
    return terms.sum(-1)


def divergence(logp_s: Tensor, logp_t: Tensor, objective: Objective) -> Tensor:
    """The divergence [N] of two distributions [N, V], given by their log-probabilities."""
    if objective.divergence == "forward_kl":
        return kl(logp_t, logp_s)
    if objective.divergence == "reverse_kl":
        return kl(logp_s, logp_t)
    beta = objective.beta
    mixture = (1 - beta) * logp_s.exp() + beta * logp_t.exp()
    mixture = mixture.where(mixture > 0, 1.0).log()  # where it is 0, so are both probabilities
    return (1 - beta) * kl(logp_s, mixture) + beta * kl(logp_t, mixture)


def restrict(logp: Tensor, keep: Tensor, tail: bool) -> Tensor:
    """[N, V + 1] log-probabilities over the kept tokens [N, V] of each row: the others impossible,
    or gathered in the last column. Without a tail the kept ones are renormalised.
    """
    kept = logp.where(keep, -torch.inf)
    if not tail:
        kept = kept - kept.logsumexp(-1, keepdim=True)
        return torch.cat([kept, torch.full_like(kept[:, :1], -torch.inf)], 1)
    # By logsumexp, without the nan gradient that an empty tail would have.
    empty = keep.all(-1, keepdim=True)
    rest = logp.where(~keep | empty, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest.where(~empty, -torch.inf)], 1)


def server_distributions(
    logp_s: Tensor, ids: Tensor, logprobs: Tensor, tail: bool
) -> tuple[Tensor, Tensor]:
    """Both distributions over the k tokens that a server returned, and their tail: [N, k + 1]."""
    kept_s = logp_s.gather(1, ids)
    if not tail:
        return torch.log_softmax(kept_s, -1), torch.log_softmax(logprobs, -1)
    keep = torch.zeros_like(logp_s, dtype=torch.bool).scatter(1, ids, True)
    tail_s = restrict(logp_s, keep, tail=True)[:, -1:]
    tail_t = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=1e-7).log()
    return torch.cat([kept_s, tail_s], 1), torch.cat([logprobs, tail_t], 1)


def token_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    objective: Objective,
    target_ids: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Divergence [N] of scaled logits [N, V]; arguments as for `fused_linear_divergence`."""
    logp_s = torch.log_softmax(student_logits, -1)
    if teacher_topk is not None:
        pair = server_distributions(logp_s, *teacher_topk, objective.top_k_tail)
        return divergence(*pair, objective)
    assert teacher_logits is not None
    logp_t = torch.log_softmax(teacher_logits, -1)
    if objective.support == "sampled":
        assert target_ids is not None
        y = target_ids[:, None]
        advantage = (logp_s.gather(1, y) - logp_t.gather(1, y)).detach()
        return (advantage * logp_s.gather(1, y))[:, 0]
    if objective.support == "topk":
        assert objective.top_k is not None
        source = logp_s if objective.top_k_source == "student" else logp_t
        keep = torch.zeros_like(logp_s, dtype=torch.bool)
        keep.scatter_(1, source.topk(objective.top_k).indices, True)
        logp_s, logp_t = (restrict(logp, keep, objective.top_k_tail) for logp in (logp_s, logp_t))
    return divergence(logp_s, logp_t, objective)


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    token_weights: Tensor | None = None,
    turn_ids: Tensor | None = None,
    turn_weights: Tensor | None = None,
    trajectory_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    reduction: str = "mean",
    loss_aggregation: str = "token",
    num_items: float | None = None,
    vocab_size: int | None = None,
    **settings: Unpack[ObjectiveKwargs],
) -> DivergenceOutput:
    """The function of that name, for hidden states [N, H] that are finite everywhere."""
    temperature = settings.pop("temperature", 1.0)
    objective = Objective(**settings)  # type: ignore[arg-type]
    weighting = Weighting(
        token_weights, turn_ids, turn_weights, trajectory_ids, loss_aggregation, reduction,
        num_items,
    ).flat()  # fmt: skip

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return scaled_logits(
            hidden, weight, bias, temperature=temperature, softcap=objective.softcap,
            logit_scale=objective.logit_scale, vocab_size=vocab_size,
        )  # fmt: skip

    logits_s = logits(student_hidden, student_weight, student_bias)
    logits_t = None
    if teacher_hidden is not None:
        if teacher_weight is None:
            teacher_weight, teacher_bias = student_weight, student_bias
        bias = None if teacher_bias is None else teacher_bias.detach()
        logits_t = logits(teacher_hidden.detach(), teacher_weight.detach(), bias)
    logp_s = torch.log_softmax(logits_s, -1)
    logp_t = None if logits_t is None else torch.log_softmax(logits_t, -1)
    values = token_divergence(logits_s, logits_t, objective, target_ids, teacher_topk)

    def of_target(logp: Tensor | None) -> Tensor | None:
        if target_ids is None or logp is None:
            return None
        return logp.gather(1, target_ids.clamp(min=0)[:, None])[:, 0].detach()

    ratio = torch.ones_like(values)
    if old_logprobs is not None:
        sampled = of_target(logp_s)
        assert sampled is not None
        ratio = (sampled - old_logprobs).exp()
        ratio = ratio if objective.is_clip is None else ratio.clamp(max=objective.is_clip)
    coefficients = weighting.coefficients(len(values), values)
    losses = coefficients * ratio * values
    loss = losses if reduction == "none" else losses.sum()
    return DivergenceOutput(
        loss=loss,
        per_token=loss if reduction == "none" else values.detach(),
        per_turn=None if turn_ids is None else weighting.turn_means(values.detach(), coefficients),
        student_logprobs=of_target(logp_s),
        teacher_logprobs=of_target(logp_t),
        student_entropy=entropy(logp_s).detach(),
        teacher_entropy=None if logp_t is None else entropy(logp_t),
        top1_agreement=None
        if logp_t is None
        else (logp_s.argmax(-1) == logp_t.argmax(-1)).to(values.dtype),
    )


def entropy(logp: Tensor) -> Tensor:
    """-sum p·log p [N]; outcomes of probability 0 count nothing."""
    return -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)
