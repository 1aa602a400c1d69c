"""Cases for kernels of log-probabilities, and their oracle: log_softmax in fp64 and torch.autograd.

The oracle sees the stored (rounded) logits, so that every deviation is the kernel's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hero_kernels import rows_logprobs
from hero_kernels.objective import Objective
from hero_kernels.types import Tile

GRADIENT_ERROR = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class Case:
    """Random logits [R, V], targets (the last row has none) and upstream gradients [R, 2]."""

    kernels: Any = rows_logprobs
    device = "cpu"

    def __init__(
        self, rows: int = 4, vocab: int = 1300, *, with_bias: bool = False, **objective: Any
    ) -> None:
        self.logits = 4.0 * torch.randn(rows, vocab)
        self.target_ids = torch.randint(0, vocab, (rows,))
        self.target_ids[rows - 1 :] = -1
        self.upstream = torch.randn(rows, 2)
        self.bias = torch.randn(vocab) if with_bias else None
        self.num_real = vocab
        self.objective = Objective(**objective)

    def statistics(self, with_entropy: bool = True) -> Tensor:
        """[R, 4]."""
        given = self._tile(None), self.target_ids.to(self.device), self.objective, with_entropy
        stats: Tensor = self.kernels.logprob_rows(*given)
        return stats.cpu()

    def gradient(self, stats: Tensor, grad: Tensor) -> Tensor:
        """`grad` [R, V], filled; it may be the logits."""
        tile = self._tile(grad)
        given = (tensor.to(self.device) for tensor in (self.target_ids, stats, self.upstream))
        ids, stats, upstream = given
        self.kernels.logprob_gradient(tile, ids, self.objective, stats, upstream)
        return grad.copy_(tile.grad) if self.device != "cpu" else grad

    def _tile(self, grad: Tensor | None) -> Tile:
        logits = self.logits.to(self.device)
        filled = None if grad is None else logits if grad is self.logits else grad.to(self.device)
        bias = None if self.bias is None else self.bias.to(self.device)
        return Tile(logits, None, filled, student_bias=bias, num_real=self.num_real)

    def run(self, grad_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Statistics [R, 4], and the gradient [R, V], which starts as NaN."""
        stats = self.statistics()
        grad = torch.full(self.logits.shape, float("nan"), dtype=grad_dtype)
        return stats, self.gradient(stats, grad)

    def truth(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [R, 2], and the gradient [R, V], in fp64."""
        raw = self.logits[:, : self.num_real].double().requires_grad_()
        z = raw if self.bias is None else raw + self.bias[: self.num_real].double()
        z, cap = z * self.objective.logit_scale, self.objective.softcap
        z = z if cap is None else cap * torch.tanh(z / cap)
        log_p = torch.log_softmax(z / self.objective.temperature, -1)
        picked = log_p.gather(1, self.target_ids.clamp(min=0)[:, None])[:, 0]
        finite = log_p.clamp(min=-1e300)  # 0 · -inf
        picked = picked.where(self.target_ids >= 0, 0.0)
        values = torch.stack([picked, -(log_p.exp() * finite).sum(-1)], 1)
        total = (self.upstream.double() * values).where(self.upstream != 0, 0.0).sum()
        (grad,) = torch.autograd.grad(total, raw)
        padding = self.logits.shape[1] - self.num_real
        return values.detach(), torch.nn.functional.pad(grad, (0, padding))

    def check(self, grad_dtype: torch.dtype = torch.float32, rounding: float = 0.0) -> None:
        """Compare all that the kernels return with the oracle."""
        stats, grad = self.run(grad_dtype)
        values, true_grad = self.truth()
        torch.testing.assert_close(stats[:, :2].double(), values, rtol=1e-6, atol=3e-6)
        allowed = GRADIENT_ERROR[grad_dtype] * true_grad.norm() + rounding
        assert (grad - true_grad).norm() < allowed
        assert stats[:, 0].le(0).all() and stats[:, 1].ge(0).all()
        assert grad[:, self.num_real :].eq(0).all()
