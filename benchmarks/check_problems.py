"""The random problems that gpu_check.py checks on, and the limits it holds the package to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ours import Variant

LIMIT = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 2e-5}
"""Relative error of loss and gradients, by Euclidean norms."""
ROW_LIMIT = 2e-4
"""The same from two logits in fp32, whose difference is rounded."""
PLAIN_FACTOR = 2.0
"""Where plain torch in fp32 loses precision too: so many times its error on top."""
LOSS_SCALE = {torch.bfloat16: 1.0, torch.float16: 4096.0, torch.float32: 1.0}
"""Gradients are taken of so many times the loss: those of fp16 would be below its range."""


class Check(NamedTuple):
    """One comparison, or one time."""

    name: str
    value: float
    """A relative error, or seconds."""
    limit: float | None
    """Of the error; None for seconds, which are told and not judged."""

    @property
    def passed(self) -> bool:
        return self.limit is None or self.value <= self.limit  # False for NaN

    def __str__(self) -> str:
        if self.limit is None:
            return f"ok   {1e3 * self.value:.4g} ms: {self.name}"
        verdict = "ok  " if self.passed else "FAIL"
        return f"{verdict} {self.value:8.1e} (limit {self.limit:.1e}): {self.name}"


class Size(NamedTuple):
    """How large the checks are."""

    rows: int
    shapes: tuple[tuple[int, int], ...]
    """Hidden size and vocabulary, odd ones among them."""
    large: tuple[int, int, int]
    """Rows, hidden size and vocabulary of the last check, in full size more than 2^31 logits."""

    def sizes(self) -> list[tuple[int, int, int]]:
        return [(self.rows, *shape) for shape in self.shapes]


SIZES = {
    "smallest": Size(67, ((45, 1025),), (64, 24, 257)),
    "full": Size(300, ((72, 123), (577, 32769), (576, 49152), (1024, 151936)), (16384, 64, 151936)),
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
    rows: int, hidden: int, vocab: int, device: str, distance: float, own_head: bool = False
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
    function: Callable[..., Any], inputs: Inputs, scale: float = 1.0, **settings: Any
) -> tuple[Tensor, ...]:
    """Loss, and dX and dW of `scale` times the loss."""
    output = function(*inputs, **settings)
    loss = getattr(output, "loss", output)
    return loss.detach(), *torch.autograd.grad(scale * loss, inputs.trainable)


def cut(variant: Variant, rows: int, vocab: int) -> dict[str, Any]:
    """Implementation, and options that cut a call into several unequal tiles, with or without a
    bound on its rows."""
    bound = rows + 3 if torch.rand(()) < 0.5 else None
    options = variant.options(
        vocab, tile_rows=rows // 3 | 1, tile_columns=vocab // 3 | 1, max_active_rows=bound
    )
    return {"impl": variant.impl, "options": options}
