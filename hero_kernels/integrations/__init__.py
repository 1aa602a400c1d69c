"""Drop-ins with the call orders of other libraries; none of them is imported."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def named_divergence(beta: float) -> dict[str, Any]:
    """The objective for what Liger and TRL call beta: 0 and 1 stand for the two KLs.

    Raises:
        ValueError: beta outside of [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(
            f"beta must lie in [0, 1], got {beta}: 0 forward KL, 1 reverse KL, between them JSD."
        )
    if beta == 0.0:
        return {"divergence": "forward_kl"}
    if beta == 1.0:
        return {"divergence": "reverse_kl"}
    return {"divergence": "jsd", "beta": beta}


def constant(teacher: Tensor | None, student: Tensor | None) -> Tensor | None:
    """The teacher's tensor without gradient; the student's own stays itself, for a shared head."""
    return teacher if teacher is student or teacher is None else teacher.detach()
