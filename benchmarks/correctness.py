"""The checks of gpu_check.py: every way of computing, against fp64.

Inputs are fresh random numbers. Before each call memory is filled with NaN and given back, so that
what the call allocates and does not write shows. The truth of a problem is computed once, for all
subjects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.check_problems import (
    FUSED_LIMITS,
    LIMIT,
    LOSS_SCALE,
    ROW_LIMIT,
    Check,
    Inputs,
    Size,
    allowed,
    loss_and_gradients,
    make_inputs,
    pieces,
    poison,
)
from benchmarks.ours import Variant, refusal
from benchmarks.problem import relative_error
from hero_kernels import (
    KernelOptions,
    backends,
    fused_linear_divergence,
    linear_logprobs,
    reference,
    supports,
)

DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")  # in the order of `Divergence.code`
BETA = 0.3
TEMPERATURE = 1.3


def operation_checks(
    size: Size, device: str, subjects: dict[str, Variant], refused: dict[str, set[str]]
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
        dense = reference.fused_linear_divergence
        truth = loss_and_gradients(dense, inputs.to(torch.float64), **settings)
        limits = [LIMIT[dtype]] * 3
        if own_head:
            plain = loss_and_gradients(dense, inputs.to(torch.float32), **settings)
            limits = allowed(dtype, plain, truth)
        for hidden in (inputs.student_hidden, inputs.teacher_hidden):
            hidden.data[masked] = torch.nan  # whatever a masked token holds must not matter
        num_active = size.rows - int(masked.sum())
        head = "own head" if own_head else "shared head"
        name = f"{divergence}, {dtype}, {shape}, {head}, distance {distance:.1e}, "
        for subject, variant in subjects.items():
            cut = pieces(variant, inputs, num_active)
            asked = {"divergence": divergence, "own_head": own_head}
            if reason := refusal(variant, shape, dtype, device, **asked, **cut):
                refused[subject].add(reason)
                continue
            poison(device, 8 * size.rows * shape[2])
            got = loss_and_gradients(
                fused_linear_divergence,
                inputs,
                impl=variant.impl,
                options=variant.options(**cut),
                **settings,
            )
            kept = FUSED_LIMITS if variant.design == "fused" and not own_head else limits
            for which, *values, limit in zip(("loss", "dX", "dW"), got, truth, kept, strict=True):
                yield Check(subject, name + which, relative_error(*values), limit)


def row_kernel_checks(
    size: Size, device: str, subjects: dict[str, Variant], refused: dict[str, set[str]]
) -> Iterator[Check]:
    """The row kernels alone: padded columns, temperature, soft cap, importance ratios."""
    kernels = {
        name: backends.row_kernel(variant.impl)
        for name, variant in subjects.items()
        if variant.design == "chunked" and supports(variant.impl, device=device) is None
    }
    for code, delta, (_, vocab) in product(range(3), (False, True), size.shapes):
        real, cap, temperature, clip = vocab - 5, 30.0, 0.7, 2.0
        z_t = 3 * torch.randn(size.rows, vocab, device=device)
        gap = 0.1 * torch.randn(size.rows, vocab, device=device)
        target_ids = torch.randint(real, (size.rows,), device=device)
        old_logprobs = -5 * torch.rand(size.rows, device=device)
        row_weights = torch.rand(size.rows, device=device)

        raw = (z_t + gap)[:, :real].double().requires_grad_()
        student, teacher = (
            cap * torch.tanh(z / cap) / temperature for z in (raw, z_t[:, :real].double())
        )
        values = reference.token_divergence(
            student, teacher, divergence=DIVERGENCES[code], beta=BETA
        )
        sampled = torch.log_softmax(student, -1).gather(1, target_ids[:, None])[:, 0].detach()
        ratio = (sampled - old_logprobs).exp().clamp(max=clip)
        (expected,) = torch.autograd.grad((row_weights * ratio * values).sum(), raw)

        z_s = gap.clone() if delta else z_t + gap
        z_t[:, real:] = z_s[:, real:] = torch.nan  # padding may hold anything
        name = f"row kernel, {DIVERGENCES[code]}, {'delta' if delta else 'logits'}, V={vocab}, "
        for subject, kernel in kernels.items():
            grad = torch.full_like(z_t, torch.nan)
            poison(device, 32 * size.rows)
            stats = kernel(
                z_s,
                z_t,
                grad,
                delta=delta,
                divergence=code,
                beta=BETA,
                inv_temperature=1 / temperature,
                softcap=cap,
                logit_scale=1.0,
                student_bias=None,
                teacher_bias=None,
                target_ids=target_ids,
                row_weights=row_weights,
                old_logprobs=old_logprobs,
                is_clip=clip,
                vocab_size=real,
                with_stats=True,
            )
            yield Check(subject, name + "values", relative_error(stats[:, 0], values), ROW_LIMIT)
            yield Check(subject, name + "ratios", relative_error(stats[:, 1], ratio), ROW_LIMIT)
            yield Check(
                subject, name + "gradient", relative_error(grad[:, :real], expected), ROW_LIMIT
            )
            yield Check(subject, name + "padding", float(grad[:, real:].abs().sum()), 0.0)


def dense_logprobs(inputs: Inputs, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What `linear_logprobs` returns, from whole logits in the inputs' type."""
    logits = inputs.student_hidden @ inputs.weight.t()
    logp = (logits / TEMPERATURE).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def with_gradients(
    pair: Sequence[Tensor], upstream: Tensor, inputs: Inputs, scale: float
) -> list[Tensor]:
    """Log-probabilities and entropies of the tokens with an upstream gradient; dX and dW."""
    kept = [torch.where(of != 0, of_row, 0.0) for of, of_row in zip(upstream, pair, strict=True)]
    total = scale * sum((of * values).sum() for of, values in zip(upstream, kept, strict=True))
    return [*(values.detach() for values in kept), *torch.autograd.grad(total, inputs.trainable)]


def logprob_checks(
    size: Size, device: str, subjects: dict[str, Variant], refused: dict[str, set[str]]
) -> Iterator[Check]:
    """`linear_logprobs`: log-probabilities, entropies, and gradients of both."""
    impls = {}
    for subject, variant in subjects.items():
        if variant.design == "chunked":
            reason = supports(variant.impl, device=device, function="linear_logprobs")
            if reason:
                refused[subject].add(reason)
            else:
                impls[subject] = variant.impl
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
        for subject, impl in impls.items():
            poison(device, 8 * rows * vocab)
            pair = linear_logprobs(
                inputs.student_hidden,
                inputs.weight,
                targets,
                temperature=TEMPERATURE,
                token_mask=~masked,
                return_entropy=True,
                impl=impl,
                options=KernelOptions(chunk_size=rows // 3 | 1),
            )
            assert isinstance(pair, tuple)
            got = with_gradients(pair, upstream, inputs, scale)
            names = ("log-probabilities", "entropies", "dX", "dW")
            for which, *values in zip(names, got, truth, strict=True):
                name = f"linear_logprobs, {dtype}, {shape}, {which}"
                yield Check(subject, name, relative_error(*values), LIMIT[dtype])


def behaviour_checks(
    size: Size, device: str, subjects: dict[str, Variant], refused: dict[str, set[str]]
) -> Iterator[Check]:
    """What has to hold exactly."""
    shape = size.sizes()[-1]
    inputs = make_inputs(*shape, device, 0.1).to(torch.bfloat16)

    def largest(tensors: Sequence[Tensor]) -> float:
        return max(float(tensor.abs().max()) for tensor in tensors)

    for subject, variant in subjects.items():
        cut = pieces(variant, inputs, shape[0])
        if refusal(variant, shape, torch.bfloat16, device, **cut):
            continue

        def call(
            case: Inputs = inputs,
            variant: Variant = variant,
            cut: dict[str, Any] = cut,
            **settings: Any,
        ) -> tuple[Tensor, ...]:
            poison(device, 8 * shape[0] * shape[2])
            ways: dict[str, Any] = {"impl": variant.impl, "options": variant.options(**cut)}
            return loss_and_gradients(fused_linear_divergence, case, **ways, **settings)

        difference = [a - b for a, b in zip(call(), call(), strict=True)]
        yield Check(subject, "two calls, bit for bit", largest(difference), 0.0)
        nothing = torch.zeros(shape[0], device=device)
        yield Check(subject, "all masked: zeros", largest(call(token_weights=nothing)), 0.0)
        same = inputs._replace(teacher_hidden=inputs.student_hidden.detach().clone())
        yield Check(subject, "teacher = student: zeros", largest(call(same)), 0.0)


def large_checks(
    size: Size, device: str, subjects: dict[str, Variant], refused: dict[str, set[str]]
) -> Iterator[Check]:
    """More logits at once than 32 bits can count; fp64 in blocks of rows."""
    rows, _, vocab = size.large
    inputs = make_inputs(*size.large, device, 0.1).to(torch.bfloat16)
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
    for subject, variant in subjects.items():
        is_sliced = variant.design == "sliced"
        whole = {"memory_budget": 48 << 30} if is_sliced else {"chunk_size": rows}
        if refusal(variant, size.large, torch.bfloat16, device, **whole):
            continue
        poison(device, 4 * rows * vocab)
        got = loss_and_gradients(
            fused_linear_divergence,
            inputs,
            reduction="sum",
            impl=variant.impl,
            options=variant.options(**whole),
        )
        limits = FUSED_LIMITS if variant.design == "fused" else [LIMIT[torch.bfloat16]] * 3
        for which, value, expected, limit in zip(
            ("loss", "dX", "dW"), got, truth, limits, strict=True
        ):
            assert expected is not None
            name = f"{rows} x {vocab} logits at once, {which}"
            yield Check(subject, name, relative_error(value, expected), limit)


CHECKS = {
    "rows": row_kernel_checks,
    "operation": operation_checks,
    "logprobs": logprob_checks,
    "behaviour": behaviour_checks,
    "large": large_checks,
}
