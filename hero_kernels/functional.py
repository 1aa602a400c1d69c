"""The divergence between a student and a teacher, straight from hidden states and heads."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from hero_kernels import checks, gradients, planning, vocab_parallel
from hero_kernels.aggregation import Weighting
from hero_kernels.autograd import linear_divergence, same_memory
from hero_kernels.objective import (
    DivergenceOutput,
    KernelOptions,
    Objective,
    ObjectiveKwargs,
)
from hero_kernels.types import RowTensors

_DEFAULTS = KernelOptions()


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
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: bool = False,
    impl: str = "auto",
    options: KernelOptions | None = None,
    **objective: Unpack[ObjectiveKwargs],
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
            student's path only. The student's own weight, or a detached view of it, counts as None.
        student_bias: [V].
        teacher_bias: [V], only with `teacher_weight`.
        teacher_topk: (ids [..., k], log-probabilities [..., k] at this temperature) of a teacher
            behind a server, in place of `teacher_hidden`; needs `support="topk"`.
        token_weights: [...] weight of each token, 0 to mask it; a bool mask will do. The mean
            divides by the sum of the weights: signed ones (advantages) need `num_items` or "sum".
        turn_ids: [...] turn of each token, negative for none. Numbered through the whole batch.
        turn_weights: [K] weight of each turn; ids are then less than K.
        trajectory_ids: [...] trajectory of each token, negative for none.
        target_ids: [...] the tokens that were sampled; for `old_logprobs`, `support="sampled"` and
            statistics.
        old_logprobs: [...] their log-probabilities when sampled. Multiplies each token's loss by
            the detached ratio exp(log p_s(y) - old).
        reduction: "mean", "sum" or "none" (then the loss is [...]).
        loss_aggregation: what the mean is over: "token", "turn" (token means, then turns) or
            "trajectory" (then trajectories). A turn that micro-batches cut has a mean in each of
            them: compute `token_coefficients` over the batch instead.
        num_items: replaces the divisor of the mean by a global count (gradient accumulation, data
            parallel). With "turn" and "trajectory" no turn or trajectory may be cut, and a
            warning says so.
        vocab_size: real tokens of a padded vocabulary; the columns beyond are ignored.
        return_stats: return a `DivergenceOutput` instead of the loss alone.
        impl: "auto", or an implementation by name; see `supports` and `explain`.
        options: how it is computed.
        **objective: what is computed; see `Objective` for each.

            divergence: "jsd" (default), "forward_kl" = KL(p_t | p_s) or "reverse_kl".
            beta: weight of the teacher in the JSD's mixture, in (0, 1); default 0.5.
            temperature: divides the logits; a number, or a tensor [...] of one for each token.
            softcap: s of s·tanh(z / s), or None.
            logit_scale: multiplies the logits before the soft cap.
            is_clip: upper bound of the importance ratio, or None.
            support: "full" (default), "topk", or "sampled" (score-function form of the reverse KL:
                stop_gradient(log p_s(y) - log p_t(y))·log p_s(y)).
            top_k: tokens kept by "topk".
            top_k_source: whose largest they are, "student" (default) or "teacher".
            top_k_tail: keep the rest of the mass as one more outcome (default), or renormalise.

    Returns:
        The loss, or a `DivergenceOutput`.

    Raises:
        ValueError: arguments that do not match, exclude each other or cannot be served.
        TypeError: something that is not a tensor where one is needed, an unknown keyword.
    """
    options = checks.options(options or _DEFAULTS)
    what, temperatures = checks.objective("fused_linear_divergence", objective)
    if is_shared(student_weight, student_bias, teacher_weight, teacher_bias):
        teacher_weight = teacher_bias = None  # the caller passed the shared head explicitly
    student_hidden, student_weight = checks.autocast(student_hidden, student_weight)
    checks.head("student_", student_hidden, student_weight, student_bias)
    if teacher_topk is None:
        teacher_hidden, teacher_weight = _checked_teacher(
            teacher_hidden, teacher_weight, teacher_bias, student_hidden
        )
    else:
        _check_topk(teacher_topk, (teacher_hidden, teacher_weight, teacher_bias), student_hidden)
    ranks = 1 if options.process_group is None else vocab_parallel.group_size(options.process_group)
    heads = (student_weight,) if teacher_weight is None else (student_weight, teacher_weight)
    vocab = checks.vocabulary(heads[0].shape[0] * ranks, heads[-1].shape[0] * ranks, vocab_size)
    checks.objective_with(what, vocab, target_ids, old_logprobs, teacher_topk)
    weighting, rows = weighted_rows(
        ("student_hidden", student_hidden),
        Weighting(
            token_weights, turn_ids, turn_weights, trajectory_ids, loss_aggregation, reduction,
            num_items,
        ),
        RowTensors(student_hidden, target_ids, old_logprobs, temperatures, *(teacher_topk or ())),
        vocab,
        options.validate,
    )  # fmt: skip
    if ranks > 1 or options.tile_columns:
        checks.split(options, what, heads)
    if ranks > 1:
        vocab_parallel.check_shards(options, student_hidden, heads, vocab)
    hidden = _rows_of(student_hidden)
    facts = _facts((hidden, student_weight, student_bias), heads, vocab, options, what)
    facts = facts._replace(
        impl=impl, shared=teacher_hidden is not None and len(heads) == 1,
        with_stats=return_stats, per_row=reduction == "none", sharded=ranks > 1,
        group="" if ranks == 1 else vocab_parallel.group_name(options.process_group),
    )  # fmt: skip
    plan = planning.traced_plan if torch.compiler.is_compiling() else planning.plan
    text, numbers, in_backward = plan(what, facts)
    if in_backward:
        gradients.savable("student_", student_hidden, student_weight, student_bias)
        gradients.savable("teacher_", teacher_hidden, teacher_weight, teacher_bias)
    loss, stats, *_ = linear_divergence(
        hidden, student_weight, student_bias,
        None if teacher_hidden is None else _rows_of(teacher_hidden.detach()),
        None if teacher_weight is None else teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        *rows, None, numbers, text,
    )  # fmt: skip
    shape = student_hidden.shape[:-1]
    loss = loss.reshape(shape) if reduction == "none" else loss
    if not return_stats:
        return loss
    return weighting.output(
        loss, stats, rows.weights, shape, target_ids is not None, teacher_topk is None
    )


def _facts(
    student: tuple[Tensor, Tensor, Tensor | None],
    heads: tuple[Tensor, ...],
    vocab: int,
    options: KernelOptions,
    what: Objective,
) -> planning.Facts:
    """What decides how a call is carried out, as far as tensors and options say it."""
    hidden, weight, bias = student
    with_grad = torch.is_grad_enabled()
    rows = min(len(hidden), options.max_active_rows or len(hidden)) if options.memory_budget else 0
    return planning.Facts(
        str(hidden.device),
        hidden.dtype,
        str(what.divergence),
        str(what.support),
        rows,
        max(heads[0].shape[1], heads[-1].shape[1]),
        weight.shape[0],
        vocab,
        with_grad and hidden.requires_grad,
        with_grad and weight.requires_grad,
        with_grad and bias is not None and bias.requires_grad,
        options.tile_rows or 0,
        options.tile_columns or 0,
        options.memory_budget or 0,
        options.max_active_rows or 0,
    )


def _rows_of(hidden: Tensor) -> Tensor:
    """[N, H] from [..., H]."""
    return hidden.reshape(-1, hidden.shape[-1])


def is_shared(
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
) -> bool:
    """Whether the teacher's head is the student's own, or a detached view of it."""
    if teacher_weight is None or (teacher_bias is None) != (student_bias is None):
        return False
    pairs = ((student_weight, teacher_weight), (student_bias, teacher_bias))
    return all(same_memory(ours, theirs) for ours, theirs in pairs)


def weighted_rows(
    reference: tuple[str, Tensor],
    weighting: Weighting,
    given: RowTensors,
    vocab_size: int,
    validate: bool,
) -> tuple[Weighting, RowTensors]:
    """Check and flatten what is told of each row, in N rows; masked rows may hold anything: here it
    becomes something that no row kernel trips over.

    Args:
        reference: name and value [..., H] of what gives the leading shape.
        weighting: as the caller passed it.
        given: as the caller passed it; its weights are not read.
        vocab_size: real tokens.
        validate: whether values are checked on any device.
    """
    name, tensor = reference
    weighting.check(name, tensor, validate)
    weighting.check_cuts(validate)
    _, target_ids, old_logprobs, temperatures, ids, logprobs = given
    if target_ids is not None:
        checks.per_token("target_ids", target_ids, name, tensor, integer=True)
    if old_logprobs is not None:
        checks.per_token("old_logprobs", old_logprobs, name, tensor)
    if temperatures is not None and temperatures.dim():
        checks.per_token("temperature", temperatures, name, tensor)
    weighting = weighting.flat()
    num_rows = tensor.shape[:-1].numel()
    weights = weighting.coefficients(num_rows, tensor)
    if target_ids is None and temperatures is None and ids is None:  # nor what belongs to them
        return weighting, RowTensors(weights)
    active = weights != 0
    readable = checks.values_readable(tensor, validate)
    if target_ids is not None:
        target_ids = target_ids.reshape(-1).long()
        if readable:
            checks.targets("target_ids", target_ids, vocab_size, active)
        target_ids = target_ids.clamp(min=-1).where(active, -1)
    if old_logprobs is not None:
        old_logprobs = old_logprobs.detach().reshape(-1).to(weights.dtype).where(active, 0.0)
    if temperatures is not None:
        temperatures = temperatures.detach().reshape(-1).to(weights).expand(num_rows)
        temperatures = temperatures.where(active, 1.0)
    if ids is not None and logprobs is not None:
        shape = (num_rows, ids.shape[-1])
        ids = ids.reshape(shape).long().where(active[:, None], 0)
        logprobs = logprobs.detach().reshape(shape).where(active[:, None], -100.0)
    rows = RowTensors(weights, target_ids, old_logprobs, temperatures, ids, logprobs)
    if readable:
        checks.rows(rows, vocab_size, active)
    return weighting, rows


def _checked_teacher(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, student_hidden: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Hidden states and weight of a teacher whose logits are known; no weight for a shared head."""
    if hidden is None:
        raise ValueError("Pass either teacher_hidden or teacher_topk; got neither.")
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
                "With a shared head (teacher_weight=None) teacher_hidden must match "
                f"student_hidden; got {list(hidden.shape)} {hidden.dtype}, expected "
                f"{list(student_hidden.shape)} {student_hidden.dtype}. A teacher with its own head "
                "needs teacher_weight."
            )
        checks.same_device("teacher_hidden", hidden, "student_hidden", student_hidden)
        return hidden, None
    hidden, weight = checks.autocast(hidden, weight)
    checks.head("teacher_", hidden, weight, bias)
    checks.no_grad_wanted("teacher_weight", weight, "the teacher")
    checks.no_grad_wanted("teacher_bias", bias, "the teacher")
    checks.same_device("teacher_hidden", hidden, "student_hidden", student_hidden)
    checks.same_precision(student_hidden, hidden)
    if hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden is {list(hidden.shape)} and student_hidden "
            f"{list(student_hidden.shape)}: expected the same leading shape, token by token."
        )
    return hidden, weight


def _check_topk(
    topk: tuple[Tensor, Tensor],
    own_teacher: tuple[Tensor | None, Tensor | None, Tensor | None],
    student_hidden: Tensor,
) -> None:
    """A teacher behind a server: ids and log-probabilities, and nothing else of it."""
    if own_teacher[0] is not None:
        raise ValueError("Pass either teacher_hidden or teacher_topk; got both.")
    if any(tensor is not None for tensor in own_teacher):
        raise ValueError(
            "teacher_weight and teacher_bias have no use beside teacher_topk: leave them out."
        )
    if not isinstance(topk, (tuple, list)) or len(topk) != 2:
        raise TypeError(
            f"teacher_topk must be a pair (ids [..., k], log-probabilities [..., k]), got "
            f"{type(topk).__name__}."
        )
    ids, logprobs = topk
    for name, tensor in (("teacher_topk[0]", ids), ("teacher_topk[1]", logprobs)):
        checks.is_tensor(name, tensor, "[..., k]")
        checks.same_device(name, tensor, "student_hidden", student_hidden)
    checks.no_grad_wanted("teacher_topk[1]", logprobs, "the teacher")
    if ids.dtype not in checks.INTEGERS or logprobs.dtype not in checks.DTYPES:
        raise ValueError(
            f"teacher_topk is of {ids.dtype} and {logprobs.dtype}; expected integer ids first and "
            "log-probabilities second (torch.topk returns them the other way round)."
        )
    leading = student_hidden.shape[:-1]
    if ids.shape != logprobs.shape or ids.shape[:-1] != leading or ids.shape[-1] < 1:
        raise ValueError(
            f"teacher_topk is ids {list(ids.shape)} and logprobs {list(logprobs.shape)}; expected "
            f"both {[*leading, 'k']}, with the leading shape of student_hidden and k >= 1."
        )
