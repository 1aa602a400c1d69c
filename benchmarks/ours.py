"""Ways in which this package computes one loss: why one cannot serve, what the planner predicts.

A way that this build or this machine lacks is refused by the package itself, with a reason; nothing
here has to know which there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.shapes import Case
from hero_kernels import KernelOptions, planner
from hero_kernels.layout import Plan


class Variant(NamedTuple):
    """What is fixed; "auto" leaves it to the package."""

    impl: str = "auto"
    design: str = "auto"

    def options(self, **others: Any) -> KernelOptions:
        """With this design.

        Raises:
            ValueError: this build has no such design.
        """
        return KernelOptions(design=self.design, **others)


AUTO = Variant()


class Prediction(NamedTuple):
    """What the planner expects of a call, forward and backward."""

    plan: str
    """For example "chunked, triton, 2560 rows"."""
    seconds: float
    bytes: int
    """Added by the call, its gradients included, as `Result.extra_bytes` counts."""


def planned(
    variant: Variant,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    divergence: str = "jsd",
    own_head: bool = False,
    trainable_head: bool = True,
    **options: Any,
) -> planner.Candidate:
    """What a call of `fused_linear_divergence` takes.

    Args:
        variant: what is fixed.
        shape: rows that count, hidden size, vocabulary.
        dtype: of hidden states and head.
        device: "cpu" or "cuda".
        divergence: as for the call.
        own_head: whether the teacher has a head of its own.
        trainable_head: whether the student's head requires grad.
        options: of `KernelOptions`.

    Raises:
        ValueError: the variant cannot serve; the message says why.
    """
    chosen = variant.options(**options)
    plan = Plan(
        impl=variant.impl,
        chunk_size=chosen.chunk_size or 0,
        storage=str(chosen.storage),
        max_active_rows=chosen.max_active_rows or 0,
        need_hidden=True,
        need_weight=trainable_head,
        need_bias=False,
        with_stats=False,
        design=str(chosen.design),
        memory_budget=chosen.memory_budget or 0,
    )
    where, shared = torch.device(device), not own_head
    return planner.choose(
        planner.Problem(*shape, where, dtype, shared, divergence, "full", False, plan)
    )


def refusal(*arguments: Any, **settings: Any) -> str | None:
    """Why a call cannot be served, or None; arguments as for `planned`."""
    try:
        planned(*arguments, **settings)
    except ValueError as reason:
        return str(reason)
    return None


def predict(variant: Variant, case: Case, device: str, own_head: bool = False) -> Prediction:
    """What the planner expects of a case.

    Raises:
        ValueError: the variant cannot serve; the message says why.
    """
    dtype = getattr(torch, case.dtype)
    chosen = planned(
        variant,
        (case.active_tokens, case.hidden, case.vocab),
        dtype,
        device,
        divergence=case.divergence,
        own_head=own_head,
        trainable_head=case.trainable_head,
        max_active_rows=case.active_tokens,
    )
    unit = "columns" if chosen.design == "sliced" else "rows"
    return Prediction(
        f"{chosen.design}, {chosen.impl}, {chosen.size} {unit}",
        chosen.seconds,
        chosen.bytes + gradient_bytes(case),
    )


def gradient_bytes(case: Case) -> int:
    """Of dX and, unless the head is frozen, dW."""
    elements = case.tokens * case.hidden + case.vocab * case.hidden * case.trainable_head
    return elements * int(getattr(torch, case.dtype).itemsize)
