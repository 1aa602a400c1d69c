"""Puts the Triton phases together to a row kernel that sees the columns of a row in pieces.

And the definition of the statistics in fp64. For files that run with TRITON_INTERPRET=1, which must
be set before triton is imported, or on a GPU.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import torch
from row_cases import Case
from torch import Tensor
from triton_tools import mend_interpreter

from hero_kernels import phases
from hero_kernels.phases import Scaling
from hero_kernels.triton.configs import RowConfig
from hero_kernels.triton.phases import (
    row_gradient,
    row_statistics,
    row_values,
    row_values_and_gradient,
)
from hero_kernels.triton.statistics import merge_statistics

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cpu":
    mend_interpreter()
SMALL_BLOCKS = RowConfig(block_v=128, num_warps=4)


def on_device(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(DEVICE)


def offsets(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """[R] log sum p_t exp(gap), the mean of the gap under p_s; whatever the shift.

    The first is also log(sum exp z_s / sum exp z_t); it is taken from the growth where that is
    small.
    """
    growth = statistics[:, phases.GROWTH] / statistics[:, phases.SUM_T]
    shift, near = statistics[:, phases.SHIFT], growth.abs() < 0.5
    far = statistics[:, phases.MAX_S] - statistics[:, phases.MAX_T]
    far = far + (statistics[:, phases.SUM_S] / statistics[:, phases.SUM_T]).log()
    mean = statistics[:, phases.MEAN] / statistics[:, phases.SUM_S]
    return torch.where(near, growth.where(near, 0.0).log1p() + shift, far), mean + shift


def true_statistics(case: Case) -> Tensor:
    """[R, 12] by definition in fp64, without a shift; one side masked is not provided for."""
    size = case.vocab_size or case.student.shape[1]
    raw_t, raw_s = case.teacher[:, :size].double(), case.student[:, :size].double()
    raw_s = raw_s + raw_t if case.delta else raw_s

    def scaled(raw: Tensor, bias: Tensor | None) -> Tensor:
        z = (raw if bias is None else raw + bias[:size].double()) * case.logit_scale
        z = case.softcap * torch.tanh(z / case.softcap) if case.softcap else z
        return z * case.inv_temperature

    z_t, z_s = scaled(raw_t, case.teacher_bias), scaled(raw_s, case.student_bias)
    gap = z_s - z_t
    max_t, max_s = z_t.amax(-1), z_s.amax(-1)
    e_t, e_s = (z_t - max_t[:, None]).exp(), (z_s - max_s[:, None]).exp()
    result = torch.zeros(len(z_t), 12, dtype=torch.float64)
    result[:, phases.MAX_T], result[:, phases.SUM_T] = max_t, e_t.sum(-1)
    result[:, phases.MAX_S], result[:, phases.SUM_S] = max_s, e_s.sum(-1)
    result[:, phases.GROWTH] = (e_t * torch.expm1(gap)).sum(-1)
    result[:, phases.MEAN] = (e_s * gap).sum(-1)
    result[:, phases.TOP_T], result[:, phases.TOP_S] = z_t.argmax(-1), z_s.argmax(-1)
    if case.target_ids is not None:
        ids = case.target_ids[:, None]
        for column, values in ((phases.TARGET_T, z_t), (phases.TARGET_GAP, gap)):
            result[:, column] = values.gather(1, ids.clamp(min=0)).where(ids >= 0, 0.0)[:, 0]
    return result


def phased_rows(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor | None,
    *,
    cuts: tuple[int, ...] = (100, 230),
    fused: bool = False,
    config: RowConfig = SMALL_BLOCKS,
    divergence: int,
    beta: float,
    delta: bool,
    target_ids: Tensor | None,
    row_weights: Tensor,
    old_logprobs: Tensor | None,
    is_clip: float,
    vocab_size: int,
    with_stats: bool,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    **scales: float,
) -> Tensor:
    """`rows.divergence_rows` by phases, with the columns cut before those in `cuts`."""
    columns = student.shape[1]
    edges = [0, *(cut for cut in cuts if cut < columns), columns]
    chunks: list[tuple[slice, Tensor, Tensor, dict[str, Any]]] = []
    for begin, end in pairwise(edges):
        part = slice(begin, end)
        biases = (
            on_device(None if bias is None else bias[part].contiguous())
            for bias in (student_bias, teacher_bias)
        )
        scaling = Scaling(
            scales["inv_temperature"], scales["softcap"], scales["logit_scale"], *biases
        )
        options = {
            "delta": delta,
            "scaling": scaling,
            "first_column": begin,
            "vocab_size": vocab_size,
            "config": config,
        }
        chunks.append((part, student[:, part].to(DEVICE), teacher[:, part].to(DEVICE), options))
    ids = on_device(target_ids)
    statistics = merge_statistics(
        torch.stack([row_statistics(s, t, target_ids=ids, **o) for _, s, t, o in chunks])
    )
    stats = student.new_zeros(len(student), 8, dtype=torch.float32)
    result = statistics.double().cpu()
    stats[:, 1] = 1.0
    if target_ids is not None:
        offset, _ = offsets(result)
        log_t = result[:, phases.TARGET_T] - result[:, phases.MAX_T]
        log_t = log_t - result[:, phases.SUM_T].log()
        has = target_ids >= 0
        stats[:, 3] = log_t.where(has, 0.0)
        stats[:, 2] = (log_t + result[:, phases.TARGET_GAP] - offset).where(has, 0.0)
        if old_logprobs is not None:
            ratio = (stats[:, 2] - old_logprobs).exp()
            stats[:, 1] = (ratio.clamp(max=is_clip) if is_clip else ratio).where(has, 1.0)
    scale = (row_weights * stats[:, 1]).to(DEVICE)
    objective: dict[str, Any] = {"divergence": divergence, "beta": beta}
    # A gradient that shares an input's memory does so here too.
    places = [None if grad is None else grad[:, part].to(DEVICE) for part, *_ in chunks]
    if grad is not None and grad.data_ptr() in (student.data_ptr(), teacher.data_ptr()):
        which = 1 if grad.data_ptr() == student.data_ptr() else 2
        places = [chunk[which] for chunk in chunks]
    if fused:
        values = sum(
            row_values_and_gradient(
                s, t, place, statistics, scale, divergence=divergence, with_stats=with_stats, **o
            )
            for (_, s, t, o), place in zip(chunks, places, strict=True)
        )
    else:
        values = sum(
            row_values(s, t, statistics, with_stats=with_stats, **objective, **o)
            for _, s, t, o in chunks
        )
        for (_, s, t, o), place in zip(chunks, places, strict=True):
            if place is not None:
                row_gradient(s, t, place, statistics, values, scale, **objective, **o)
    for (part, *_), place in zip(chunks, places, strict=True):
        if place is not None:
            grad[:, part] = place.cpu()
    values = values.cpu()
    stats[:, 0] = values[:, phases.DIVERGENCE]
    if with_stats:
        stats[:, 4], stats[:, 5] = values[:, phases.ENTROPY_S], values[:, phases.ENTROPY_T]
        stats[:, 6] = (result[:, phases.TOP_T] == result[:, phases.TOP_S]).float()
    return stats
