"""Log-probabilities of given tokens straight from hidden states and head, with gradient.

The forward pass is one head GEMM and one sweep over the logits, and keeps four numbers for each
row. The backward pass forms the logits again, turns each into its gradient with those numbers (one
sweep, no sum over the row), and multiplies: three GEMMs. Keeping the logits, or their gradient,
would save one of them at the price of N·V numbers.

With a frozen head and without entropies nothing is formed again: the forward pass multiplies the
gradient of each log-probability by the head while its logits are there and keeps d log p / dh
[N, H], which the backward pass scales by the upstream gradient. Two GEMMs in all in place of three.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hero_kernels import backends, checks, gemm, gradients
from hero_kernels.autograd import first_order
from hero_kernels.call import Call, decoded_call, decoded_objective, encoded, numbers_of
from hero_kernels.constants import ENTROPY, LOGPROB, NUM_LOGPROB_STATS
from hero_kernels.divergence import active_rows, power_of_two_scale, spread, without_autocast
from hero_kernels.memory import Layout, Shape, default_rows, layout
from hero_kernels.objective import KernelOptions, Objective
from hero_kernels.tiles import Sides, Tiles, walk, with_adjacent_columns
from hero_kernels.types import GRADIENT_DTYPE, Gradients, Head, Tile
from hero_kernels.vocab_parallel import Shards


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

    Any upstream gradient is right, of the log-probabilities and of the entropy. On CPU, tokens
    whose upstream gradient is 0 (clipped by PPO, without advantage) are dropped before the products
    of the backward pass. With a frozen head and without entropies the forward pass does them all:
    mask there what will have no gradient, and call under `torch.no_grad()` what needs none.

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
        impl: "auto", or "torch" (any device, and fp64) or "triton" (CUDA); see
            `supports(impl, function="linear_logprobs")`.
        options: how it is computed; `tile_rows`, `max_active_rows` and `validate` count.

    Returns:
        Log-probabilities [...] in fp32 (fp64 for fp64), or these and the entropies [...], in nats.

    Raises:
        ValueError: arguments that do not match or cannot be served.
        TypeError: something that is not a tensor where one is needed.
    """
    options = checks.options(options or KernelOptions())
    for name in ("process_group", "tile_columns", "memory_budget"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"linear_logprobs has no {name}: it is an option of fused_linear_divergence. Leave "
                "it out; pass the whole head, and tile_rows for less memory."
            )
    settings = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    what, temperatures = checks.objective("linear_logprobs", settings)
    if temperatures is not None:
        raise TypeError(
            "temperature must be a number for linear_logprobs, got a tensor: divide the tokens "
            "into calls of one temperature each."
        )
    hidden, weight = checks.autocast(hidden, weight)
    checks.head("", hidden, weight, bias)
    checks.per_token("target_ids", target_ids, "hidden", hidden, integer=True)
    if token_mask is not None:
        checks.per_token("token_mask", token_mask, "hidden", hidden)
    vocab = checks.vocabulary(len(weight), len(weight), vocab_size)
    targets = target_ids.reshape(-1).long()
    mask = torch.ones_like(targets, dtype=torch.bool)
    if token_mask is not None:
        mask = token_mask.detach().reshape(-1) != 0
    if checks.values_readable(hidden, options.validate):
        checks.targets("target_ids", targets, vocab, mask)
    device, vocab = str(hidden.device), operator.index(vocab)
    request = backends.Request(device, hidden.dtype, function="linear_logprobs")
    name = backends.chosen(impl, *request)
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or trains_head)
    needs_logits_again = trains_head or return_entropy
    if wanted and needs_logits_again:
        gradients.savable("", hidden, weight, bias, target_ids=targets)
    call = Call(
        name, options.tile_rows or default_rows(device, vocab), 0, vocab,
        options.max_active_rows or 0, need_hidden=wanted and not needs_logits_again,
        with_stats=return_entropy,
    )  # fmt: skip
    logprobs, entropy, *_ = _linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets, mask, numbers_of(what),
        encoded(what, call.text),
    )  # fmt: skip
    shape = hidden.shape[:-1]
    if not return_entropy:
        return logprobs.reshape(shape)
    return logprobs.reshape(shape), entropy.reshape(shape)


@torch.library.custom_op("hero_kernels::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    mask: Tensor,
    numbers: Sequence[float],
    call: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [N], entropies [N] (0 without `with_stats`), and for backward [N, 4] and,
    with `need_hidden`, d log p / dh [N, H], else empty."""
    how = decoded_call(call)
    what = decoded_objective(call, *numbers)
    of_logprob = torch.stack([mask, torch.zeros_like(mask)], 1) if how.need_hidden else None
    head = Head(hidden, weight, bias)
    stats, grads = _computed(head, target_ids, mask, None, of_logprob, what, how)
    slope = hidden.new_empty(0) if grads.hidden is None else grads.hidden
    return stats[:, LOGPROB].clone(), stats[:, ENTROPY].clone(), stats, slope


@torch.library.custom_op("hero_kernels::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    mask: Tensor,
    stats: Tensor,
    upstream: Tensor,
    numbers: Sequence[float],
    call: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty where not needed); `upstream` [N, 2]."""
    how = decoded_call(call)
    what = decoded_objective(call, *numbers)
    live = mask & (upstream != 0).any(1)
    _, grads = _computed(Head(hidden, weight, bias), target_ids, live, stats, upstream, what, how)
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return d_hidden, d_weight, d_bias


class _LogprobWork:
    """Log-probabilities and entropies of the rows of a tile, unless an earlier call left them, and
    with `upstream` [N, 2] their gradient."""

    num_stats = NUM_LOGPROB_STATS

    def __init__(
        self,
        kernels: ModuleType,
        ids: Tensor,
        plan: Layout,
        objective: Objective,
        with_entropy: bool,
        stats: Tensor | None,
        upstream: Tensor | None,
    ) -> None:
        self.kernels, self.objective, self.with_entropy = kernels, objective, with_entropy
        self.ids, self.stats, self.upstream = (
            [] if tensor is None or not plan.sizes else list(tensor.split(plan.sizes))
            for tensor in (ids, stats, upstream)
        )

    def of_rows(self, tiles: Tiles, i: int) -> Tensor:
        if i == len(self.stats):
            (tile,) = tiles
            self.stats.append(
                self.kernels.logprob_rows(tile, self.ids[i], self.objective, self.with_entropy)
            )
        return self.stats[i]

    def gradient(self, tile: Tile, i: int) -> None:
        self.kernels.logprob_gradient(
            tile, self.ids[i], self.objective, self.stats[i], self.upstream[i]
        )


def _computed(
    head: Head,
    target_ids: Tensor,
    active: Tensor,
    stats: Tensor | None,
    upstream: Tensor | None,
    objective: Objective,
    call: Call,
) -> tuple[Tensor, Gradients]:
    """[N, 4] of rows, unless an earlier call left them, and with `upstream` [N, 2] the gradients of
    sum(upstream · (log-probability, entropy)). Of rows that are not `active` [N] both are 0; where
    there are more of these than the bound and that cannot be raised, the former are NaN."""
    num_rows = len(head.hidden)
    kept, overflow = active_rows(active, call.max_active_rows)
    if kept is not None:
        head = head._replace(hidden=head.hidden[kept])
        target_ids, active = target_ids[kept], active[kept]
        stats = None if stats is None else stats[kept]
        upstream = None if upstream is None else upstream[kept]
    sides, plan = _prepared(head, active, call)
    ids = target_ids.where(active, -1)
    scale = None
    if upstream is not None:
        upstream = upstream.masked_fill(~active[:, None], 0).to(plan.wide)
        if head.hidden.dtype == torch.float16:
            scale = power_of_two_scale(upstream, objective.logit_scale / objective.temperature)
            upstream = upstream * scale
    kernels = backends.logprob_kernels(call.impl)
    with without_autocast(head.hidden.device.type):
        work = _LogprobWork(kernels, ids, plan, objective, call.with_stats, stats, upstream)
        stats, grads = walk(sides, work, call, plan, Shards())
    if scale is not None:
        grads = Gradients(*(None if grad is None else grad.div_(scale) for grad in grads))
    if grads.hidden is not None:
        grads = grads._replace(hidden=spread(grads.hidden, kept, num_rows))
    stats = stats.masked_fill(~active[:, None], 0.0)
    if overflow is not None:
        stats = stats.masked_fill(overflow, torch.nan)
    return spread(stats, kept, num_rows), grads


def _prepared(head: Head, active: Tensor, call: Call) -> tuple[Sides, Layout]:
    hidden = head.hidden
    on_cpu = hidden.device.type == "cpu"
    sides = Sides(head, None, None if on_cpu else active, 0, call.vocab_size, shared=False)
    if on_cpu and gemm.takes_16_bit(hidden.device, hidden.dtype):
        sides = with_adjacent_columns(sides)
    shape = Shape(
        len(hidden), hidden.shape[1], call.vocab_size, hidden.dtype, str(hidden.device), False,
        call.need_hidden, call.need_weight, call.need_bias,
    )  # fmt: skip
    return sides, layout(shape, call.tile_rows, 0)


@_linear_logprobs.register_fake
def _(hidden: Tensor, *constants: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    num_rows = len(hidden)
    logprobs, entropy = (hidden.new_empty(num_rows, dtype=wide) for _ in range(2))
    slope = hidden.new_empty(0)
    if decoded_call(constants[-1]).need_hidden:
        slope = torch.empty_like(hidden, dtype=GRADIENT_DTYPE[hidden.dtype])
    return logprobs, entropy, hidden.new_empty(num_rows, NUM_LOGPROB_STATS, dtype=wide), slope


@_linear_logprobs_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = decoded_call(arguments[-1])
    needed = call.need_hidden, call.need_weight, call.need_bias
    hidden, weight, bias = (
        tensor.new_empty(tensor.shape, dtype=GRADIENT_DTYPE[tensor.dtype])
        if need
        else arguments[0].new_empty(0)
        for tensor, need in zip(arguments[:3], needed, strict=True)
    )
    return hidden, weight, bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.numbers, ctx.call = inputs[5], inputs[6]
    ctx.num_constants = len(inputs) - 3
    ctx.has_slope = decoded_call(ctx.call).need_hidden
    if ctx.has_slope:
        ctx.save_for_backward(inputs[4], output[3])
        ctx.dtype = inputs[0].dtype
    else:
        ctx.save_for_backward(*inputs[:5], output[2])


def _backward(ctx: Any, d_logprobs: Tensor, d_entropy: Tensor, *_: Any) -> tuple[Any, ...]:
    first_order("linear_logprobs")
    if ctx.has_slope:
        mask, slope = ctx.saved_tensors
        live = mask & (d_logprobs != 0)  # other rows may hold anything
        hidden = (slope * d_logprobs[:, None]).where(live[:, None], 0.0)
        return (hidden.to(ctx.dtype), None, None, *(None,) * ctx.num_constants)
    needed = ctx.needs_input_grad[:3]
    call = decoded_call(ctx.call).with_needs(needed)
    text = encoded(decoded_objective(ctx.call, *ctx.numbers), call.text)
    upstream = torch.stack([d_logprobs, d_entropy], 1)
    grads = _linear_logprobs_backward(*ctx.saved_tensors, upstream, ctx.numbers, text)
    wanted = [
        grad.to(tensor.dtype) if need else None
        for grad, tensor, need in zip(grads, ctx.saved_tensors[:3], needed, strict=True)
    ]
    return (*wanted, *(None,) * ctx.num_constants)


_linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
