"""Correctness on a GPU, against fp64, with fresh random inputs and poisoned memory.

    python -m benchmarks.gpu_check [--size tiny|full] [--impl triton] [--seed N] [--out FILE]

Every check prints its error and its limit; the exit status says whether all were kept. Without a
GPU the same checks run the CPU's implementation.

Before each call memory is filled with NaN and given back, so that what the call allocates and does
not write shows. The seed is drawn anew for each run and printed, to repeat one that failed.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.problem import relative_error
from hero_kernels import KernelOptions, backends, fused_linear_divergence, reference

DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")  # in the order of `Divergence.code`
BETA = 0.3
LIMIT = {torch.bfloat16: 3e-3, torch.float32: 2e-4}
"""Relative error of loss and gradients, by Euclidean norms."""
OWN_HEAD_FACTOR = 2.0
"""A teacher with its own head: no worse than this many times plain torch in the same type."""


class Check(NamedTuple):
    """One comparison."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


class Size(NamedTuple):
    """How large the checks are."""

    rows: int
    hidden: int
    vocabularies: tuple[int, ...]
    large: tuple[int, int, int]
    """Rows, hidden size and vocabulary of the last check, in full size more than 2^31 logits."""


SIZES = {
    "tiny": Size(161, 72, (123, 1025), (64, 24, 1025)),
    "full": Size(300, 576, (123, 32769, 49152, 151936), (16384, 64, 151936)),
}


class Inputs(NamedTuple):
    """Tensors of one call; the student's require grad."""

    student_hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor | None

    @property
    def trainable(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden, self.weight

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy of another type."""
        h_s, weight, h_t = (tensor.detach().to(dtype, copy=True) for tensor in self[:3])
        own = None if self.teacher_weight is None else self.teacher_weight.to(dtype)
        return Inputs(h_s.requires_grad_(), weight.requires_grad_(), h_t, own)


def make_inputs(
    rows: int, hidden: int, vocab: int, device: str, distance: float, own_head: bool
) -> Inputs:
    """Logits of standard deviation 3; student and teacher differ by `distance` of it."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    scale = 3.0 / hidden**0.5
    h_t, weight = normal(rows, hidden), scale * normal(vocab, hidden)
    own = weight + distance * scale * normal(vocab, hidden) if own_head else None
    return Inputs(h_t + distance * normal(rows, hidden), weight, h_t, own)


def poison(device: str, num_bytes: int) -> None:
    """Leave NaN in memory that the next allocations are likely to get."""
    for size in (num_bytes, num_bytes // 16, 1 << 20):
        torch.full((max(size // 4, 1),), torch.nan, device=device)


def loss_and_gradients(
    function: Callable[..., Any], inputs: Inputs, **settings: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    output = function(*inputs, **settings)
    loss = getattr(output, "loss", output)
    return loss.detach(), torch.autograd.grad(loss, inputs.trainable)


def operation_checks(size: Size, device: str, impl: str) -> Iterator[Check]:
    """The whole operation: divergences, types, vocabularies, both kinds of heads, masks."""
    for divergence, dtype, vocab, own_head in product(
        DIVERGENCES, LIMIT, size.vocabularies, (False, True)
    ):
        distance = float(10 ** torch.empty(()).uniform_(-2.5, 0))
        inputs = make_inputs(size.rows, size.hidden, vocab, device, distance, own_head).to(dtype)
        weights = torch.rand(size.rows, device=device)
        masked = torch.rand(size.rows, device=device) < 0.4
        settings = {
            "divergence": divergence,
            "beta": BETA,
            "temperature": 1.3,
            "token_weights": weights.masked_fill(masked, 0.0),
        }
        dense = reference.fused_linear_divergence
        loss, gradients = loss_and_gradients(dense, inputs.to(torch.float64), **settings)
        limits = [LIMIT[dtype]] * 3
        if own_head:
            plain_loss, plain = loss_and_gradients(dense, inputs, **settings)
            errors = [relative_error(plain_loss, loss), *map(relative_error, plain, gradients)]
            limits = [max(LIMIT[dtype], OWN_HEAD_FACTOR * error) for error in errors]
        for hidden in (inputs.student_hidden, inputs.teacher_hidden):
            hidden.data[masked] = torch.nan  # whatever a masked token holds must not matter
        poison(device, 8 * size.rows * vocab)
        got_loss, got = loss_and_gradients(fused_linear_divergence, inputs, **settings, impl=impl)
        head = "own head" if own_head else "shared head"
        name = f"{divergence}, {dtype}, V={vocab}, {head}, distance {distance:.1e}, "
        pairs = zip((got_loss, *got), (loss, *gradients), limits, strict=True)
        for which, (value, expected, limit) in zip(("loss", "dX", "dW"), pairs, strict=True):
            yield Check(name + which, relative_error(value, expected), limit)


def row_kernel_checks(size: Size, device: str, impl: str) -> Iterator[Check]:
    """The row kernel alone: padded columns, temperature, soft cap, importance ratios."""
    for code, delta, vocab in product(range(3), (False, True), size.vocabularies):
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
        grad = torch.full_like(z_t, torch.nan)
        poison(device, 32 * size.rows)
        stats = backends.row_kernel(impl)(
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
        name = f"row kernel, {DIVERGENCES[code]}, {'delta' if delta else 'logits'}, V={vocab}, "
        limit = LIMIT[torch.float32]
        yield Check(name + "values", relative_error(stats[:, 0], values), limit)
        yield Check(name + "ratios", relative_error(stats[:, 1], ratio), limit)
        yield Check(name + "gradient", relative_error(grad[:, :real], expected), limit)
        yield Check(name + "padding", float(grad[:, real:].abs().sum()), 0.0)


def behaviour_checks(size: Size, device: str, impl: str) -> Iterator[Check]:
    """What has to hold exactly."""
    inputs = make_inputs(size.rows, size.hidden, size.vocabularies[-1], device, 0.1, False)
    inputs = inputs.to(torch.bfloat16)

    def call(case: Inputs = inputs, **settings: Any) -> tuple[Tensor, ...]:
        poison(device, 8 * size.rows * size.vocabularies[-1])
        loss, gradients = loss_and_gradients(fused_linear_divergence, case, impl=impl, **settings)
        return loss, *gradients

    def largest(tensors: tuple[Tensor, ...]) -> float:
        return max(float(tensor.abs().max()) for tensor in tensors)

    first, second = call(), call()
    difference = tuple(a - b for a, b in zip(first, second, strict=True))
    yield Check("two calls, bit for bit", largest(difference), 0.0)
    nothing = torch.zeros(size.rows, device=device)
    yield Check("everything masked: zeros", largest(call(token_weights=nothing)), 0.0)
    same = inputs._replace(teacher_hidden=inputs.student_hidden.detach().clone())
    yield Check("teacher = student: zeros", largest(call(same)), 0.0)


def large_check(size: Size, device: str, impl: str) -> Iterator[Check]:
    """More logits at once than 32 bits can count; fp64 in blocks of rows."""
    rows, hidden, vocab = size.large
    inputs = make_inputs(rows, hidden, vocab, device, 0.1, False).to(torch.bfloat16)
    wide = inputs.to(torch.float64)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, rows, 256):
        part = slice(start, start + 256)
        block = reference.fused_linear_divergence(
            wide.student_hidden[part], wide.weight, wide.teacher_hidden[part], reduction="sum"
        ).loss
        block.backward()
        loss += block.detach()
    options = KernelOptions(chunk_size=rows)
    poison(device, 4 * rows * vocab)
    got_loss, got = loss_and_gradients(
        fused_linear_divergence, inputs, reduction="sum", impl=impl, options=options
    )
    name = f"{rows} x {vocab} logits at once, "
    yield Check(name + "loss", relative_error(got_loss, loss), LIMIT[torch.bfloat16])
    for which, value, leaf in zip(("dX", "dW"), got, wide.trainable, strict=True):
        assert leaf.grad is not None
        yield Check(name + which, relative_error(value, leaf.grad), LIMIT[torch.bfloat16])


CHECKS = (row_kernel_checks, operation_checks, behaviour_checks, large_check)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare an implementation with fp64.")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--impl", help="default: triton on CUDA, cpu elsewhere")
    parser.add_argument("--seed", type=int, help="default: a new one")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    impl = options.impl or ("triton" if device == "cuda" else "cpu")
    seed = secrets.randbits(31) if options.seed is None else options.seed
    torch.manual_seed(seed)
    print(f"impl {impl} on {device}, seed {seed}")

    start = time.perf_counter()
    checks: list[Check] = []
    for group in CHECKS:
        for check in group(SIZES[options.size], device, impl):
            checks.append(check)
            verdict = "ok  " if check.passed else "FAIL"
            print(f"{verdict} {check.error:8.1e} (limit {check.limit:.1e})  {check.name}")
    failed = [check for check in checks if not check.passed]
    print(f"{len(checks)} checks, {len(failed)} failed, {time.perf_counter() - start:.0f} s")
    if options.out:
        rows = [{**check._asdict(), "passed": check.passed} for check in checks]
        report = {"impl": impl, "device": device, "seed": seed, "checks": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
