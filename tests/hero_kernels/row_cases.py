"""Cases for the row kernels, and their oracle: textbook formulas in fp64 and torch.autograd.

The oracle sees the stored (rounded) logits, so that every deviation is the kernel's own.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

RowKernel = Callable[..., Tensor]
JSD, FORWARD_KL, REVERSE_KL = 0, 1, 2
DIVERGENCES = pytest.mark.parametrize(
    "divergence", [JSD, FORWARD_KL, REVERSE_KL], ids=["jsd", "forward", "reverse"]
)
DELTA = pytest.mark.parametrize("delta", [True, False], ids=["delta", "general"])
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STORAGE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@dataclass
class Case:
    """Arguments of `divergence_rows`, with defaults."""

    student: Tensor
    teacher: Tensor
    delta: bool
    divergence: int
    beta: float = 0.5
    inv_temperature: float = 1.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    target_ids: Tensor | None = None
    row_weights: Tensor | None = None
    old_logprobs: Tensor | None = None
    is_clip: float = 0.0
    vocab_size: int = 0
    with_stats: bool = False
    absolute_rows: Tensor | None = None

    def options(self) -> dict[str, Any]:
        options = {k: v for k, v in vars(self).items() if k not in ("student", "teacher")}
        options["vocab_size"] = self.vocab_size or self.student.shape[1]
        if self.row_weights is None:
            options["row_weights"] = torch.ones(len(self.student))
        return options

    def run(
        self, row_kernel: RowKernel, grad_dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Statistics [R, 8] and gradient [R, V], which starts as NaN."""
        grad = torch.full(self.student.shape, float("nan"), dtype=grad_dtype)
        return row_kernel(self.student, self.teacher, grad, **self.options()), grad

    def truth(self) -> tuple[Tensor, Tensor]:
        """The same in fp64."""
        size = self.vocab_size or self.student.shape[1]
        raw_t = self.teacher[:, :size].double()
        raw_s = self.student[:, :size].double()
        if self.delta and self.absolute_rows is None:
            raw_s = raw_s + raw_t
        elif self.delta:
            raw_s = raw_s + raw_t.where(~self.absolute_rows[:, None], 0.0)
        raw_s.requires_grad_()

        def log_probs(raw: Tensor, bias: Tensor | None) -> Tensor:
            z = (raw if bias is None else raw + bias[:size].double()) * self.logit_scale
            z = self.softcap * torch.tanh(z / self.softcap) if self.softcap else z
            return torch.log_softmax(z * self.inv_temperature, -1)

        log_s, log_t = log_probs(raw_s, self.student_bias), log_probs(raw_t, self.teacher_bias)

        def kl(a: Tensor, b: Tensor) -> Tensor:
            return (a.exp() * (a - b)).where(a.exp() > 0, 0.0).sum(-1)

        log_m = torch.log((1 - self.beta) * log_s.exp() + self.beta * log_t.exp())
        value = {
            JSD: lambda: (1 - self.beta) * kl(log_s, log_m) + self.beta * kl(log_t, log_m),
            FORWARD_KL: lambda: kl(log_t, log_s),
            REVERSE_KL: lambda: kl(log_s, log_t),
        }[self.divergence]()
        stats = torch.zeros(len(raw_t), 8, dtype=torch.float64)
        stats[:, 0], stats[:, 1] = value.detach(), 1.0
        if self.target_ids is not None:
            rows = (self.target_ids >= 0).nonzero()[:, 0]
            for column, log_p in ((2, log_s), (3, log_t)):
                stats[rows, column] = log_p.detach()[rows, self.target_ids[rows]]
            if self.old_logprobs is not None:
                ratio = torch.exp(stats[rows, 2] - self.old_logprobs[rows])
                stats[rows, 1] = ratio.clamp(max=self.is_clip) if self.is_clip else ratio
        if self.with_stats:
            stats[:, 4] = -(log_s.exp() * log_s).sum(-1).detach()
            stats[:, 5] = -(log_t.exp() * log_t).sum(-1)
            stats[:, 6] = log_s.argmax(-1) == log_t.argmax(-1)
        weights = self.options()["row_weights"].double() * stats[:, 1]
        (gradient,) = torch.autograd.grad((weights * value).sum(), raw_s)
        return stats, torch.nn.functional.pad(gradient, (0, self.student.shape[1] - size))


def make_case(
    divergence: int,
    delta: bool,
    rows: int = 3,
    vocab: int = 1300,
    *,
    scale: float = 0.3,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Peaked teacher logits and a student at distance `scale`."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 4 * torch.randn(rows, vocab, generator=generator)
    difference = scale * torch.randn(rows, vocab, generator=generator)
    return Case(
        difference if delta else teacher + difference, teacher, delta, divergence, **options
    )


def far_apart(matrix: Tensor) -> Tensor:
    """A copy of [3, V] whose last row starts beyond element 2^31.

    The memory between the rows is reserved by the operating system, but never touched, so never
    taken.
    """
    stride, (rows, columns) = 2**30 + 64, matrix.shape
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    size = ((rows - 1) * stride + columns) * matrix.dtype.itemsize
    reserved = torch.frombuffer(mmap.mmap(-1, size, flags=anonymous), dtype=matrix.dtype)
    return reserved.as_strided((rows, columns), (stride, 1)).copy_(matrix)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def check(
    row_kernel: RowKernel,
    case: Case,
    grad_dtype: torch.dtype = torch.float32,
    value_error: float = 1e-5,
) -> None:
    """Compare all that the kernel returns with the oracle."""
    stats, grad = case.run(row_kernel, grad_dtype)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=value_error, atol=0)
    torch.testing.assert_close(stats[:, 1:].double(), true_stats[:, 1:], rtol=2e-6, atol=5e-6)
    assert relative_error(grad, true_grad) < STORAGE_ERROR[grad_dtype]
