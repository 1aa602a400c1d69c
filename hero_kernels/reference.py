"""The definition of everything in this package: dense, in textbook form, differentiated by
autograd.

Tests and benchmarks compare with it, documentation points at it. It holds whole logits [N, V]
several times over and rounds in the type of its inputs: call it in fp64 for the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hero_kernels.options import DivergenceOutput


def scaled_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
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
    return logits / temperature


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p | q) [N] = sum p·(log p - log q); outcomes of probability 0 count nothing."""
    return kl_terms(logp, logq).sum(-1)


def kl_terms(logp: Tensor, logq: Tensor) -> Tensor:
    possible = logp > -torch.inf
    return logp.exp() * (logp.where(possible, 0.0) - logq.where(possible, 0.0))


def divergence_terms(logp_s: Tensor, logp_t: Tensor, divergence: str, beta: float) -> Tensor:
    """What each token of the vocabulary adds to the divergence: [N, V], of either sign."""
    if divergence == "forward_kl":
        return kl_terms(logp_t, logp_s)
    if divergence == "reverse_kl":
        return kl_terms(logp_s, logp_t)
    mixture = (1 - beta) * logp_s.exp() + beta * logp_t.exp()
    mixture = mixture.where(mixture > 0, 1.0).log()  # where it is 0, so are both probabilities
    return (1 - beta) * kl_terms(logp_s, mixture) + beta * kl_terms(logp_t, mixture)


def restrict(
    logp_s: Tensor, logp_t: Tensor, top_k: int, source: str, tail: bool
) -> tuple[Tensor, Tensor]:
    """Both distributions over the kept tokens of each row: the others impossible, or gathered in
    one more outcome.

    Returns:
        Two [N, V + 1] tensors of log-probabilities; the last column is the tail.
    """
    keep = torch.zeros_like(logp_s, dtype=torch.bool)
    if source in ("student", "union"):
        keep.scatter_(1, logp_s.topk(top_k).indices, True)
    if source in ("teacher", "union"):
        keep.scatter_(1, logp_t.topk(top_k).indices, True)
    return _restrict(logp_s, keep, tail), _restrict(logp_t, keep, tail)


def _restrict(logp: Tensor, keep: Tensor, tail: bool) -> Tensor:
    """Sums by logsumexp, without the nan gradient that an empty tail would have."""
    kept = logp.where(keep, -torch.inf)
    if not tail:
        kept = kept - kept.logsumexp(-1, keepdim=True)
        return torch.cat([kept, torch.full_like(kept[:, :1], -torch.inf)], 1)
    empty = keep.all(-1, keepdim=True)
    rest = logp.where(~keep | empty, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest.where(~empty, -torch.inf)], 1)


def server_distribution(
    logp_s: Tensor, ids: Tensor, logprobs: Tensor, tail: bool
) -> tuple[Tensor, Tensor]:
    """Both distributions over the k tokens that a server returned, and their tail: [N, k + 1]."""
    kept_s = logp_s.gather(1, ids)
    if not tail:
        return torch.log_softmax(kept_s, -1), torch.log_softmax(logprobs, -1)
    keep = torch.zeros_like(logp_s, dtype=torch.bool).scatter(1, ids, True)
    tail_s = _restrict(logp_s, keep, tail=True)[:, -1:]
    tail_t = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=1e-7).log()
    return torch.cat([kept_s, tail_s], 1), torch.cat([logprobs, tail_t], 1)


def token_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    *,
    divergence: str = "jsd",
    beta: float = 0.5,
    target_ids: Tensor | None = None,
    pointwise_clip: float | None = None,
    support: str = "full",
    top_k: int | None = None,
    top_k_source: str = "student",
    top_k_tail: bool = True,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Divergence [N] of scaled logits [N, V]; arguments as for `fused_linear_divergence`."""
    logp_s = torch.log_softmax(student_logits, -1)
    if teacher_topk is not None:
        logp_s, logp_t = server_distribution(logp_s, *teacher_topk, top_k_tail)
    else:
        assert teacher_logits is not None
        logp_t = torch.log_softmax(teacher_logits, -1)
        if support == "sampled":
            assert target_ids is not None
            y = target_ids[:, None]
            advantage = (logp_s.gather(1, y) - logp_t.gather(1, y)).detach()
            return (advantage * logp_s.gather(1, y))[:, 0]
        if support == "topk":
            assert top_k is not None
            logp_s, logp_t = restrict(logp_s, logp_t, top_k, top_k_source, top_k_tail)
    terms = divergence_terms(logp_s, logp_t, divergence, beta)
    return (terms if pointwise_clip is None else terms.clamp(max=pointwise_clip)).sum(-1)


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    turn_ids: Tensor | None = None,
    turn_weights: Tensor | None = None,
    trajectory_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    is_clip: float | None = None,
    pointwise_clip: float | None = None,
    support: str = "full",
    top_k: int | None = None,
    top_k_source: str = "student",
    top_k_tail: bool = True,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
    loss_aggregation: str = "token",
    num_items: float | None = None,
    vocab_size: int | None = None,
) -> DivergenceOutput:
    """The function of that name, for hidden states [N, H] that are finite everywhere."""
    scaling = {
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "vocab_size": vocab_size,
    }
    logits_s = scaled_logits(student_hidden, student_weight, student_bias, **scaling)  # type: ignore[arg-type]
    logp_s = torch.log_softmax(logits_s, -1)
    logits_t = logp_t = None
    if teacher_hidden is not None:
        if teacher_weight is None:
            teacher_weight, teacher_bias = student_weight, student_bias
        bias = None if teacher_bias is None else teacher_bias.detach()
        logits_t = scaled_logits(teacher_hidden.detach(), teacher_weight.detach(), bias, **scaling)  # type: ignore[arg-type]
        logp_t = torch.log_softmax(logits_t, -1)
    values = token_divergence(
        logits_s,
        logits_t,
        divergence=divergence,
        beta=beta,
        target_ids=target_ids,
        pointwise_clip=pointwise_clip,
        support=support,
        top_k=top_k,
        top_k_source=top_k_source,
        top_k_tail=top_k_tail,
        teacher_topk=teacher_topk,
    )

    def of_target(logp: Tensor | None) -> Tensor | None:
        if target_ids is None or logp is None:
            return None
        return logp.gather(1, target_ids.clamp(min=0)[:, None])[:, 0].detach()

    ratio = torch.ones_like(values)
    if old_logprobs is not None:
        sampled = of_target(logp_s)
        assert sampled is not None
        ratio = (sampled - old_logprobs).exp()
        ratio = ratio if is_clip is None else ratio.clamp(max=is_clip)

    tokens = torch.ones_like(values) if token_weights is None else token_weights.to(values.dtype)
    tokens = tokens if turn_ids is None else tokens * (turn_ids >= 0)
    loss = aggregate(
        ratio * values,
        tokens,
        turn_ids,
        turn_weights,
        trajectory_ids,
        reduction,
        loss_aggregation,
        num_items,
    )
    per_turn = None
    if turn_ids is not None:
        num_turns = len(turn_weights) if turn_weights is not None else int(turn_ids.max()) + 1
        counting = (
            tokens if turn_weights is None else tokens * (turn_weights != 0)[turn_ids.clamp(min=0)]
        )
        members = [turn_ids == turn for turn in range(num_turns)]
        per_turn = torch.stack([weighted_mean(values[m].detach(), counting[m]) for m in members])
    return DivergenceOutput(
        loss=loss,
        per_token=loss if reduction == "none" else values.detach(),
        per_turn=per_turn,
        student_logprobs=of_target(logp_s),
        teacher_logprobs=of_target(logp_t),
        student_entropy=entropy(logp_s).detach(),
        teacher_entropy=None if logp_t is None else entropy(logp_t),
        top1_agreement=None
        if logp_t is None
        else (logp_s.argmax(-1) == logp_t.argmax(-1)).to(values.dtype),
    )


def entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(-1)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """sum w·v / sum w, and 0 where there is no weight."""
    total = weights.sum()
    return (weights * values).sum() / total if total != 0 else (0.0 * values).sum()


def aggregate(
    values: Tensor,
    tokens: Tensor,
    turn_ids: Tensor | None,
    turn_weights: Tensor | None,
    trajectory_ids: Tensor | None,
    reduction: str,
    loss_aggregation: str,
    num_items: float | None,
) -> Tensor:
    """The loss from the values [N] and weights [N] of the tokens, loop by loop."""
    of_turn = torch.ones_like(values)
    if turn_ids is not None and turn_weights is not None:
        of_turn = turn_weights.to(values.dtype)[turn_ids.clamp(min=0)]
    if loss_aggregation == "token":
        if reduction == "none":
            return tokens * of_turn * values
        total, count = (tokens * of_turn * values).sum(), (tokens * of_turn).sum()
        return total if reduction == "sum" else _quotient(total, count, num_items)
    if reduction == "none":
        raise NotImplementedError(
            "The reference has no per-token form of turn and trajectory means."
        )

    def turn_level(members: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of weight · mean, and of the weights, over the turns in `members` [N]."""
        if turn_ids is None:
            return weighted_mean(values[members], tokens[members]), values.new_ones(())
        total, count = values.new_zeros(()), values.new_zeros(())
        for turn in turn_ids[members & (tokens != 0)].unique():
            tokens_of_turn = members & (turn_ids == turn)
            weight = of_turn[tokens_of_turn][0]
            total = total + weight * weighted_mean(values[tokens_of_turn], tokens[tokens_of_turn])
            count = count + weight
        return total, count

    if loss_aggregation == "turn":
        total, count = turn_level(torch.ones_like(tokens, dtype=torch.bool))
        return total if reduction == "sum" else _quotient(total, count, num_items)

    assert trajectory_ids is not None
    total, count = 0.0 * values.sum(), values.new_zeros(())
    for trajectory in trajectory_ids[(tokens * of_turn != 0) & (trajectory_ids >= 0)].unique():
        turn_total, turn_count = turn_level(trajectory_ids == trajectory)
        total, count = total + turn_total / turn_count, count + 1
    return total if reduction == "sum" else _quotient(total, count, num_items)


def _quotient(total: Tensor, count: Tensor, num_items: float | None) -> Tensor:
    divisor = count if num_items is None else num_items
    return total / divisor if divisor != 0 else 0.0 * total
