"""The row kernel in phases, so that a row's columns may be seen in pieces.

This part names the columns of what the phases exchange and how raw logits are scaled.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NUM_STATISTICS = 12
MAX_T, SUM_T, MAX_S, SUM_S, SHIFT, GROWTH, MEAN, TARGET_T, TARGET_GAP, TOP_T, TOP_S = range(11)
"""Columns of the statistics [R, 12]; the last is reserved."""

NUM_VALUES = 4
DIVERGENCE, CENTRE, ENTROPY_S, ENTROPY_T = range(4)
"""Columns of the values [R, 4]."""


class Scaling(NamedTuple):
    """How raw logits become z = cap((raw + bias) · logit_scale) / temperature."""

    inv_temperature: float
    softcap: float  # s of s·tanh(z / s), 0 for none
    logit_scale: float
    student_bias: Tensor | None  # [C] fp32, of the columns at hand
    teacher_bias: Tensor | None  # [C] fp32
