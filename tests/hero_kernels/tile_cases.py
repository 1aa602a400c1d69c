"""Cases for kernels of whole rows, and their oracle: textbook formulas in fp64 and torch.autograd.

The oracle sees the stored (rounded) logits, so that every deviation is the kernel's own.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from hero_kernels.objective import Objective
from hero_kernels.rows import finish_rows, row_scales
from hero_kernels.types import RowTensors, Tile

RowKernel = Callable[[Tile, RowTensors, Objective, bool], Tensor]
JSD, FORWARD_KL, REVERSE_KL = "jsd", "forward_kl", "reverse_kl"
DIVERGENCES = pytest.mark.parametrize("divergence", [JSD, FORWARD_KL, REVERSE_KL])
DELTA = pytest.mark.parametrize("delta", [True, False], ids=["delta", "general"])
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STORAGE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@dataclass
class Case:
    """What a call of `divergence_rows` is made of, with defaults."""

    student: Tensor
    teacher: Tensor
    delta: bool
    divergence: str
    beta: float = 0.5
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    is_clip: float | None = None
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    target_ids: Tensor | None = None
    row_weights: Tensor | None = None
    old_logprobs: Tensor | None = None
    temperatures: Tensor | None = None
    absolute_rows: Tensor | None = None
    num_real: int = 0
    """0 for all columns."""
    with_stats: bool = False

    def weights(self) -> Tensor:
        return torch.ones(len(self.student)) if self.row_weights is None else self.row_weights

    def call(self, kernel: RowKernel, grad: Tensor | None) -> Tensor:
        """Statistics [R, 8]; the gradient goes to `grad`."""
        tile = Tile(
            self.student,
            self.teacher,
            grad,
            self.delta,
            self.student_bias,
            self.teacher_bias,
            self.absolute_rows,
            num_real=self.num_real or self.student.shape[1],
        )
        rows = RowTensors(self.weights(), self.target_ids, self.old_logprobs, self.temperatures)
        objective = Objective(
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            is_clip=self.is_clip,
        )
        return kernel(tile, rows, objective, self.with_stats)

    def run(
        self, kernel: RowKernel, grad_dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Statistics [R, 8] and gradient [R, V], which starts as NaN."""
        grad = torch.full(self.student.shape, float("nan"), dtype=grad_dtype)
        return self.call(kernel, grad), grad

    def truth(self) -> tuple[Tensor, Tensor]:
        """The same in fp64."""
        size = self.num_real or self.student.shape[1]
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
            temperature = self.temperature
            if self.temperatures is not None:
                temperature = self.temperatures[:, None].double()
            return torch.log_softmax(z / temperature, -1)

        log_s, log_t = log_probs(raw_s, self.student_bias), log_probs(raw_t, self.teacher_bias)

        def kl(a: Tensor, b: Tensor) -> Tensor:
            """sum p (log p - log q) - p + q: the sums of p and q cancel, and with them what fp64
            loses in their normalisers, which a value of 1e-11 would show."""
            p, q = a.exp(), b.exp()
            ratio = (b - a).where(p > 0, 0.0)
            close = ratio.clamp(-1, 1)
            near = (p > 0) & (ratio == close)
            return (p * (close.expm1() - close)).where(near, q - p - p * ratio).sum(-1)

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
        weights = self.weights().double() * stats[:, 1]
        (gradient,) = torch.autograd.grad((weights * value).sum(), raw_s)
        return stats, torch.nn.functional.pad(gradient, (0, self.student.shape[1] - size))


def make_case(
    divergence: str,
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


def confident_case(
    divergence: str,
    delta: bool,
    probability: float,
    agrees: bool,
    *,
    rows: int = 3,
    vocab: int = 1200,
) -> Case:
    """Both sides give one token this probability; `agrees`: the same token."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = 2 * torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64)
    for logits, top in ((student, 0), (teacher, 0 if agrees else 1)):
        logits[:, top] = -torch.inf
        logits[:, top] = logits.logsumexp(-1) + math.log(probability / (1 - probability))
    teacher = teacher.float()
    difference = student - teacher
    return Case((difference if delta else student).float(), teacher, delta, divergence)


def swept(
    kernels: Any, *cuts: int, width: int = 0, at: Callable[[Any], Any] = lambda tensors: tensors
) -> RowKernel:
    """`divergence_rows` made of a module's sweeps over pieces of the columns, cut before `cuts`;
    columns beyond the tile's own, up to `width`, hold padding. `at` puts tensors on the device."""

    def run(tile: Tile, rows: RowTensors, objective: Objective, with_stats: bool) -> Tensor:
        columns, rows = tile.student.shape[1], at(rows)
        end = max(columns, width)
        edges = [0, *(cut for cut in cuts if cut < end), end]
        pieces = [at(piece) for piece in pieces_of(tile, edges)]
        found = [kernels.row_statistics(piece, rows, objective) for piece in pieces]
        joined = kernels.merge_statistics(torch.stack(found))
        values = torch.stack(
            [kernels.row_values(piece, rows, objective, joined, with_stats) for piece in pieces]
        ).sum(0)
        stats = finish_rows(joined, values, rows, objective, with_stats)
        if tile.grad is not None:
            for piece in pieces:
                scales = row_scales(rows, stats)
                kernels.row_gradient(piece, rows, objective, joined, values, scales)
            whole = torch.cat([piece.grad for piece in pieces], 1)
            assert whole[:, columns:].eq(0).all()
            tile.grad.copy_(whole[:, :columns])
        return stats.cpu()

    return run


def pieces_of(tile: Tile, edges: list[int]) -> list[Tile]:
    """The tile in pieces between `edges`, each with a gradient of its own."""
    extra = (0, edges[-1] - tile.student.shape[1])
    names = ("student", "teacher", "student_bias", "teacher_bias", "grad")
    whole = {
        name: pad(tensor, extra, value=7.0) if extra[1] else tensor
        for name in names
        if (tensor := getattr(tile, name)) is not None
    }
    return [
        tile._replace(
            **{name: tensor[..., a:b] for name, tensor in whole.items()},
            first_column=a, num_real=min(max(tile.num_real - a, 0), b - a),
        )
        for a, b in itertools.pairwise(edges)
    ]  # fmt: skip


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
    kernel: RowKernel,
    case: Case,
    grad_dtype: torch.dtype = torch.float32,
    value_error: float = 1e-5,
) -> None:
    """Compare all that the kernel returns with the oracle."""
    stats, grad = case.run(kernel, grad_dtype)
    true_stats, true_grad = case.truth()
    torch.testing.assert_close(stats[:, 0].double(), true_stats[:, 0], rtol=value_error, atol=0)
    torch.testing.assert_close(stats[:, 1:].double(), true_stats[:, 1:], rtol=2e-6, atol=5e-6)
    assert relative_error(grad, true_grad) < STORAGE_ERROR[grad_dtype]
