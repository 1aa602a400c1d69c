"""Compiles the Triton kernels for GPUs this machine need not have; reads what ptxas made of them.

For every entry of the tuning tables: no spills, registers that let enough warps run, shared memory
that fits, wide loads and stores; of the GEMM tensor-core instructions, and on Hopper loads by the
tensor memory accelerator. test_triton_cases.py tests that kernels compute the right thing; how fast
they are, neither does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_tools import SHARED_MEMORY_PER_BLOCK, Compiled, compile_kernel

from hero_kernels.constants import DIVERGENCE_CODES
from hero_kernels.triton.configs import GEMMS, LOGPROBS, ROWS, STATISTICS, newest, row_config
from hero_kernels.triton.fused_kernel import ONE_SIDE, OWN_HEADS, SHARED_HEAD, fused_kernel
from hero_kernels.triton.logprobs import logprob_gradient_kernel, logprob_rows_kernel
from hero_kernels.triton.row_kernels import divergence_kernel, statistics_kernel
from hero_kernels.triton.statistics import _merge_kernel

ARCHES = pytest.mark.parametrize("arch", sorted(ROWS))
FULL = pytest.mark.parametrize("full", [False, True], ids=["plain", "all-features"])
# The usual call on CUDA: bf16 differences, fp32 teacher, a bf16 gradient in place of the former. A
# vocabulary of odd size in a padded row: the loads must be wide all the same.
SOURCE = {
    "student_ptr": "*bf16",
    "teacher_ptr": "*fp32",
    "columns": "i32:16",
    "num_real": "i32",
    "piece": "i32:16",
    "stride_sr": "i32:16",
    "stride_tr": "i32:16",
    "inv_temperature": "fp32",
    "logit_scale": "fp32",
}
OPTIONAL = {
    "student_bias_ptr": "*fp32",
    "teacher_bias_ptr": "*fp32",
    "absolute_rows_ptr": "*i1",
    "temperatures_ptr": "*fp32",
    "softcap": "fp32",
}
ATOMICS = {"RED", "REDG", "ATOM", "ATOMG"}


def compile_rows(
    kernel: Any, arch: int, config: Any, full: bool, types: dict[str, str], **constants: Any
) -> Compiled:
    """With or without all that a tile may have."""
    types = {**SOURCE, **types, **(OPTIONAL if full else {})}
    constants |= {"BLOCK_V": config.block_v, "DELTA": True}
    constants |= {name: None for name in OPTIONAL if not full}
    constants |= {"rows": 1}  # of a single row, a launch makes a constant
    compiled = compile_kernel(kernel, types, constants, arch=arch, num_warps=config.num_warps)
    print(f"sm_{arch}: {compiled}, {compiled.warps_per_sm} warps per multiprocessor")
    assert compiled.spills == 0
    assert compiled.warps_per_sm >= 16
    assert not compiled.mnemonics & ATOMICS  # deterministic
    # Shared memory for reductions only: no value moves between threads from its load to its
    # store, which is what makes the gradient in place safe.
    assert compiled.shared <= 64 * config.num_warps
    return compiled


@FULL
@ARCHES
def test_statistics_sweep(arch: int, full: bool) -> None:
    config = STATISTICS[arch]
    types = {"target_ids_ptr": "*i64", "parts_ptr": "*fp32", "first_column": "i32:16"}
    compiled = compile_rows(statistics_kernel, arch, config, full, types)
    assert compiled.loads.get(128, 0) >= 2  # 4 columns a thread: of the teacher, of bf16 64 bits
    assert compiled.loads.get(64, 0) >= 2


@pytest.mark.parametrize(
    ("divergence", "values", "grad"),
    [
        pytest.param("jsd", True, False, id="jsd-values"),
        pytest.param("jsd", False, True, id="jsd-gradient"),
        pytest.param("forward_kl", True, True, id="forward-both"),
        pytest.param("reverse_kl", True, True, id="reverse-both"),
    ],
)
@FULL
@ARCHES
def test_divergence_sweep(arch: int, full: bool, divergence: str, values: bool, grad: bool) -> None:
    config = ROWS[arch]
    types = {**dict.fromkeys(("statistics_ptr", "values_ptr"), "*fp32"), "stride_gr": "i32:16"}
    types |= dict.fromkeys(("beta", "other_beta"), "fp32")
    gradient = {"grad_ptr": "*bf16", "row_scale_ptr": "*fp32"}
    constants: dict[str, Any] = {} if grad else dict.fromkeys(gradient)
    types |= gradient if grad else {}
    compiled = compile_rows(
        divergence_kernel, arch, config, full, types, **constants,
        DIVERGENCE=DIVERGENCE_CODES[divergence], WITH_VALUES=values, WITH_STATS=values,
    )  # fmt: skip
    eight = config.block_v == 256 * config.num_warps  # columns a thread, else four
    assert compiled.loads.get(128, 0) >= (3 if eight else 1)
    assert not grad or compiled.stores.get(128 if eight else 64, 0) >= 1
    # Statistics, flag, temperature and scale: single numbers.
    narrow = {bits: count for bits, count in compiled.loads.items() if bits < 64}
    assert sum(narrow.values()) <= 11


@pytest.mark.parametrize("one_side", [False, True])
@ARCHES
def test_merge(arch: int, one_side: bool) -> None:
    types = {
        **dict.fromkeys(("parts_ptr", "statistics_ptr"), "*fp32"),
        **dict.fromkeys(("parts", "rows", "stride_pp", "stride_pr", "stride_pc"), "i32"),
    }
    constants = {"ONE_SIDE": one_side, "BLOCK_P": 32, "BLOCK_R": 8}
    compiled = compile_kernel(_merge_kernel, types, constants, arch=arch, num_warps=4)
    assert compiled.spills == 0 and not compiled.mnemonics & ATOMICS
    # A launch makes constants of integers that are 1, which the compiler treats otherwise.
    constants |= {"BLOCK_P": 1, "parts": 1, "rows": 1, "stride_pr": 1}
    types = {name: kind for name, kind in types.items() if name not in constants}
    compile_kernel(_merge_kernel, types, constants, arch=arch, num_warps=4)


@pytest.mark.parametrize("gradient", [False, True], ids=["statistics", "gradient"])
@FULL
@ARCHES
def test_logprob_kernels(arch: int, full: bool, gradient: bool) -> None:
    """On fp32 logits, with a bf16 gradient: what the tile loop holds on CUDA."""
    config = LOGPROBS[arch]
    types = {
        **dict.fromkeys(("logits_ptr", "stats_ptr"), "*fp32"),
        "target_ids_ptr": "*i64",
        **{"columns": "i32:16", "num_real": "i32", "stride_lr": "i32:16"},
        **dict.fromkeys(("inv_temperature", "logit_scale"), "fp32"),
    }
    constants: dict[str, Any] = {"BLOCK_V": config.block_v, "bias_ptr": None, "softcap": None}
    if full:
        constants = {"BLOCK_V": config.block_v}
        types |= {"bias_ptr": "*fp32", "softcap": "fp32"}
    if gradient:
        types |= {"grad_ptr": "*bf16", "upstream_ptr": "*fp32", "stride_gr": "i32:16"}
    else:
        constants["WITH_ENTROPY"] = full
    kernel = logprob_gradient_kernel if gradient else logprob_rows_kernel
    compiled = compile_kernel(kernel, types, constants, arch=arch, num_warps=config.num_warps)
    print(f"sm_{arch}: {compiled}, {compiled.warps_per_sm} warps per multiprocessor")
    assert compiled.spills == 0
    assert compiled.shared <= (0 if gradient else 64 * config.num_warps)
    assert compiled.warps_per_sm >= 24
    assert compiled.loads.get(128, 0) >= 2  # 8 columns a thread
    assert compiled.stores.get(128, 0) >= gradient
    # The target's id and logit, the statistics, the upstream pair: single numbers.
    assert sum(n for bits, n in compiled.loads.items() if bits < 128) <= 6


MODES = {"shared": SHARED_HEAD.value, "own": OWN_HEADS.value, "one": ONE_SIDE.value}
MULTIPLY = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def compile_gemm(arch: int, path: str, mode: str, *, full: bool, **ones: int) -> Compiled:
    config = getattr(GEMMS[arch], path)[MODES[mode]]
    integer = "i32" if path == "unaligned" else "i32:16"
    of_out = "i32" if full else "i32:16"  # in the usual tile rows are padded to a multiple of 16
    types = {
        **dict.fromkeys(("student_size", "teacher_size"), integer),
        **dict.fromkeys(("stride_sh", "stride_sw", "stride_th", "stride_tw"), integer),
        **dict.fromkeys(("columns", "stride_so", "stride_to"), of_out),
        **dict.fromkeys(("rows", "stride_pp", "stride_pc"), "i32"),
        **dict.fromkeys(("inv_temperature", "logit_scale"), "fp32"),
        **{"target_ids_ptr": "*i64", "parts_ptr": "*fp32"},
    }
    for side in ("student", "teacher"):
        for name, rows in (("hidden", config.block_t), ("weight", config.block_v)):
            kind = f"tensordesc<bf16[{rows},{config.block_k}]>"
            types[f"{side}_{name}"] = kind if path == "descriptors" else "*bf16"
    constants: dict[str, Any] = {
        "MODE": MODES[mode],
        "DESCRIPTORS": path == "descriptors",
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_K": config.block_k,
    }
    optional = {"teacher_bias_ptr": "*fp32", "temperatures_ptr": "*fp32", "softcap": "fp32"}
    if mode != "one":
        types |= {"student_out_ptr": "*fp16" if mode == "shared" else "*fp32"}
        types |= {"teacher_out_ptr": "*fp32"}
        optional |= {"student_bias_ptr": "*fp32"}
    if mode == "shared":
        types |= {"absolute_rows_ptr": "*i1"}
    types |= optional if full else {}
    absent = set(fused_kernel.arg_names) - set(types) - set(constants)
    constants |= {**dict.fromkeys(absent), **ones}
    types = {name: kind for name, kind in types.items() if name not in ones}
    compiled = compile_kernel(
        fused_kernel,
        types,
        constants,
        arch=arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    print(f"sm_{arch} {path}: {compiled.registers} registers, {compiled.shared} bytes shared")
    assert compiled.spills == 0
    # The entry of 8.0 serves 8.6 and 8.9 too.
    assert compiled.shared <= (99 * 1024 if arch == 80 else SHARED_MEMORY_PER_BLOCK[arch])
    assert MULTIPLY[arch] in compiled.mnemonics
    assert ("UTMALDG" in compiled.mnemonics) == (path == "descriptors")
    if path == "aligned":
        assert "LDGSTS" in compiled.mnemonics  # asynchronous copies: the loop is a pipeline
    assert not compiled.mnemonics & ATOMICS
    return compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "path", "mode"),
    [
        pytest.param(arch, path, mode, id=f"{arch}-{path}-{mode}")
        for arch, entry in GEMMS.items()
        for path, configs in zip(entry._fields, entry, strict=True)
        for mode in (MODES if configs is not None else ())
    ],
)
def test_every_gemm_with_all_features(arch: int, path: str, mode: str) -> None:
    """And with outputs whose rows are not aligned, which takes the most registers."""
    compile_gemm(arch, path, mode, full=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("arch", "path"), [(80, "aligned"), (90, "descriptors"), (100, "descriptors")]
)
def test_the_usual_gemms(arch: int, path: str, mode: str) -> None:
    compiled = compile_gemm(arch, path, mode, full=False)
    if mode == "one":
        assert 128 not in compiled.stores  # statistics alone
    else:
        assert compiled.stores.get(128, 0) >= 4  # logits leave 16 bytes at a time


def test_the_gemm_of_a_single_row() -> None:
    """A launch makes constants of integers that are 1."""
    ones = dict.fromkeys(("rows", "stride_pc", "student_size", "teacher_size"), 1)
    compile_gemm(80, "unaligned", "own", full=False, **ones)


def test_devices_between_the_entries() -> None:
    kinds = ((8, 9), (10, 3), (12, 1))
    assert [newest(GEMMS, kind, "GEMM") for kind in kinds] == [80, 100, 120]
    assert newest(ROWS, (12, 0), "row kernel") == 100
    assert row_config(torch.device("cpu"), ROWS).block_v == 128  # the interpreter's
    with pytest.raises(ValueError, match=r"8\.0 or newer, got 7\.5"):
        newest(ROWS, (7, 5), "row kernel")
