"""Log-probabilities of given tokens straight from hidden states and head, with gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hero_kernels import backends, checks
from hero_kernels.chunked import (
    Gradients,
    Head,
    LogitChunk,
    Plan,
    active_rows,
    gradient_dtype,
    power_of_two_scale,
    run_chunks,
    spread,
)
from hero_kernels.options import KernelOptions
from hero_kernels.rows import STUDENT_ENTROPY, STUDENT_LOGPROB, LogProbs, map_rows


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_mask: Tensor | None = None,
    vocab_size: int | None = None,
    return_entropy: bool = False,
    impl: str = "auto",
    options: KernelOptions | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(cap((h·Wᵀ + bias) · logit_scale) / temperature)[target] without whole logits in
    memory.

    Any upstream gradient is right, of the log-probabilities and of the entropy; the backward pass
    computes the logits again.

    Args:
        hidden: [..., H]; fp64, fp32, bf16 or fp16.
        weight: [V, H] of the same type.
        target_ids: [...] tokens.
        bias: [V].
        temperature: divides the logits.
        softcap: s of s·tanh(z / s), or None.
        logit_scale: multiplies the logits before the soft cap.
        token_mask: [...] bool or weights; tokens where it is 0 are dropped before any product, get
            0 and no gradient, and may hold anything. Not multiplied into the result.
        vocab_size: real tokens of a padded vocabulary.
        return_entropy: return the entropy of each distribution too, with gradient.
        impl: "auto" or "torch".
        options: how it is computed.

    Returns:
        Log-probabilities [...] in fp32 (fp64 for fp64), or these and the entropies [...], in nats.

    Raises:
        ValueError: arguments that do not match or cannot be served.
    """
    options = options or KernelOptions()
    if impl not in ("auto", "torch"):
        raise ValueError(f"linear_logprobs has impl='auto' and 'torch'; got {impl!r}.")
    checks.whole_heads_only("linear_logprobs", options)
    hidden, weight = checks.autocast(hidden, weight)
    checks.head("student", hidden, weight, bias)
    checks.per_token("target_ids", target_ids, hidden, integer=True)
    checks.per_token("token_mask", token_mask, hidden)
    checks.positive("temperature", temperature)
    checks.positive("softcap", softcap, optional=True)
    vocab = checks.vocabulary(weight.shape[0], None, vocab_size)
    rows = hidden.reshape(-1, hidden.shape[-1])
    targets = target_ids.reshape(-1).long()
    mask = torch.ones_like(targets, dtype=torch.bool)
    if token_mask is not None:
        mask = token_mask.detach().reshape(-1) != 0
    if checks.values_readable(hidden, options.validate):
        checks.targets("target_ids", targets, vocab, mask)
    logprobs, entropy = _linear_logprobs(
        rows,
        weight,
        bias,
        targets,
        mask,
        float(temperature),
        float(softcap or 0.0),
        float(logit_scale),
        vocab,
        return_entropy,
        backends.chunk_rows(options, hidden.device, vocab),
        str(options.storage),
        options.max_active_rows or 0,
    )
    shape = hidden.shape[:-1]
    return (
        (logprobs.reshape(shape), entropy.reshape(shape))
        if return_entropy
        else logprobs.reshape(shape)
    )


@torch.library.custom_op("hero_kernels::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    mask: Tensor,
    temperature: float,
    softcap: float,
    logit_scale: float,
    vocab_size: int,
    with_entropy: bool,
    chunk_size: int,
    storage: str,
    max_active_rows: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] and entropies [N] (0 without `with_entropy`)."""
    plan = Plan("torch", chunk_size, storage, max_active_rows, False, False, False, with_entropy)
    stats, _ = _run(
        hidden,
        weight,
        bias,
        target_ids,
        mask,
        None,
        temperature,
        softcap,
        logit_scale,
        vocab_size,
        plan,
    )
    return stats[:, STUDENT_LOGPROB].clone(), stats[:, STUDENT_ENTROPY].clone()


@torch.library.custom_op("hero_kernels::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    mask: Tensor,
    upstream: Tensor,
    temperature: float,
    softcap: float,
    logit_scale: float,
    vocab_size: int,
    chunk_size: int,
    storage: str,
    max_active_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty where not needed); `upstream` [N, 2]."""
    plan = Plan(
        "torch",
        chunk_size,
        storage,
        max_active_rows,
        need_hidden,
        need_weight,
        need_bias,
        False,
    )
    _, grads = _run(
        hidden,
        weight,
        bias,
        target_ids,
        mask,
        upstream,
        temperature,
        softcap,
        logit_scale,
        vocab_size,
        plan,
    )
    empty = [hidden.new_empty(0) if grad is None else grad for grad in grads]
    return empty[0], empty[1], empty[2]


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    mask: Tensor,
    upstream: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    vocab_size: int,
    plan: Plan,
) -> tuple[Tensor, Gradients]:
    num_rows = hidden.shape[0]
    kept, overflow = active_rows(mask, plan.max_active_rows)
    if kept is not None:
        hidden, target_ids, mask = hidden[kept], target_ids[kept], mask[kept]
        upstream = None if upstream is None else upstream[kept]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    targets = target_ids.where(mask, -1)
    scale = hidden.new_ones((), dtype=wide)
    if upstream is not None:
        scale = power_of_two_scale(upstream, hidden.dtype)
        upstream = upstream * scale

    def row_kernel(chunk: LogitChunk) -> Tensor:
        chunk_targets, part_of_chunk = targets[chunk.rows], chunk.rows

        def objective(probs: LogProbs, block: slice) -> tuple[Tensor, Tensor]:
            if upstream is None:
                return probs.student.new_zeros(()), probs.student
            scale = upstream[part_of_chunk][block]
            return _gradient(probs.student, chunk_targets[block, None], scale)

        return map_rows(
            objective,
            chunk.student,
            None,
            chunk.grad,
            delta=False,
            inv_temperature=1.0 / temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            student_bias=chunk.student_bias,
            teacher_bias=None,
            target_ids=chunk_targets,
            row_weights=mask[chunk.rows].to(wide),
            old_logprobs=None,
            is_clip=0.0,
            vocab_size=vocab_size,
            with_stats=plan.with_stats,
        )

    with torch.autocast(hidden.device.type, enabled=False):
        stats, grads = run_chunks(
            Head(hidden, weight, bias), None, mask, vocab_size, row_kernel, plan
        )
    stats = stats.masked_fill(~mask[:, None], 0.0)
    if overflow is not None:
        stats = stats.masked_fill(overflow, torch.nan)
    if hidden.dtype == torch.float16:
        grads = grads.unscaled(scale)
    if grads.hidden is not None:
        grads = grads._replace(hidden=spread(grads.hidden, kept, num_rows))
    return spread(stats, kept, num_rows), grads


def _gradient(logp: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Of a·log p(target) + b·entropy with respect to the logits, (a, b) = upstream [R, 2]; the
    value is unused.

    d log p(y)/dz_j = [j = y] - p_j and d entropy/dz_j = -p_j (log p_j + entropy).
    """
    p = logp.exp()
    plogp = p * logp
    entropy = -plogp.sum(-1, keepdim=True)
    of_logprob, of_entropy = upstream[:, :1].to(p.dtype), upstream[:, 1:].to(p.dtype)
    d_logits = -(of_logprob + of_entropy * entropy) * p - of_entropy * plogp
    d_logits.scatter_add_(1, target.clamp(min=0), of_logprob)
    return logp.new_zeros(()), d_logits


@_linear_logprobs.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(len(hidden), dtype=wide), hidden.new_empty(len(hidden), dtype=wide)


@_linear_logprobs_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (
        tensor.new_empty(tensor.shape, dtype=gradient_dtype(tensor.dtype))
        if needed
        else args[0].new_empty(0)
        for tensor, needed in zip(args[:3], args[-3:], strict=True)
    )
    return hidden, weight, bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    *ctx.settings, ctx.with_entropy = (*inputs[5:9], *inputs[10:], inputs[9])


def _backward(ctx: Any, d_logprobs: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    if not ctx.with_entropy:
        d_entropy = torch.zeros_like(d_logprobs)
    grads = _linear_logprobs_backward(
        *ctx.saved_tensors, torch.stack([d_logprobs, d_entropy], 1), *ctx.settings, *needed
    )
    wanted = [
        grad.to(tensor.dtype) if need else None
        for grad, tensor, need in zip(grads, ctx.saved_tensors[:3], needed, strict=True)
    ]
    return (*wanted, *(None,) * 10)


_linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
