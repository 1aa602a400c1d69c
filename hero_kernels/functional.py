"""The divergence between a student and a teacher, straight from hidden states and heads."""

from __future__ import annotations

import torch
from torch import Tensor

from hero_kernels import checks, planner, vocab_parallel
from hero_kernels.autograd import linear_divergence
from hero_kernels.divergence_loop import RowTensors
from hero_kernels.layout import Plan
from hero_kernels.options import Design, DivergenceOutput, KernelOptions, Reduction
from hero_kernels.aggregation import Weighting


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
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: bool = False,
    impl: str = "auto",
    options: KernelOptions | None = None,
) -> Tensor | DivergenceOutput:
    """Token-level divergence between student and teacher without whole logits in memory.

    loss = sum_i w_i · u_turn(i) · ratio_i · D(p_s, p_t)_i / normaliser, with gradients for the
    student's hidden states, weight and bias; the teacher has none. p = softmax(cap((h·Wᵀ + bias) ·
    logit_scale) / temperature). The definition is written out in `hero_kernels.reference`.

    Tokens of weight 0 are dropped before any product and may hold anything, NaN included. Without a
    token of non-zero weight the loss is 0 and so are the gradients.

    Args:
        student_hidden: [..., H] final hidden states; fp64, fp32, bf16 or fp16.
        student_weight: [V, H] the head, or with `options.process_group` this rank's shard of it.
        teacher_hidden: [..., H_t]; None only with `teacher_topk`.
        teacher_weight: [V, H_t]; None if teacher and student share the head (and its bias), as in
            self-distillation. Then the loss is computed from (h_s - h_t)·Wᵀ and keeps its relative
            precision however close the two are. A trainable shared head gets the gradient of the
            student's path only.
        divergence: "jsd", "forward_kl" = KL(p_t | p_s) or "reverse_kl" = KL(p_s | p_t).
        beta: weight of the teacher in the JSD's mixture, in (0, 1).
        temperature: divides the logits; the loss is not multiplied by its square.
        softcap: s of s·tanh(z / s), or None.
        logit_scale: multiplies the logits before the soft cap.
        student_bias: [V].
        teacher_bias: [V], only with `teacher_weight`.
        token_weights: [...] weight of each token, 0 to mask it; a bool mask will do.
        turn_ids: [...] 0-based turn of each token, negative for none.
        turn_weights: [K] weight of each turn.
        trajectory_ids: [...] 0-based trajectory of each token, negative for none.
        target_ids: [...] the tokens that were sampled; for `old_logprobs`, `support="sampled"` and
            statistics.
        old_logprobs: [...] their log-probabilities when sampled. Multiplies each token's loss by
            the detached ratio exp(log p_s(y) - old).
        is_clip: upper bound of that ratio.
        pointwise_clip: upper bound of each vocabulary entry's contribution to a token's divergence;
            an entry above it has no gradient.
        support: "full" vocabulary, "topk", or "sampled" (score-function form of the reverse KL:
            stop_gradient(log p_s(y) - log p_t(y))·log p_s(y)).
        top_k: tokens kept by "topk".
        top_k_source: whose largest they are: "student", "teacher" or the "union" of both.
        top_k_tail: keep the rest of the mass as one more outcome; False renormalises over the kept
            tokens.
        teacher_topk: (ids [..., k], log-probabilities [..., k] at this temperature) of a teacher
            behind a server, in place of `teacher_hidden`; needs `support="topk"`.
        reduction: "mean", "sum" or "none" (then the loss is [...]).
        loss_aggregation: what the mean is over: "token", "turn" (token means, then turns) or
            "trajectory" (then trajectories). A mean is weighted: its divisor is the sum of the
            weights, whatever it is.
        num_items: replaces the divisor of the mean by a global count (gradient accumulation, data
            parallel).
        vocab_size: real tokens of a padded vocabulary; the columns beyond are ignored.
        return_stats: return a `DivergenceOutput` instead of the loss alone.
        impl: "auto", or an implementation by name; see `supports` and `explain`.
        options: how it is computed.

    Returns:
        The loss, or a `DivergenceOutput`.

    Raises:
        ValueError: arguments that do not match, exclude each other or cannot be served.
        TypeError: something that is no tensor where one is needed.
    """
    options = options or KernelOptions()
    if teacher_weight is student_weight and teacher_bias is student_bias:
        teacher_weight = teacher_bias = None  # the shared head, said in full
    student_hidden, student_weight = checks.autocast(student_hidden, student_weight)
    checks.head("student", student_hidden, student_weight, student_bias)
    teacher_hidden, teacher_weight = _teacher(
        teacher_hidden, teacher_weight, teacher_bias, teacher_topk, student_hidden
    )
    num_shards = vocab_parallel.group_size(options.process_group)
    vocab = checks.vocabulary(
        student_weight.shape[0] * num_shards,
        None if teacher_weight is None else teacher_weight.shape[0] * num_shards,
        vocab_size,
    )
    objective = checks.objective(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        is_clip=is_clip,
        pointwise_clip=pointwise_clip,
        vocab_size=vocab,
        support=support,
        top_k=top_k,
        top_k_source=top_k_source,
        top_k_tail=top_k_tail,
        has_teacher_topk=teacher_topk is not None,
        has_old_logprobs=old_logprobs is not None,
        has_targets=target_ids is not None,
    )
    checks.pieces(options, objective, student_weight, teacher_weight)
    weighting = Weighting.checked(
        student_hidden,
        token_weights,
        turn_ids,
        turn_weights,
        trajectory_ids,
        loss_aggregation,
        reduction,
        num_items,
        options.validate,
    )
    checks.per_token("target_ids", target_ids, student_hidden, integer=True)
    checks.per_token("old_logprobs", old_logprobs, student_hidden)
    hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    row_tensors = RowTensors.flat(
        weighting.coefficients(len(hidden), hidden), target_ids, old_logprobs, teacher_topk
    )
    if checks.values_readable(hidden, options.validate):
        row_tensors.check(vocab)

    if num_shards > 1:
        vocab_parallel.check_shards(
            options.process_group,
            student_hidden,
            student_weight,
            teacher_weight,
            vocab,
            always=checks.values_readable(hidden, options.validate),
        )
    per_row = weighting.reduction == Reduction.NONE
    wants_grad = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (student_hidden, student_weight, student_bias)
    ]
    plan = Plan(
        impl=impl,
        chunk_size=planner.constant(options.chunk_size or 0),
        storage=str(options.storage),
        max_active_rows=planner.constant(options.max_active_rows or 0),
        need_hidden=wants_grad[0],
        need_weight=wants_grad[1],
        need_bias=wants_grad[2],
        with_stats=return_stats,
        design=str(options.design),
        memory_budget=planner.constant(options.memory_budget or 0),
        group=vocab_parallel.group_name(options.process_group),
        accumulate_weight_grad=options.accumulate_weight_grad,
    )
    teacher_size = 0 if teacher_weight is None else teacher_weight.shape[1]
    design, chunk_size = planner.decide(
        planner.constant(planner.row_bound(hidden, options)),
        planner.constant(max(hidden.shape[1], teacher_size)),
        planner.constant(len(student_weight)),
        str(hidden.device),
        hidden.dtype,
        teacher_weight is None,
        str(divergence),
        objective.support,
        pointwise_clip is not None,
        *plan,
    )
    plan = plan._replace(design=design, chunk_size=chunk_size)
    if per_row or design == Design.SLICED:  # gradients are formed in the backward pass
        if any(wants_grad):
            checks.can_be_saved("teacher_hidden", teacher_hidden)
            checks.can_be_saved("teacher_weight", teacher_weight)
            checks.can_be_saved("teacher_bias", teacher_bias)
        plan = plan._replace(need_hidden=False, need_weight=False, need_bias=False)
    loss, stats, *_ = linear_divergence(
        hidden,
        student_weight,
        student_bias,
        _constant_rows(teacher_hidden),
        None if teacher_weight is None else teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        *row_tensors,
        *objective,
        *plan,
        per_row,
        None,
    )
    if per_row:
        loss = loss.reshape(student_hidden.shape[:-1])
    if not return_stats:
        return loss
    return weighting.output(
        loss,
        stats,
        row_tensors.weights,
        student_hidden.shape[:-1],
        has_targets=target_ids is not None,
        teacher_known=teacher_topk is None,
    )


def _teacher(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    topk: tuple[Tensor, Tensor] | None,
    student_hidden: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Check the teacher, in whichever of its three forms; returns hidden states and weight."""
    if (hidden is None) == (topk is None):
        raise ValueError(
            "Pass either teacher_hidden or teacher_topk; got "
            f"{'neither' if hidden is None else 'both'}."
        )
    if hidden is None or topk is not None:
        assert topk is not None
        if weight is not None or bias is not None:
            raise ValueError(
                "teacher_weight and teacher_bias have no use beside teacher_topk: leave them out."
            )
        ids, logprobs = topk
        for name, tensor in (("teacher_topk[0]", ids), ("teacher_topk[1]", logprobs)):
            checks.is_tensor(name, tensor, "[..., k]")
            checks.same_device(name, tensor, student_hidden)
        leading = student_hidden.shape[:-1]
        if ids.shape != logprobs.shape or ids.shape[:-1] != leading or ids.shape[-1] < 1:
            raise ValueError(
                f"teacher_topk is ids {list(ids.shape)} and logprobs {list(logprobs.shape)}; "
                "expected both "
                f"{[*leading, 'k']}, with the leading shape of student_hidden and k >= 1."
            )
        return None, None
    checks.is_tensor("teacher_hidden", hidden, "[..., H]")
    checks.no_grad_wanted("teacher_hidden", hidden, "the teacher")
    if weight is None:
        if bias is not None:
            raise ValueError(
                "teacher_bias needs teacher_weight: a shared head shares student_bias too."
            )
        hidden, _ = checks.autocast(hidden, hidden)
        if hidden.shape != student_hidden.shape or hidden.dtype != student_hidden.dtype:
            raise ValueError(
                f"With a shared head (teacher_weight=None) teacher_hidden must match "
                "student_hidden; got "
                f"{list(hidden.shape)} {hidden.dtype}, expected {list(student_hidden.shape)} "
                f"{student_hidden.dtype}. A teacher with its own head needs teacher_weight."
            )
        checks.same_device("teacher_hidden", hidden, student_hidden)
        return hidden, None
    checks.no_grad_wanted("teacher_weight", weight, "the teacher")
    checks.no_grad_wanted("teacher_bias", bias, "the teacher")
    hidden, weight = checks.autocast(hidden, weight)
    checks.head("teacher", hidden, weight, bias)
    checks.same_device("teacher_hidden", hidden, student_hidden)
    if hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden is {list(hidden.shape)} and student_hidden "
            f"{list(student_hidden.shape)}: expected "
            "the same leading shape, token by token."
        )
    return hidden, weight


def _constant_rows(hidden: Tensor | None) -> Tensor | None:
    return None if hidden is None else hidden.detach().reshape(-1, hidden.shape[-1])
