"""The checks of gpu_check.py: one way of computing, against fp64.

Inputs are fresh random numbers. Before each call memory is filled with NaN and given back, so that
what the call allocates and does not write shows. Each function yields checks of one variant, and
raises ValueError, or adds to `refused`, where the package says that it cannot serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks import first_look
from benchmarks.check_problems import (
    LIMIT,
    LOSS_SCALE,
    PLAIN_FACTOR,
    ROW_LIMIT,
    Check,
    Inputs,
    Size,
    cut,
    loss_and_gradients,
    make_inputs,
    poison,
)
from benchmarks.ours import Variant
from benchmarks.problem import relative_error
from hero_kernels import (
    divergence_from_logits,
    fused_linear_divergence,
    linear_logprobs,
    reference,
)

DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")
BETA = 0.3
TEMPERATURE = 1.3
WHICH = ("loss", "dX", "dW")


def operation_checks(
    size: Size, device: str, variant: Variant, refused: set[str]
) -> Iterator[Check]:
    """The whole operation: divergences, types, shapes, both kinds of heads, masks."""
    for divergence, dtype, shape, own_head in product(
        DIVERGENCES, LIMIT, size.sizes(), (False, True)
    ):
        distance = float(10 ** torch.empty(()).uniform_(-2.5, 0))
        inputs = make_inputs(*shape, device, distance, own_head).to(dtype)
        masked = torch.rand(size.rows, device=device) < 0.4
        settings: dict[str, Any] = {
            "divergence": divergence,
            "beta": BETA,
            "temperature": TEMPERATURE,
            "token_weights": torch.rand(size.rows, device=device).masked_fill(masked, 0.0),
            "scale": LOSS_SCALE[dtype],
        }
        way = cut(variant, size.rows - int(masked.sum()), shape[2])
        try:
            variant.plan(shape, dtype, device, way["options"], shared_head=not own_head)
        except ValueError as reason:
            refused.add(str(reason))
            continue
        dense = reference.fused_linear_divergence
        truth = loss_and_gradients(dense, inputs.to(torch.float64), **settings)
        allowed = [LIMIT[dtype]] * 3
        if own_head:  # there plain torch in fp32 loses precision too
            plain = loss_and_gradients(dense, inputs.to(torch.float32), **settings)
            errors = map(relative_error, plain, truth)
            allowed = [a + PLAIN_FACTOR * error for a, error in zip(allowed, errors, strict=True)]
        for hidden in (inputs.student_hidden, inputs.teacher_hidden):
            hidden.data[masked] = torch.nan  # whatever a masked token holds must not matter
        poison(device, 8 * size.rows * shape[2])
        got = loss_and_gradients(fused_linear_divergence, inputs, **way, **settings)
        head = "own head" if own_head else "shared head"
        name = f"{divergence}, {dtype}, {shape}, {head}, distance {distance:.1e}, "
        for which, *values, limit in zip(WHICH, got, truth, allowed, strict=True):
            yield Check(name + which, relative_error(*values), limit)


def row_checks(size: Size, device: str, variant: Variant, refused: set[str]) -> Iterator[Check]:
    """From logits: padded columns, temperature, soft cap, importance ratios.

    The truth comes from hidden states of few numbers, of which the logits are the product; what is
    compared is the gradient of those.
    """
    if variant.splits:
        return
    for divergence, (_, vocab) in product(DIVERGENCES, size.shapes):
        real = vocab - 5
        inputs = make_inputs(size.rows, 24, vocab, device, 0.05).to(torch.float64)
        settings: dict[str, Any] = {
            "divergence": divergence,
            "temperature": 0.7,
            "softcap": 30.0,
            "is_clip": 2.0,
            "token_weights": torch.rand(size.rows, device=device),
            "target_ids": torch.randint(real, (size.rows,), device=device),
            "old_logprobs": -5 * torch.rand(size.rows, device=device),
            "reduction": "sum",
            "vocab_size": real,
        }
        truth = reference.fused_linear_divergence(*inputs, **settings)
        (d_hidden,) = torch.autograd.grad(truth.loss, inputs.student_hidden)
        weight = inputs.weight.detach()
        z_s, z_t = (h.detach() @ weight.t() for h in (inputs.student_hidden, inputs.teacher_hidden))
        z_s[:, real:] = z_t[:, real:] = torch.nan  # padding may hold anything
        student = z_s.float().requires_grad_()
        poison(device, 4 * size.rows * vocab)
        got = divergence_from_logits(
            student, z_t.float(), impl=variant.impl, return_stats=True, **settings
        )
        assert not isinstance(got, Tensor)
        (grad,) = torch.autograd.grad(got.loss, student)
        name = f"from logits, {divergence}, V={vocab}, "
        yield Check(name + "loss", relative_error(got.loss, truth.loss), ROW_LIMIT)
        yield Check(name + "values", relative_error(got.per_token, truth.per_token), ROW_LIMIT)
        reached = grad[:, :real].double() @ weight[:real]
        yield Check(name + "gradient", relative_error(reached, d_hidden), ROW_LIMIT)
        yield Check(name + "padding", float(grad[:, real:].abs().sum()), 0.0)


def dense_logprobs(inputs: Inputs, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What `linear_logprobs` returns, from whole logits in the inputs' type."""
    logits = inputs.student_hidden @ inputs.weight.t()
    logp = (logits / TEMPERATURE).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], reference.entropy(logp)


def with_gradients(
    pair: Sequence[Tensor], upstream: Tensor, inputs: Inputs, scale: float
) -> list[Tensor]:
    """Log-probabilities and entropies of the tokens with an upstream gradient; dX and dW."""
    kept = [torch.where(of != 0, of_row, 0.0) for of, of_row in zip(upstream, pair, strict=True)]
    total = scale * sum((of * values).sum() for of, values in zip(upstream, kept, strict=True))
    return [*(values.detach() for values in kept), *torch.autograd.grad(total, inputs.trainable)]


def logprob_checks(size: Size, device: str, variant: Variant, refused: set[str]) -> Iterator[Check]:
    """`linear_logprobs`: log-probabilities, entropies, and gradients of both."""
    if variant.splits:
        return
    for dtype, shape in product(LIMIT, size.sizes()):
        rows, _, vocab = shape
        inputs = make_inputs(*shape, device, 0.0).to(dtype)
        targets = torch.randint(vocab, (rows,), device=device)
        masked = torch.rand(rows, device=device) < 0.4
        upstream = torch.randn(2, rows, device=device).masked_fill(masked, 0.0)
        wide = inputs.to(torch.float64)
        scale = LOSS_SCALE[dtype] / rows
        truth = with_gradients(dense_logprobs(wide, targets), upstream, wide, scale)
        inputs.student_hidden.data[masked] = torch.nan
        poison(device, 8 * rows * vocab)
        way = {"impl": variant.impl, "options": variant.options(vocab, tile_rows=rows // 3 | 1)}
        try:
            pair = linear_logprobs(
                inputs.student_hidden,
                inputs.weight,
                targets,
                temperature=TEMPERATURE,
                token_mask=~masked,
                return_entropy=True,
                **way,  # type: ignore[arg-type]
            )
        except ValueError as reason:
            refused.add(str(reason))
            continue
        assert isinstance(pair, tuple)
        got = with_gradients(pair, upstream, inputs, scale)
        names = ("log-probabilities", "entropies", "dX", "dW")
        for which, *values in zip(names, got, truth, strict=True):
            name = f"linear_logprobs, {dtype}, {shape}, {which}"
            yield Check(name, relative_error(*values), LIMIT[dtype])


def behaviour_checks(
    size: Size, device: str, variant: Variant, refused: set[str]
) -> Iterator[Check]:
    """What has to hold exactly."""
    shape = size.sizes()[-1]
    inputs = make_inputs(*shape, device, 0.1).to(torch.bfloat16)
    way = cut(variant, shape[0], shape[2])

    def call(case: Inputs, **settings: Any) -> tuple[Tensor, ...]:
        poison(device, 8 * shape[0] * shape[2])
        return loss_and_gradients(fused_linear_divergence, case, **way, **settings)

    def largest(tensors: Sequence[Tensor]) -> float:
        return max(float(tensor.abs().max()) for tensor in tensors)

    difference = [a - b for a, b in zip(call(inputs), call(inputs), strict=True)]
    yield Check("two calls, bit for bit", largest(difference), 0.0)
    nothing = torch.zeros(shape[0], device=device)
    yield Check("all masked: zeros", largest(call(inputs, token_weights=nothing)), 0.0)
    same = inputs._replace(teacher_hidden=inputs.student_hidden.detach().clone())
    yield Check("teacher = student: zeros", largest(call(same)), 0.0)


def large_checks(size: Size, device: str, variant: Variant, refused: set[str]) -> Iterator[Check]:
    """More logits at once than 32 bits can count; fp64 in blocks of rows."""
    rows, _, vocab = size.large
    inputs = make_inputs(*size.large, device, 0.1).to(torch.bfloat16)
    options = variant.options(vocab, tile_rows=rows, tile_columns=vocab - 1)
    poison(device, 4 * rows * vocab)
    got = loss_and_gradients(
        fused_linear_divergence, inputs, reduction="sum", impl=variant.impl, options=options
    )
    wide = inputs.to(torch.float64)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, rows, 256):
        part = slice(start, start + 256)
        block = reference.fused_linear_divergence(
            wide.student_hidden[part], wide.weight, wide.teacher_hidden[part], reduction="sum"
        ).loss
        block.backward()
        loss += block.detach()
    truth = (loss, *(leaf.grad for leaf in wide.trainable))
    for which, value, expected in zip(WHICH, got, truth, strict=True):
        assert expected is not None
        name = f"{rows} x {vocab} logits at once, {which}"
        yield Check(name, relative_error(value, expected), LIMIT[torch.bfloat16])


CHECKS = {
    "launch": first_look.launch,
    "right": first_look.right,
    "one-call": first_look.one_call,
    "rows": row_checks,
    "operation": operation_checks,
    "logprobs": logprob_checks,
    "behaviour": behaviour_checks,
    "large": large_checks,
}
"""Groups of checks, the most valuable first."""
FIRST_LOOK = ("launch", "right", "one-call")
ALONE = ("one-call", "large")
"""Groups that need the machine, or its memory, for themselves."""
