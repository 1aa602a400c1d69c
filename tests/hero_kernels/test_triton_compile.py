"""Compiles the Triton row kernels for GPUs this machine need not have; reads what ptxas made of it.

Bounds on registers, spills, shared memory and the width of loads hold for every entry of the tuning
table. test_triton_rows.py tests that it computes the right thing; how fast it is, neither does.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from triton_tools import SHARED_MEMORY_PER_BLOCK, compile_kernel

from hero_kernels.triton.configs import LOGPROBS, ROWS, row_config
from hero_kernels.triton.logprobs import _logprob_gradient_kernel, _logprob_rows_kernel
from hero_kernels.triton.rows import _divergence_rows_kernel

SCALARS = ("beta", "inv_temperature", "softcap", "logit_scale", "is_clip")
# A vocabulary of odd size in a padded row: the loads must be wide all the same.
SHAPES = {"columns": "i32:16", "vocab_size": "i32"}
STRIDES = dict.fromkeys(("stride_sr", "stride_tr", "stride_gr"), "i32:16")
VECTORS = {
    **dict.fromkeys(("student_bias_ptr", "teacher_bias_ptr", "row_weights_ptr"), "*fp32"),
    "target_ids_ptr": "*i64",
    "old_logprobs_ptr": "*fp32",
    "absolute_rows_ptr": "*i1",
    "stats_ptr": "*fp32",
}
FLAGS = (
    *("HAS_STUDENT_BIAS", "HAS_TEACHER_BIAS", "HAS_SOFTCAP", "HAS_TARGETS"),
    *("HAS_RATIO", "HAS_CLIP", "WITH_STATS"),
)
# The shared-head path in mixed storage, and the general path with all that a kernel can have.
SHARED_HEAD = ("*bf16", "*fp32", "*bf16")
GENERAL = ("*fp32", "*fp32", "*fp32")
VARIANTS = [
    pytest.param(0, True, SHARED_HEAD, id="jsd-shared"),
    pytest.param(1, True, SHARED_HEAD, id="forward-shared"),
    pytest.param(2, True, SHARED_HEAD, id="reverse-shared"),
    pytest.param(0, False, GENERAL, id="jsd-general-all-features"),
]


@pytest.mark.parametrize(("divergence", "delta", "storage"), VARIANTS)
@pytest.mark.parametrize("arch", sorted(ROWS))
def test_every_configuration(
    arch: int, divergence: int, delta: bool, storage: tuple[str, str, str]
) -> None:
    config = ROWS[arch]
    matrices = dict(zip(("student_ptr", "teacher_ptr", "grad_ptr"), storage, strict=True))
    types = {**matrices, **VECTORS, **SHAPES, **STRIDES, **dict.fromkeys(SCALARS, "fp32")}
    constants: dict[str, Any] = dict.fromkeys(FLAGS, not delta)
    constants |= {"DIVERGENCE": divergence, "DELTA": delta, "HAS_GRAD": True}
    constants |= {"BLOCK_V": config.block_v, "HAS_ABSOLUTE": delta}
    compiled = compile_kernel(
        _divergence_rows_kernel, types, constants, arch=arch, num_warps=config.num_warps
    )
    print(f"sm_{arch}: {compiled}, {compiled.warps_per_sm} warps per multiprocessor")
    assert compiled.spills == 0
    assert compiled.shared <= SHARED_MEMORY_PER_BLOCK[arch]
    # Shared memory for reductions only: no value moves between threads from its load to its
    # store, which is what makes the gradient in place safe.
    assert compiled.shared <= 64 * config.num_warps
    assert compiled.warps_per_sm >= (16 if delta else 8)
    sweeps = 3 if divergence == 0 else 2
    if config.block_v == 256 * config.num_warps:  # 8 columns a thread: one of bf16, two of fp32
        assert compiled.loads.get(128, 0) >= 3 * sweeps
        assert compiled.stores.get(128, 0) >= 1
    else:  # 4 columns: 64 bits of bf16, 128 of fp32
        assert config.block_v == 128 * config.num_warps
        assert compiled.loads.get(128, 0) >= (1 if delta else 2) * sweeps
        assert compiled.loads.get(64, 0) >= sweeps * delta
        assert compiled.stores.get(64 if delta else 128, 0) >= 1
    narrow = {bits: count for bits, count in compiled.loads.items() if bits < 128}
    assert sum(narrow.values()) <= 8  # the weight, the flag and the target's: single numbers


@pytest.mark.parametrize("gradient", [False, True], ids=["statistics", "gradient"])
@pytest.mark.parametrize("features", [False, True], ids=["plain", "all-features"])
@pytest.mark.parametrize("arch", sorted(ROWS))
def test_logprob_kernels(arch: int, features: bool, gradient: bool) -> None:
    """On fp32 logits, with a bf16 gradient: what the chunk loop holds on CUDA."""
    config = LOGPROBS[arch]
    types = {
        **dict.fromkeys(("logits_ptr", "bias_ptr", "stats_ptr"), "*fp32"),
        "target_ids_ptr": "*i64",
        **SHAPES,
        "stride_lr": "i32:16",
        **dict.fromkeys(("inv_temperature", "softcap", "logit_scale"), "fp32"),
    }
    flags = ["HAS_BIAS", "HAS_SOFTCAP"]
    if gradient:
        types |= {"grad_ptr": "*bf16", "upstream_ptr": "*fp32", "stride_gr": "i32:16"}
    else:
        flags.append("WITH_ENTROPY")
    compiled = compile_kernel(
        _logprob_gradient_kernel if gradient else _logprob_rows_kernel,
        types,
        {**dict.fromkeys(flags, features), "BLOCK_V": config.block_v},
        arch=arch,
        num_warps=config.num_warps,
    )
    print(f"sm_{arch}: {compiled}, {compiled.warps_per_sm} warps per multiprocessor")
    assert compiled.spills == 0
    assert compiled.shared <= (0 if gradient else 64 * config.num_warps)
    assert compiled.warps_per_sm >= 24
    assert compiled.loads.get(128, 0) >= 2  # 8 columns a thread
    assert compiled.stores.get(128, 0) >= gradient
    # The target's id and logit, the statistics, the upstream pair: single numbers.
    assert sum(n for bits, n in compiled.loads.items() if bits < 128) <= 6


def test_devices_between_the_entries() -> None:
    assert row_config((8, 6)) == ROWS[80]
    assert row_config((12, 0)) == ROWS[100]
    with pytest.raises(ValueError, match=r"8\.0 or newer, got 7\.5"):
        row_config((7, 5))
