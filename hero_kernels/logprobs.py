"""Log-probabilities of given tokens straight from hidden states and head, with gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hero_kernels import backends, checks, fused
from hero_kernels.chunked import Head
from hero_kernels.layout import Plan, gradient_dtype
from hero_kernels.logprob_loop import Tokens, Transform, backward, forward
from hero_kernels.logprob_rows import ENTROPY, LOGPROB, LOGPROB_STATS
from hero_kernels.options import Design, KernelOptions, Support


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

    Any upstream gradient is right, of the log-probabilities and of the entropy. The forward pass is
    one head GEMM and keeps four numbers for each token; the backward pass computes the logits again
    and is three GEMMs, two where the head or the trunk is frozen. On CPU, tokens whose upstream
    gradient is 0 (clipped by PPO, without advantage) are dropped before those GEMMs.

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
        impl: "auto", or "torch" (any device, and fp64), "cpu" (C++), "triton" (CUDA), which then
            has to serve: see `supports(impl, function="linear_logprobs")`.
        options: how it is computed. With `design="fused"` (CUDA, 16 bits) the forward pass writes
            no logits at all: a GEMM kernel sums up its rows itself (fused.py).

    Returns:
        Log-probabilities [...] in fp32 (fp64 for fp64), or these and the entropies [...], in nats.

    Raises:
        ValueError: arguments that do not match or cannot be served.
    """
    options = options or KernelOptions()
    checks.whole_heads_only("linear_logprobs", options)
    hidden, weight = checks.autocast(hidden, weight)
    checks.head("student", hidden, weight, bias)
    checks.per_token("target_ids", target_ids, hidden, integer=True)
    checks.per_token("token_mask", token_mask, hidden)
    checks.positive("temperature", temperature)
    checks.positive("logit_scale", logit_scale)
    checks.positive("softcap", softcap, optional=True)
    vocab = checks.vocabulary(weight.shape[0], None, vocab_size)
    rows = hidden.reshape(-1, hidden.shape[-1])
    targets = target_ids.reshape(-1).long()
    mask = torch.ones_like(targets, dtype=torch.bool)
    if token_mask is not None:
        mask = token_mask.detach().reshape(-1) != 0
    if options.design == Design.FUSED:
        request = backends.Request(
            hidden.device, hidden.dtype, Support.FULL, False, backends.Function.LOGPROBS
        )
        if reason := fused.refusal(impl, request, vocab):
            raise ValueError(
                f"design='fused' cannot serve this call: {reason}. Leave design 'auto'."
            )
    if checks.values_readable(hidden, options.validate):
        checks.targets("target_ids", targets, vocab, mask)
    logprobs, entropy, _ = _linear_logprobs(
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
        impl,
        options.chunk_size or backends.chunk_rows(hidden.device, vocab),
        str(options.storage),
        options.max_active_rows or 0,
        options.design == Design.FUSED,
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
    impl: str,
    chunk_size: int,
    storage: str,
    max_active_rows: int,
    fused_forward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [N], entropies [N] (0 without `with_entropy`), and [N, 4] for backward."""
    plan = Plan(impl, chunk_size, storage, max_active_rows, False, False, False, with_entropy)
    stats = forward(
        Head(hidden, weight, bias),
        Tokens(target_ids, mask),
        Transform(temperature, softcap, logit_scale, vocab_size),
        plan._replace(design=Design.FUSED) if fused_forward else plan,
    )
    return stats[:, LOGPROB].clone(), stats[:, ENTROPY].clone(), stats


@torch.library.custom_op("hero_kernels::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    mask: Tensor,
    stats: Tensor,
    upstream: Tensor,
    temperature: float,
    softcap: float,
    logit_scale: float,
    vocab_size: int,
    impl: str,
    chunk_size: int,
    storage: str,
    max_active_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty where not needed); `upstream` [N, 2]."""
    needed = (need_hidden, need_weight, need_bias)
    grads = backward(
        Head(hidden, weight, bias),
        Tokens(target_ids, mask),
        stats,
        upstream,
        Transform(temperature, softcap, logit_scale, vocab_size),
        Plan(impl, chunk_size, storage, max_active_rows, *needed, False),
    )
    empty = [hidden.new_empty(0) if grad is None else grad for grad in grads]
    return empty[0], empty[1], empty[2]


@_linear_logprobs.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = len(hidden)
    logprobs, entropy = (hidden.new_empty(rows, dtype=wide) for _ in range(2))
    return logprobs, entropy, hidden.new_empty(rows, LOGPROB_STATS, dtype=wide)


@_linear_logprobs_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (
        tensor.new_empty(tensor.shape, dtype=gradient_dtype(tensor.dtype))
        if needed
        else args[0].new_empty(0)
        for tensor, needed in zip(args[:3], args[-3:], strict=True)
    )
    return hidden, weight, bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.settings = (*inputs[5:9], *inputs[10:14])
    ctx.num_constants = len(inputs) - 3


def _backward(ctx: Any, d_logprobs: Tensor, d_entropy: Tensor, _: Any) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[:3]
    upstream = torch.stack([d_logprobs, d_entropy], 1)
    grads = _linear_logprobs_backward(*ctx.saved_tensors, upstream, *ctx.settings, *needed)
    wanted = [
        grad.to(tensor.dtype) if need else None
        for grad, tensor, need in zip(grads, ctx.saved_tensors[:3], needed, strict=True)
    ]
    return (*wanted, *(None,) * ctx.num_constants)


_linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
