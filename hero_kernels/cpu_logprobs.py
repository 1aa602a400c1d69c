"""The log-probability kernels in C++ (csrc/logprob_kernel.cpp), in the library of `cpu.py`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hero_kernels import cpu
from hero_kernels.logprob_rows import LOGPROB_STATS
from hero_kernels.row_arguments import check_logits, check_of_rows, check_targets


class _LogprobsProblem(ctypes.Structure):
    """`LogprobsProblem` of csrc/logprobs_problem.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "grad", "bias")),
        *((name, ctypes.c_void_p) for name in ("target_ids", "upstream", "stats")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "vocab_size")),
        *((name, ctypes.c_int64) for name in ("logits_stride", "grad_stride")),
        *((name, ctypes.c_int32) for name in ("logits_dtype", "grad_dtype")),
        *((name, ctypes.c_int32) for name in ("with_entropy", "num_threads")),
        *((name, ctypes.c_float) for name in ("inv_temperature", "softcap", "logit_scale")),
    )


def available() -> str | None:
    """None if the kernels can run, else the reason why not."""
    return cpu.available()


def logprob_rows(
    logits: Tensor,
    *,
    target_ids: Tensor,
    bias: Tensor | None,
    inv_temperature: float,
    softcap: float,
    logit_scale: float,
    vocab_size: int,
    with_entropy: bool,
) -> Tensor:
    """Log-probability of a token and entropy of each row; as `logprob_rows.logprob_rows`.

    One sweep, one exponential for each logit. Bitwise equal for any number of threads.

    Returns:
        [R, 4] fp32.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel cannot read.
        RuntimeError: the library is not available.
    """
    return _logprob_rows(
        logits,
        target_ids,
        bias,
        inv_temperature,
        softcap,
        logit_scale,
        vocab_size,
        with_entropy,
        instruction_set=-1,
    )


def logprob_gradient(
    logits: Tensor,
    grad: Tensor,
    stats: Tensor,
    upstream: Tensor,
    *,
    target_ids: Tensor,
    bias: Tensor | None,
    inv_temperature: float,
    softcap: float,
    logit_scale: float,
    vocab_size: int,
) -> None:
    """Gradient of each row, in one sweep; as `logprob_rows.logprob_gradient`.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel cannot read.
        RuntimeError: the library is not available.
    """
    _logprob_gradient(
        logits,
        grad,
        stats,
        upstream,
        target_ids,
        bias,
        inv_temperature,
        softcap,
        logit_scale,
        vocab_size,
        instruction_set=-1,
    )


@torch.library.custom_op("hero_kernels::logprob_rows", mutates_args=(), device_types="cpu")
def _logprob_rows(
    logits: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    inv_temperature: float,
    softcap: float,
    logit_scale: float,
    vocab_size: int,
    with_entropy: bool,
    instruction_set: int,
) -> Tensor:
    """The op behind `logprob_rows`; `instruction_set` forces one (-1: the machine's best)."""
    check_logits(logits, None, vocab_size)
    stats = torch.empty((logits.shape[0], LOGPROB_STATS), dtype=torch.float32)
    _call(
        instruction_set,
        logits,
        None,
        stats,
        None,
        target_ids,
        bias,
        inv_temperature,
        softcap,
        logit_scale,
        vocab_size,
        with_entropy,
    )
    return stats


@_logprob_rows.register_fake
def _(logits: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return logits.new_empty((logits.shape[0], LOGPROB_STATS), dtype=torch.float32)


@torch.library.custom_op(
    "hero_kernels::logprob_gradient_", mutates_args=("grad",), device_types="cpu"
)
def _logprob_gradient(
    logits: Tensor,
    grad: Tensor,
    stats: Tensor,
    upstream: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    inv_temperature: float,
    softcap: float,
    logit_scale: float,
    vocab_size: int,
    instruction_set: int,
) -> None:
    """The op behind `logprob_gradient`."""
    check_logits(logits, grad, vocab_size)
    check_of_rows(logits, "stats", stats, LOGPROB_STATS)
    check_of_rows(logits, "upstream", upstream, 2)
    _call(
        instruction_set,
        logits,
        grad,
        stats,
        upstream,
        target_ids,
        bias,
        inv_temperature,
        softcap,
        logit_scale,
        vocab_size,
        True,
    )


def _call(
    instruction_set: int,
    logits: Tensor,
    grad: Tensor | None,
    stats: Tensor,
    upstream: Tensor | None,
    target_ids: Tensor,
    bias: Tensor | None,
    inv_temperature: float,
    softcap: float,
    logit_scale: float,
    vocab_size: int,
    with_entropy: bool,
) -> None:
    assert (grad is None) == (upstream is None), "the gradient needs somewhere to go"
    library = cpu.library()
    check_targets(logits, target_ids, vocab_size)
    rows, columns = logits.shape
    bias = cpu.fp32_bias(bias, columns)  # [V]: a copy costs nothing, and must outlive the call
    problem = _LogprobsProblem(
        logits=logits.data_ptr(),
        grad=cpu.pointer(grad),
        bias=cpu.pointer(bias),
        target_ids=target_ids.data_ptr(),
        upstream=cpu.pointer(upstream),
        stats=stats.data_ptr(),
        rows=rows,
        columns=columns,
        vocab_size=vocab_size,
        logits_stride=logits.stride(0),
        grad_stride=0 if grad is None else grad.stride(0),
        logits_dtype=cpu.DTYPES[logits.dtype],
        grad_dtype=0 if grad is None else cpu.DTYPES[grad.dtype],
        with_entropy=with_entropy,
        num_threads=torch.get_num_threads(),
        inv_temperature=inv_temperature,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    if instruction_set < 0:
        instruction_set = library.hero_instruction_set()
    if library.hero_logprob_rows(ctypes.byref(problem), instruction_set):
        raise RuntimeError(
            f"The C++ log-probability kernel has no instruction set {instruction_set} on this "
            "platform."
        )
