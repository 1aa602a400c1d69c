"""The contestants: one loss, computed by this package, by plain torch and by other packages.

Each computes the mean divergence over the tokens that count. Other packages are imported, never
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

from benchmarks.ours import AUTO, Prediction, Variant, predict, refusal
from benchmarks.problem import BETA, IGNORED_LABEL, Problem
from benchmarks.shapes import Case
from hero_kernels import fused_linear_divergence

Loss = Callable[[Problem], Tensor]

PACKAGE_BETA = {"jsd": BETA, "forward_kl": 0.0, "reverse_kl": 1.0}
"""What Liger and TRL call the three divergences."""


class Unavailable(Exception):
    """Why a contestant cannot take part in a case."""


@dataclass(frozen=True)
class Contestant:
    """One implementation of the loss."""

    title: str
    """For tables."""
    make: Callable[[Case, str], Loss]
    """The loss for a case on a device type ("cpu", "cuda"); raises `Unavailable`."""


@dataclass(frozen=True)
class Ours:
    """The loss of this package, computed in one way."""

    variant: Variant = AUTO
    own_head: bool = False
    """Not to tell that both heads hold the same values: as with another teacher."""

    def __call__(self, case: Case, device: str) -> Loss:
        reason = refusal(
            self.variant,
            (case.active_tokens, case.hidden, case.vocab),
            getattr(torch, case.dtype),
            device,
            divergence=case.divergence,
            own_head=self.own_head,
            trainable_head=case.trainable_head,
        )
        if reason:
            raise Unavailable(reason)
        options = self.variant.options(max_active_rows=case.active_tokens)

        def loss(problem: Problem) -> Tensor:
            value = fused_linear_divergence(
                problem.student_hidden,
                problem.weight,
                problem.teacher_hidden,
                problem.teacher_weight if self.own_head else None,
                divergence=problem.divergence,
                beta=BETA,
                token_weights=problem.active,
                impl=self.variant.impl,
                options=options,
            )
            assert isinstance(value, Tensor)
            return value

        return loss

    def prediction(self, case: Case, device: str) -> Prediction:
        """What the planner expects, for a case that this way can serve."""
        return predict(self.variant, case, device, self.own_head)


def dense_loss(
    student_hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    active: Tensor,
    divergence: str,
) -> Tensor:
    """Whole logits, fp32 softmax, autograd: as it is usually written."""
    with torch.no_grad():
        logp_t = F.log_softmax((teacher_hidden @ weight.t()).float(), -1)
    logp_s = F.log_softmax((student_hidden @ weight.t()).float(), -1)
    if divergence == "forward_kl":
        terms = F.kl_div(logp_s, logp_t, reduction="none", log_target=True)
    elif divergence == "reverse_kl":
        terms = F.kl_div(logp_t, logp_s, reduction="none", log_target=True)
    else:
        logp_m = torch.logaddexp(logp_s + math.log(1 - BETA), logp_t + math.log(BETA))
        terms = BETA * F.kl_div(logp_m, logp_t, reduction="none", log_target=True)
        terms = terms + (1 - BETA) * F.kl_div(logp_m, logp_s, reduction="none", log_target=True)
    per_token = terms.sum(-1)
    return (per_token * active).sum() / active.sum()


def eager(case: Case, device: str) -> Loss:
    return lambda problem: _dense(dense_loss, problem)


def eager_widened(case: Case, device: str) -> Loss:
    """The same on fp32 copies of 16-bit tensors, for CPUs that cannot multiply 16-bit numbers."""
    if device != "cpu":
        raise Unavailable("a remedy for CPUs without 16-bit arithmetic")
    return lambda problem: dense_loss(
        problem.student_hidden.float(),
        problem.weight.float(),
        problem.teacher_hidden.float(),
        problem.active,
        problem.divergence,
    )


def compiled(case: Case, device: str) -> Loss:
    function = torch.compile(dense_loss, dynamic=False)
    return lambda problem: _dense(function, problem)


def auto_chunked(case: Case, device: str) -> Loss:
    """Inductor cuts the logits into chunks by itself."""
    if device != "cuda":
        raise Unavailable("Inductor's auto-chunker is measured on CUDA only")
    if not hasattr(torch._inductor.config, "auto_chunker"):
        raise Unavailable(f"torch {torch.__version__} has no auto-chunker")
    function = torch.compile(dense_loss, dynamic=False, options={"auto_chunker.enable": True})
    return lambda problem: _dense(function, problem)


def _dense(function: Callable[..., Tensor], problem: Problem) -> Tensor:
    return function(
        problem.student_hidden,
        problem.weight,
        problem.teacher_hidden,
        problem.active,
        problem.divergence,
    )


def liger_fused(case: Case, device: str) -> Loss:
    """`LigerFusedLinearJSD`, Triton kernels."""
    if device != "cuda":
        raise Unavailable("Liger's fused JSD is written in Triton and needs CUDA")
    module = _imported("liger_kernel.transformers.fused_linear_jsd")
    loss = module.LigerFusedLinearJSD(
        jsd_beta=PACKAGE_BETA[case.divergence], ignore_index=IGNORED_LABEL
    )
    return lambda problem: loss(
        problem.student_hidden,
        problem.weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.labels,
    )


def liger_chunked(case: Case, device: str) -> Loss:
    return _liger_chunked(case, use_compile=False)


def liger_chunked_compiled(case: Case, device: str) -> Loss:
    return _liger_chunked(case, use_compile=True)


def _liger_chunked(case: Case, use_compile: bool) -> Loss:
    """`LigerFusedLinearJSDLoss` of chunked_loss, without its cross-entropy."""
    module = _imported("liger_kernel.chunked_loss.jsd_loss")
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=PACKAGE_BETA[case.divergence],
        ignore_index=IGNORED_LABEL,
        compiled=use_compile,
    )
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
        h_s, h_t = problem.student_hidden, problem.teacher_hidden
        if problem.num_active < len(h_s):
            h_s, h_t = h_s[problem.active], h_t[problem.active]
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


CONTESTANTS = {
    "hero": Contestant("hero_kernels, shared head", Ours()),
    "hero-own-head": Contestant("hero_kernels, teacher with its own head", Ours(own_head=True)),
    "hero-triton": Contestant(
        "hero_kernels, Triton row kernel", Ours(Variant("triton", "chunked"))
    ),
    "hero-cuda": Contestant("hero_kernels, CUDA row kernel", Ours(Variant("cuda", "chunked"))),
    "hero-fused": Contestant("hero_kernels, fused design", Ours(Variant(design="fused"))),
    "hero-sliced": Contestant("hero_kernels, sliced design", Ours(Variant(design="sliced"))),
    "eager": Contestant("torch, whole logits", eager),
    "eager-widened": Contestant("torch, whole logits, inputs cast to fp32", eager_widened),
    "compiled": Contestant("torch.compile, whole logits", compiled),
    "auto-chunked": Contestant("torch.compile with the auto-chunker", auto_chunked),
    "liger-fused": Contestant("Liger fused linear JSD", liger_fused),
    "liger-chunked": Contestant("Liger chunked JSD", liger_chunked),
    "liger-chunked-compiled": Contestant("Liger chunked JSD, compiled", liger_chunked_compiled),
    "trl-chunked": Contestant("TRL chunked divergence", trl_chunked),
}
OURS = tuple(name for name, entry in CONTESTANTS.items() if isinstance(entry.make, Ours))
ALWAYS = ("hero", "hero-own-head")
"""Those of ours that serve every case on every machine."""
ON_REQUEST = tuple(name for name in OURS if name not in ALWAYS)
"""Ways that "hero" could have taken, to compare them; entered by --contestants only."""
SLOW_TO_START = ("compiled", "auto-chunked", "liger-chunked-compiled")
"""Compiled for every shape, which takes longer than all the rest: they run in the plain cases only,
and on CPU only with --full."""


def takes_part(name: str, case: Case) -> bool:
    """Whether a contestant is entered for a case; it may still turn out to be unavailable."""
    if name == "eager-widened":
        return case.dtype != "float32"
    plain = case.divergence == "jsd" and case.action_share == 1.0 and case.trainable_head
    return plain or name not in SLOW_TO_START
