"""The tensors of a case, and the fp64 truth for a small one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Case
from hero_kernels import reference

SHARPNESS = 3.0
"""Standard deviation of the logits; an entropy near that of a language model."""
NEAR, FAR = 0.03, 0.3
"""|h_s - h_t| / |h_t|: forward KL near 4e-3, as in self-distillation, and near 0.4."""
IGNORED_LABEL = -100
BETA = 0.5


class Problem(NamedTuple):
    """N tokens, hidden size H, vocabulary V."""

    student_hidden: Tensor  # [N, H], requires grad
    weight: Tensor  # [V, H], the shared head; requires grad unless it is frozen
    teacher_hidden: Tensor  # [N, H]
    teacher_weight: Tensor  # [V, H], a copy of the head: to an implementation, another one
    active: Tensor  # [N] bool, the tokens that count
    num_active: int
    divergence: str

    @property
    def labels(self) -> Tensor:
        """[N] int64: `IGNORED_LABEL` for masked tokens, some token for the others."""
        return torch.where(self.active, 0, IGNORED_LABEL)

    def active_rows(self) -> tuple[Tensor, Tensor]:
        """Hidden states of student and teacher at the tokens that count; the copies are new."""
        if self.num_active == len(self.active):
            return self.student_hidden, self.teacher_hidden
        return self.student_hidden[self.active], self.teacher_hidden[self.active]

    @property
    def trainable(self) -> list[Tensor]:
        return [tensor for tensor in (self.student_hidden, self.weight) if tensor.requires_grad]


def make_problem(
    case: Case, device: str, distance: float = NEAR, vocab: int | None = None
) -> Problem:
    """Random tensors, the same for every call; the actions are the heads of eight turns.

    Args:
        case: the shapes.
        device: where.
        distance: `NEAR` or `FAR`.
        vocab: rows of the head; None for those of the case.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    weight = normal(vocab or case.vocab, case.hidden).mul_(SHARPNESS / case.hidden**0.5).to(dtype)
    h_t = normal(case.tokens, case.hidden)
    h_s = h_t + distance * normal(case.tokens, case.hidden)
    position = torch.arange(case.tokens, device=device)
    turn_tokens = max(1, case.tokens // 8)
    active = torch.zeros(case.tokens, dtype=torch.bool, device=device)
    active[torch.argsort(position % turn_tokens, stable=True)[: case.active_tokens]] = True
    return Problem(
        h_s.to(dtype).requires_grad_(),
        weight.requires_grad_(case.trainable_head),
        h_t.to(dtype),
        weight.detach().clone(),
        active,
        case.active_tokens,
        case.divergence,
    )


class Truth(NamedTuple):
    """In fp64, for inputs as they are after rounding to the case's type."""

    loss: Tensor  # []
    gradients: list[Tensor]  # of `Problem.trainable`


def truth(problem: Problem) -> Truth:
    """The dense definition in fp64, differentiated by autograd."""
    wide = problem._replace(
        **{
            name: getattr(problem, name).detach().double()
            for name in ("student_hidden", "weight", "teacher_hidden")
        }
    )
    for name in ("student_hidden", "weight"):
        getattr(wide, name).requires_grad_(getattr(problem, name).requires_grad)
    loss = reference.fused_linear_divergence(
        wide.student_hidden,
        wide.weight,
        wide.teacher_hidden,
        divergence=problem.divergence,
        beta=BETA,
        token_weights=problem.active,
    ).loss
    return Truth(loss.detach(), list(torch.autograd.grad(loss, wide.trainable)))


def relative_error(got: Tensor | None, expected: Tensor) -> float:
    """|got - expected| / |expected|, by Euclidean norms."""
    assert got is not None
    got, expected = got.detach(), expected.detach()
    return float((got.to(expected.dtype) - expected).norm() / expected.norm())
