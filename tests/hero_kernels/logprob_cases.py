"""Cases for the log-probability kernels, and their oracle: log_softmax in fp64 and torch.autograd.

The oracle sees the stored (rounded) logits, so that every deviation is the kernel's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hero_kernels.objective import Objective
from hero_kernels.types import Tile

GRADIENT_ERROR = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 1 / 1.7, "logit_scale": 0.6},
    "softcap": {"softcap": 6.0},
    "everything": {"softcap": 30.0, "logit_scale": 0.7, "temperature": 1 / 1.4, "with_bias": True},
}


@dataclass
class LogprobCase:
    """Arguments of the two kernels, with defaults."""

    logits: Tensor
    target_ids: Tensor
    upstream: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return int(self.options.get("vocab_size", self.logits.shape[1]))

    @property
    def objective(self) -> Objective:
        names = ("temperature", "softcap", "logit_scale")
        return Objective(**{name: self.options[name] for name in names if name in self.options})

    def tile(self, grad: Tensor | None = None) -> Tile:
        bias = self.options.get("bias")
        return Tile(self.logits, None, grad, student_bias=bias, num_real=self.vocab_size)

    def statistics(self, kernels: Any, with_entropy: bool = True) -> Tensor:
        stats: Tensor = kernels.logprob_rows(
            self.tile(), self.target_ids, self.objective, with_entropy
        )
        return stats

    def gradient(self, kernels: Any, grad: Tensor, stats: Tensor) -> None:
        kernels.logprob_gradient(
            self.tile(grad), self.target_ids, self.objective, stats, self.upstream
        )

    def run(self, kernels: Any, grad_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Statistics [R, 4], and the gradient [R, V], which starts as NaN."""
        stats = self.statistics(kernels)
        grad = torch.full(self.logits.shape, float("nan"), dtype=grad_dtype)
        self.gradient(kernels, grad, stats)
        return stats, grad

    def truth(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [R, 2], and the gradient [R, V], in fp64."""
        bias, softcap = self.options.get("bias"), self.options.get("softcap")
        raw = self.logits[:, : self.vocab_size].double().requires_grad_()
        z = raw if bias is None else raw + bias[: self.vocab_size].double()
        z = z * self.options.get("logit_scale", 1.0)
        z = softcap * torch.tanh(z / softcap) if softcap else z
        log_p = torch.log_softmax(z / self.options.get("temperature", 1.0), -1)
        has_target = self.target_ids >= 0
        picked = log_p.gather(1, self.target_ids.clamp(min=0)[:, None])[:, 0]
        finite = log_p.clamp(min=torch.finfo(torch.float64).min)  # 0 · -inf
        values = torch.stack([picked.where(has_target, 0.0), -(log_p.exp() * finite).sum(-1)], 1)
        total = (self.upstream.double() * values).where(self.upstream != 0, 0.0).sum()
        (grad,) = torch.autograd.grad(total, raw)
        padding = self.logits.shape[1] - self.vocab_size
        return values.detach(), torch.nn.functional.pad(grad, (0, padding))


def make_case(
    rows: int = 4,
    vocab: int = 1300,
    *,
    sharpness: float = 4.0,
    with_bias: bool = False,
    **options: Any,
) -> LogprobCase:
    """Random logits, targets (the last row has none) and upstream gradients."""
    generator = torch.Generator().manual_seed(0)
    logits = sharpness * torch.randn(rows, vocab, generator=generator)
    size = options.get("vocab_size", vocab)
    target_ids = torch.randint(0, size, (rows,), generator=generator)
    target_ids[rows - 1 :] = -1
    upstream = torch.randn(rows, 2, generator=generator)
    if with_bias:
        options["bias"] = torch.randn(vocab, generator=generator)
    return LogprobCase(logits, target_ids, upstream, options)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def check(kernels: Any, case: LogprobCase, grad_dtype: torch.dtype = torch.float32) -> None:
    """Compare all that the kernels return with the oracle."""
    stats, grad = case.run(kernels, grad_dtype)
    values, true_grad = case.truth()
    torch.testing.assert_close(stats[:, :2].double(), values, rtol=1e-6, atol=3e-6)
    assert relative_error(grad, true_grad) < GRADIENT_ERROR[grad_dtype]
    assert grad[:, case.vocab_size :].eq(0).all()


def check_masked_columns(kernels: Any, vocab: int, masked: int) -> None:
    """-inf: as if the columns were not there, also where they fill whole blocks."""
    case = make_case(3, vocab)
    kept = torch.rand(vocab) < 0.6
    kept[:masked], kept[-2:] = False, True
    case.target_ids = torch.tensor([vocab - 1, vocab - 2, int((~kept).nonzero()[-1])])
    case.logits[:, ~kept] = -torch.inf
    stats, grad = case.run(kernels)
    shorter = LogprobCase(
        case.logits[:, kept], torch.tensor([int(kept.sum()) - 1, int(kept.sum()) - 2, -1]),
        case.upstream,
    )  # fmt: skip
    values, true_grad = shorter.truth()
    torch.testing.assert_close(stats[:, 1].double(), values[:, 1], rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(stats[:2, 0].double(), values[:2, 0], rtol=1e-6, atol=3e-6)
    assert stats[2, 0] < -1e29  # -inf, or its finite stand-in
    assert relative_error(grad[:2, kept], true_grad[:2]) < 3e-6
    assert grad[:2, ~kept].eq(0).all()


def check_garbage(kernels: Any, vocab: int) -> None:
    """A NaN reaches the results of its row; where the upstream gradient is 0, not the gradient."""
    clean, case = make_case(4, vocab), make_case(4, vocab)
    case.logits[0] = torch.nan
    case.logits[2, vocab // 2] = torch.nan
    case.upstream[0] = clean.upstream[0] = 0
    stats, grad = case.run(kernels)
    expected, clean_grad = clean.run(kernels)
    assert stats[[0, 2], :2].isnan().all()
    assert torch.equal(stats[[1, 3]], expected[[1, 3]])
    assert grad[0].eq(0).all() and grad[2].isnan().all()
    assert torch.equal(grad[[1, 3]], clean_grad[[1, 3]])


def check_in_place(kernels: Any, case: LogprobCase) -> None:
    """The gradient may take the logits' place."""
    stats, grad = case.run(kernels, case.logits.dtype)
    case.gradient(kernels, case.logits, stats)
    assert torch.equal(case.logits, grad)


def check_strided(kernels: Any) -> None:
    """Rows that are not adjacent, of logits and of the gradient."""
    whole = make_case(6, 1300)
    case = make_case(3, 800)
    case.logits = whole.logits[::2, 100:900]
    stats = case.statistics(kernels)
    workspace = torch.full((3, 2, 800), 7.0)
    case.gradient(kernels, workspace[:, 0], stats)
    values, true_grad = case.truth()
    torch.testing.assert_close(stats[:, :2].double(), values, rtol=1e-6, atol=3e-6)
    assert relative_error(workspace[:, 0], true_grad) < 3e-6
    assert workspace[:, 1].eq(7.0).all()
