"""Compiles the dual GEMM and the phases for GPUs this machine need not have.

What ptxas made of them: no spills, shared memory that fits, tensor-core instructions, and on
Hopper loads by the tensor memory accelerator. test_triton_gemm.py and test_triton_phases.py test
that they compute the right thing; how fast they are, none of these does.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from triton_tools import SHARED_MEMORY_PER_BLOCK, compile_kernel

from hero_kernels.triton.configs import GEMMS, ROWS, STATISTICS, gemm_entry
from hero_kernels.triton.dual_gemm_kernel import ONE_SIDE, OWN_HEADS, SHARED_HEAD, dual_gemm_kernel
from hero_kernels.triton.phase_kernels import divergence_kernel, statistics_kernel
from hero_kernels.triton.statistics import _merge_kernel

MODES = {
    "shared": SHARED_HEAD.value,
    "own": OWN_HEADS.value,
    "one": ONE_SIDE.value,
}
MULTIPLY = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
SCALARS = dict.fromkeys(("inv_temperature", "softcap", "logit_scale"), "fp32")
FEATURES = ("HAS_STUDENT_BIAS", "HAS_TEACHER_BIAS", "HAS_SOFTCAP")


def configurations() -> list[Any]:
    return [
        pytest.param(arch, path, mode, id=f"{arch}-{path}-{mode}")
        for arch, entry in GEMMS.items()
        for path, configs in zip(entry._fields, entry, strict=True)
        for mode in (MODES if configs is not None else ())
    ]


def compile_gemm(
    arch: int, path: str, mode: str, *, plain: bool, write: bool, ones: tuple[str, ...] = ()
) -> Any:
    config = getattr(GEMMS[arch], path)[MODES[mode]]
    integer = "i32" if path == "unaligned" else "i32:16"
    sizes = (
        *("student_size", "teacher_size"),
        *("stride_sh", "stride_sw", "stride_th", "stride_tw"),
    )
    types = {
        **dict.fromkeys(("rows", "vocab_size", "stride_so", "stride_to"), "i32"),
        **dict.fromkeys(("columns", "stride_pp", "stride_pc"), "i32"),
        **dict.fromkeys(("student_bias_ptr", "teacher_bias_ptr", "parts_ptr"), "*fp32"),
        **dict.fromkeys(sizes, integer),
        **SCALARS,
        "target_ids_ptr": "*i64",
        "absolute_rows_ptr": "*i1",
        "teacher_out_ptr": "*fp32",
        "student_out_ptr": "*fp16" if mode == "shared" else "*fp32",
    }
    if plain:  # the layout that callers are asked for: rows padded to a multiple of 16
        types |= {"stride_so": "i32:16", "stride_to": "i32:16", "columns": "i32:16"}
    for side in ("student", "teacher"):
        for name, rows in (("hidden", config.block_t), ("weight", config.block_v)):
            kind = f"tensordesc<bf16[{rows},{config.block_k}]>"
            types[f"{side}_{name}"] = kind if path == "descriptors" else "*bf16"
    constants: dict[str, Any] = {
        **dict.fromkeys(FEATURES, not plain),
        "MODE": MODES[mode],
        "DESCRIPTORS": path == "descriptors",
        "WRITE_LOGITS": write and mode != "one",
        "HAS_TARGETS": True,
        "HAS_ABSOLUTE": mode == "shared",
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_K": config.block_k,
        "GROUP_T": config.group_t,
        "SLICES": config.slices,
    }
    for name in ones:
        types.pop(name)
        constants[name] = 1
    return compile_kernel(
        dual_gemm_kernel,
        types,
        constants,
        arch=arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def check_gemm(compiled: Any, arch: int, path: str) -> None:
    print(f"sm_{arch} {path}: {compiled.registers} registers, {compiled.shared} bytes shared")
    assert compiled.spills == 0
    limit = SHARED_MEMORY_PER_BLOCK[arch]
    if arch == 80:
        limit = 99 * 1024  # of 8.6 and 8.9, which have the same entry
    assert compiled.shared <= limit
    assert MULTIPLY[arch] in compiled.mnemonics
    assert ("UTMALDG" in compiled.mnemonics) == (path == "descriptors")
    if path == "aligned":
        assert "LDGSTS" in compiled.mnemonics  # asynchronous copies: the loop is a pipeline
    assert not compiled.mnemonics & {"RED", "REDG", "ATOM", "ATOMG"}  # deterministic


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "path", "mode"), configurations())
def test_every_gemm_with_all_features(arch: int, path: str, mode: str) -> None:
    """And with outputs whose rows are not aligned, which takes the most registers."""
    check_gemm(compile_gemm(arch, path, mode, plain=False, write=True), arch, path)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("arch", "path"), [(80, "aligned"), (90, "descriptors"), (100, "descriptors")]
)
def test_the_usual_gemms(arch: int, path: str, mode: str) -> None:
    compiled = compile_gemm(arch, path, mode, plain=True, write=True)
    check_gemm(compiled, arch, path)
    if mode != "one":
        assert compiled.stores.get(128, 0) >= 4  # logits leave 16 bytes at a time


def test_a_single_row() -> None:
    """A launch makes constants of integers that are 1, which the compiler treats otherwise."""
    ones = ("rows", "vocab_size", "stride_pc", "student_size", "teacher_size")
    check_gemm(
        compile_gemm(80, "unaligned", "own", plain=True, write=True, ones=ones), 80, "unaligned"
    )
    types = {
        **dict.fromkeys(("parts_ptr", "statistics_ptr"), "*fp32"),
        **dict.fromkeys(("stride_pp", "stride_pc"), "i32"),
    }
    constants = {"ONE_SIDE": False, "BLOCK_P": 1, "BLOCK_R": 8, "parts": 1, "rows": 1}
    constants["stride_pr"] = 1
    compile_kernel(_merge_kernel, types, constants, arch=80, num_warps=4)


def test_statistics_alone() -> None:
    compiled = compile_gemm(90, "descriptors", "shared", plain=True, write=False)
    check_gemm(compiled, 90, "descriptors")
    assert 128 not in compiled.stores


SHAPES = {"rows": "i32", "columns": "i32:16", "vocab_size": "i32", "piece": "i32:16"}
STRIDES = dict.fromkeys(("stride_sr", "stride_tr", "stride_gr"), "i32:16")
VECTORS = dict.fromkeys(("student_bias_ptr", "teacher_bias_ptr"), "*fp32")


@pytest.mark.parametrize("delta", [True, False], ids=["shared", "general-all-features"])
@pytest.mark.parametrize("arch", sorted(ROWS))
def test_statistics_sweep(arch: int, delta: bool) -> None:
    config = STATISTICS[arch]
    types = {
        **SHAPES,
        **STRIDES,
        **VECTORS,
        **SCALARS,
        "student_ptr": "*bf16" if delta else "*fp32",
        "teacher_ptr": "*fp32",
        "target_ids_ptr": "*i64",
        "parts_ptr": "*fp32",
        "first_column": "i32:16",
    }
    for name in ("stride_gr", "rows", "first_column"):  # the last two of a launch with both 1
        del types[name]
    constants: dict[str, Any] = {
        "rows": 1,
        "first_column": 1,
        "DELTA": delta,
        "HAS_TARGETS": True,
        "BLOCK_V": config.block_v,
    }
    constants |= dict.fromkeys(FEATURES, not delta)
    compiled = compile_kernel(
        statistics_kernel, types, constants, arch=arch, num_warps=config.num_warps
    )
    assert compiled.spills == 0
    assert compiled.warps_per_sm >= 16
    assert compiled.loads.get(128, 0) >= 2  # 4 columns a thread: of the teacher, of bf16 64 bits
    assert compiled.loads.get(64, 0) >= (2 if delta else 0)


@pytest.mark.parametrize(
    ("divergence", "values", "grad"),
    [(0, True, False), (0, False, True), (1, True, True), (2, True, True)],
    ids=["jsd-values", "jsd-gradient", "forward-both", "reverse-both"],
)
@pytest.mark.parametrize("arch", sorted(ROWS))
def test_divergence_sweep(arch: int, divergence: int, values: bool, grad: bool) -> None:
    config = ROWS[arch]
    types = {
        **SHAPES,
        **STRIDES,
        **VECTORS,
        **SCALARS,
        "student_ptr": "*bf16",
        "teacher_ptr": "*fp32",
        "grad_ptr": "*bf16",
        "statistics_ptr": "*fp32",
        "values_ptr": "*fp32",
        "row_scale_ptr": "*fp32",
        "beta": "fp32",
    }
    del types["rows"]  # of a single row, a constant
    constants: dict[str, Any] = {
        "rows": 1,
        **dict.fromkeys(FEATURES, False),
        "DELTA": True,
        "DIVERGENCE": divergence,
        "WITH_VALUES": values,
        "WITH_GRAD": grad,
        "WITH_STATS": values,
        "BLOCK_V": config.block_v,
    }
    compiled = compile_kernel(
        divergence_kernel, types, constants, arch=arch, num_warps=config.num_warps
    )
    assert compiled.spills == 0
    assert compiled.warps_per_sm >= 16
    # Shared memory for reductions only: no value moves between threads from its load to its
    # store, which is what makes the gradient in place safe.
    assert compiled.shared <= 64 * config.num_warps
    eight = config.block_v == 256 * config.num_warps  # columns a thread, else four
    assert compiled.loads.get(128, 0) >= (3 if eight else 1)
    assert not grad or compiled.stores.get(128 if eight else 64, 0) >= 1


@pytest.mark.parametrize("arch", sorted(ROWS))
def test_merge(arch: int) -> None:
    types = {
        **dict.fromkeys(("parts_ptr", "statistics_ptr"), "*fp32"),
        **dict.fromkeys(("parts", "rows", "stride_pp", "stride_pr", "stride_pc"), "i32"),
    }
    constants = {"ONE_SIDE": True, "BLOCK_P": 64, "BLOCK_R": 8}
    compiled = compile_kernel(_merge_kernel, types, constants, arch=arch, num_warps=4)
    assert compiled.spills == 0
    assert not compiled.mnemonics & {"RED", "REDG", "ATOM", "ATOMG"}


def test_devices_between_the_entries() -> None:
    assert gemm_entry((8, 9)) == GEMMS[80]
    assert gemm_entry((10, 3)) == GEMMS[100]
    assert gemm_entry((12, 1)).descriptors is None
    with pytest.raises(ValueError, match=r"8\.0 or newer, got 7\.5"):
        gemm_entry((7, 5))
