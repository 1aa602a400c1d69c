"""The fused design: one GEMM kernel for both sides of a chunk, whose epilogue sums up its rows.

In the chunk loop the logits of a chunk are products of the library, and a row kernel then reads
them once for the sums over the vocabulary before it can use them. Here a Triton GEMM
(`triton/dual_gemm.py`) keeps teacher logits and delta in two accumulators that share every tile of
the head, sums up its tile in the epilogue, and stores teacher logits in fp32 and delta in fp16. The
rest is one sweep for both KLs, two for the JSD (`triton/phases.py`).

Delta takes fp16, not the inputs' type: 11 bits of it keep gradients within 0.3 % of fp64 for any
divergence, 8 do not (docs/loss.md). The gradient overwrites it. Rows too far for a 16-bit h_s - h_t
are subtracted in the accumulators, in fp32.

Heads of their own have both logits stored in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hero_kernels import backends, gemm, phases
from hero_kernels.chunked import Head, LogitChunk, difference_operand
from hero_kernels.options import Divergence, Objective, Support
from hero_kernels.scaled_logits import Scaling
from hero_kernels.vocab_parallel import finished, phase_arguments, row_scales

if TYPE_CHECKING:
    from hero_kernels.divergence_loop import RowTensors

DELTA_TYPE = torch.float16


def refusal(impl: str, request: backends.Request, vocab_size: int) -> str | None:
    """Why the fused design cannot serve a call, or None if it can.

    Args:
        impl: as the caller named it; "auto" and "triton" are this design's.
        request: of the call.
        vocab_size: columns of the head.
    """
    if impl not in ("auto", "triton"):
        return f"its kernels are written in Triton, not those of impl={impl!r}"
    if request.support != Support.FULL or request.clips:
        return "it has support='full' without pointwise_clip only"
    if reason := backends.refusal("triton", request):
        return reason
    from hero_kernels.triton import dual_gemm

    capability = torch.cuda.get_device_capability(request.device)
    return dual_gemm.refusal(capability, request.dtype, vocab_size)


def logits_into(
    student: Head,
    teacher: Head,
    student_out: Tensor,
    teacher_out: Tensor,
    objective: Objective,
    target_ids: Tensor | None,
) -> Tensor:
    """Logits and statistics of a chunk.

    Args:
        student: R rows; the weight [V, H] cut to the real columns, biases [V] fp32.
        teacher: the same rows; with the student's weight itself the head is shared.
        student_out: [R, V] receives delta for a shared head, else raw logits.
        teacher_out: [R, V] fp32 receives raw logits.
        objective: scaling, for the statistics.
        target_ids: [R] int64 or None.

    Returns:
        [R, 12] statistics, see phases.py.
    """
    from hero_kernels.triton import dual_gemm

    scaling = phase_arguments(objective, student.bias, teacher.bias, True, 0)["scaling"]
    common: dict[str, Any] = {"scaling": scaling, "target_ids": target_ids}
    common["vocab_size"] = objective.vocab_size
    if teacher.weight is not student.weight:
        return dual_gemm.pair_logits(
            gemm.rows_of(student.hidden),
            student.weight,
            gemm.rows_of(teacher.hidden),
            teacher.weight,
            student_out,
            teacher_out,
            **common,
        )
    operand, absolute_rows = difference_operand(student.hidden, teacher.hidden)
    return dual_gemm.dual_logits(
        gemm.rows_of(teacher.hidden),
        gemm.rows_of(operand),
        student.weight,
        teacher_out,
        student_out,
        absolute_rows=absolute_rows,
        **common,
    )


def divergence_from_statistics(
    chunk: LogitChunk,
    row_tensors: RowTensors,
    objective: Objective,
    delta: bool,
    with_stats: bool,
) -> Tensor:
    """What a row kernel does, for a chunk whose rows have been summed up.

    Args:
        chunk: R rows of logits, with statistics.
        row_tensors: of the same rows.
        objective: what to compute.
        delta: whether the student's logits are a difference.
        with_stats: compute entropies and agreement.

    Returns:
        [R, 8] statistics as of a row kernel; `chunk.grad` is filled.
    """
    from hero_kernels.triton import phases as kernels

    assert chunk.teacher is not None and chunk.statistics is not None
    student, teacher, statistics = chunk.student, chunk.teacher, chunk.statistics
    common = phase_arguments(objective, chunk.student_bias, chunk.teacher_bias, delta, 0)
    kind: dict[str, Any] = {"divergence": objective.divergence}
    if chunk.grad is not None and objective.divergence != Divergence.JSD.code:
        # The importance ratio follows from the statistics alone.
        nothing = statistics.new_zeros(len(statistics), phases.NUM_VALUES)
        ratios = finished(statistics, nothing, row_tensors, objective, with_stats)
        scales = row_scales(row_tensors.weights, ratios)
        values = kernels.row_values_and_gradient(
            student,
            teacher,
            chunk.grad,
            statistics,
            scales,
            with_stats=with_stats,
            **kind,
            **common,
        )
        return finished(statistics, values, row_tensors, objective, with_stats)
    kind["beta"] = objective.beta
    values = kernels.row_values(
        student, teacher, statistics, with_stats=with_stats, **kind, **common
    )
    stats = finished(statistics, values, row_tensors, objective, with_stats)
    if chunk.grad is not None:
        scales = row_scales(row_tensors.weights, stats)
        kernels.row_gradient(
            student, teacher, chunk.grad, statistics, values, scales, **kind, **common
        )
    return stats


def logprob_stats(
    hidden: Tensor,
    weight: Tensor,
    scaling: Scaling,
    target_ids: Tensor,
    vocab_size: int,
    with_entropy: bool,
) -> Tensor:
    """[R, 4] as `logprob_rows.logprob_rows` returns them, without logits in memory.

    Args:
        hidden: [R, H] bf16 or fp16.
        weight: [V, H] of the same type.
        scaling: its `student_bias` [V] fp32 or None.
        target_ids: [R] int64, -1 for none.
        vocab_size: V.
        with_entropy: fill the entropies.
    """
    from hero_kernels.triton import dual_gemm

    sums = dual_gemm.linear_statistics(
        hidden, weight, scaling=scaling, target_ids=target_ids, vocab_size=vocab_size
    )
    log_mass = sums[:, phases.SUM_T].log()
    target = sums[:, phases.TARGET_T] - sums[:, phases.MAX_T] - log_mass
    entropy = log_mass - sums[:, phases.ENERGY] / sums[:, phases.SUM_T]
    return torch.stack(
        [
            target.where(target_ids >= 0, 0.0),
            entropy if with_entropy else torch.zeros_like(entropy),
            sums[:, phases.MAX_T],
            log_mass,
        ],
        1,
    )
