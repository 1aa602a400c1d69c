"""The contestants: one loss, computed by this package, by plain torch and by other packages.

Each computes the mean divergence over the tokens that count. Plain torch is written here as a
careful user would write it: in place of the definition (`hero_kernels.reference`), whose fp32 form
would be slower and less exact. It drops masked tokens first. Other packages are imported, never
copied, and used as their own documentation says.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.ours import VARIANTS, Variant
from benchmarks.problem import BETA, IGNORED_LABEL, Problem
from benchmarks.shapes import Case
from benchmarks.yardsticks import multiplies_bfloat16, rows_at_once

Loss = Callable[[Problem], Tensor]
Make = Callable[[Case, str], Loss]
"""Makes the loss for a case on a device type ("cpu", "cuda"); raises `Unavailable`."""

PACKAGE_BETA = {"jsd": BETA, "forward_kl": 0.0, "reverse_kl": 1.0}
"""What Liger and TRL call the three divergences."""


class Unavailable(Exception):
    """Why a contestant cannot take part in a case."""


@dataclass(frozen=True)
class Ours:
    """The loss of this package, computed in one way."""

    variant: Variant

    def __call__(self, case: Case, device: str) -> Loss:
        self.plan(case, device)
        options = self.variant.options(case.vocab, max_active_rows=case.active_tokens)
        return lambda problem: self.variant.loss(problem, BETA, options)

    def plan(self, case: Case, device: str) -> str:
        """Implementation and tile, in words; raises `Unavailable` if this way cannot serve."""
        try:
            return self.variant.plan(
                (case.active_tokens, case.hidden, case.vocab),
                getattr(torch, case.dtype),
                device,
                self.variant.options(case.vocab, max_active_rows=case.active_tokens),
                shared_head=not self.variant.own_head,
                trainable_head=case.trainable_head,
            )
        except ValueError as reason:
            raise Unavailable(str(reason)) from reason


def torch_loss(h_s: Tensor, weight: Tensor, h_t: Tensor, divergence: str) -> Tensor:
    """Sum over rows, from whole logits."""
    with torch.no_grad():
        teacher = h_t @ weight.t()
    return torch_divergence(h_s @ weight.t(), teacher, divergence).sum()


def torch_divergence(z_s: Tensor, z_t: Tensor, divergence: str) -> Tensor:
    """Of each row of logits [N, V], [N]: fp32 softmax, `kl_div`, autograd."""
    logp_t, logp_s = F.log_softmax(z_t.float(), -1), F.log_softmax(z_s.float(), -1)

    def kl(logp: Tensor, logq: Tensor) -> Tensor:
        return F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)

    if divergence == "forward_kl":
        return kl(logp_t, logp_s)
    if divergence == "reverse_kl":
        return kl(logp_s, logp_t)
    logp_m = torch.logaddexp(logp_s + math.log(1 - BETA), logp_t + math.log(BETA))
    return BETA * kl(logp_t, logp_m) + (1 - BETA) * kl(logp_s, logp_m)


def _mean(function: Callable[..., Tensor], problem: Problem, widened: bool = False) -> Tensor:
    h_s, h_t = problem.active_rows()
    tensors = h_s, problem.weight, h_t
    if widened:
        tensors = tuple(tensor.float() for tensor in tensors)  # type: ignore[assignment]
    return function(*tensors, problem.divergence) / problem.num_active


def eager(case: Case, device: str) -> Loss:
    return lambda problem: _mean(torch_loss, problem)


def eager_widened(case: Case, device: str) -> Loss:
    """The same on fp32 copies of 16-bit tensors, for CPUs that cannot multiply 16-bit numbers."""
    if device != "cpu":
        raise Unavailable("a remedy for CPUs without 16-bit arithmetic")
    return lambda problem: _mean(torch_loss, problem, widened=True)


def chunked(case: Case, device: str) -> Loss:
    """Some rows at once, their logits computed again in the backward pass.

    As many rows as `rows_at_once`; widened where the processor lacks 16-bit arithmetic.
    """
    rows = rows_at_once(device, case.vocab)
    widened = case.dtype != "float32" and not multiplies_bfloat16(device)

    def in_chunks(h_s: Tensor, weight: Tensor, h_t: Tensor, divergence: str) -> Tensor:
        losses = [
            checkpoint(torch_loss, s, weight, t, divergence, use_reentrant=False)
            for s, t in zip(h_s.split(rows), h_t.split(rows), strict=True)
        ]
        return torch.stack(losses).sum()

    return lambda problem: _mean(in_chunks, problem, widened)


def compiled(case: Case, device: str) -> Loss:
    function = torch.compile(torch_loss, dynamic=False)
    return lambda problem: _mean(function, problem)


def auto_chunked(case: Case, device: str) -> Loss:
    """Inductor cuts the logits into chunks by itself."""
    if device != "cuda":
        raise Unavailable("Inductor's auto-chunker is measured on CUDA only")
    if not hasattr(torch._inductor.config, "auto_chunker"):
        raise Unavailable(f"torch {torch.__version__} has no auto-chunker")
    function = torch.compile(torch_loss, dynamic=False, options={"auto_chunker.enable": True})
    return lambda problem: _mean(function, problem)


def liger_fused(case: Case, device: str) -> Loss:
    """`LigerFusedLinearJSD`, Triton kernels."""
    if device != "cuda":
        raise Unavailable("Liger's fused JSD is written in Triton and needs CUDA")
    module = _imported("liger_kernel.transformers.fused_linear_jsd")
    return _with_labels(
        module.LigerFusedLinearJSD(
            jsd_beta=PACKAGE_BETA[case.divergence], ignore_index=IGNORED_LABEL
        )
    )


def liger_chunked(case: Case, device: str) -> Loss:
    return _liger_chunked(case, use_compile=False)


def liger_compiled(case: Case, device: str) -> Loss:
    return _liger_chunked(case, use_compile=True)


def _liger_chunked(case: Case, use_compile: bool) -> Loss:
    """`LigerFusedLinearJSDLoss` of chunked_loss, without its cross-entropy."""
    module = _imported("liger_kernel.chunked_loss.jsd_loss")
    return _with_labels(
        module.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=PACKAGE_BETA[case.divergence],
            ignore_index=IGNORED_LABEL,
            compiled=use_compile,
        )
    )


def _with_labels(loss: Callable[..., Tensor]) -> Loss:
    """Liger's order of arguments; labels say which tokens are masked."""
    return lambda problem: loss(
        problem.student_hidden,
        problem.weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.labels,
    )


def trl_chunked(case: Case, device: str) -> Loss:
    """`ChunkedDivergenceFunction`, on the tokens that count, as TRL's trainer calls it on CUDA."""
    module = _imported("trl.kernels.chunked_divergence")

    def loss(problem: Problem) -> Tensor:
        h_s, h_t = problem.active_rows()
        beta = PACKAGE_BETA[problem.divergence]
        per_token, _entropy = module.ChunkedDivergenceFunction.apply(
            h_s, problem.weight, None, h_t, problem.teacher_weight, None, beta
        )
        return per_token.mean()

    return loss


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that is installed may fail in any way
        package = name.split(".")[0]
        raise Unavailable(f"{package} cannot be imported: {error}") from error


OURS: dict[str, Make] = {name: Ours(variant) for name, variant in VARIANTS.items()}
CONTESTANTS: dict[str, Make] = {
    **OURS,
    "eager": eager,
    "eager-widened": eager_widened,
    "chunked": chunked,
    "compiled": compiled,
    "auto-chunked": auto_chunked,
    "liger-fused": liger_fused,
    "liger-chunked": liger_chunked,
    "liger-compiled": liger_compiled,
    "trl-chunked": trl_chunked,
}
"""By the names that tables use; docs/benchmarks.md says what each is."""
SLOW_TO_START = ("compiled", "auto-chunked", "liger-compiled")
"""Compiled for every shape, which takes longer than all the rest: they run in the plain cases
only."""


def takes_part(name: str, case: Case) -> bool:
    """Whether a contestant is entered for a case; it may still turn out to be unavailable."""
    if name == "eager-widened":
        return case.dtype != "float32"
    return is_plain(case) or name not in SLOW_TO_START


def is_plain(case: Case) -> bool:
    """Whether the loss is the JSD of all tokens, and its head is trained."""
    return case.divergence == "jsd" and case.action_share == 1.0 and case.trainable_head
