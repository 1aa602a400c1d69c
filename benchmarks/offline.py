"""GPU kernels compiled for devices that this machine need not have, and read back as machine code.

The kernels as the usual call launches them, or with all that a tile may have: what
`benchmarks.gpu_bounds` counts, and what tests/hero_kernels/test_triton_compile.py checks.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hero_kernels.constants import DIVERGENCE_CODES
from hero_kernels.triton.configs import LOGPROBS, ROWS, STATISTICS
from hero_kernels.triton.logprobs import logprob_gradient_kernel, logprob_rows_kernel
from hero_kernels.triton.row_kernels import divergence_kernel, statistics_kernel

REGISTERS_PER_SM = 65536
WARPS_PER_SM = 64
CUDA_SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "divergence_rows.cu"


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    name: str
    """With its modifiers, such as LDG.E.128."""
    target: int | None
    """Where a branch goes."""
    predicated: bool
    """Whether it may do nothing."""


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel."""

    registers: int
    shared: int
    """Bytes for each program."""
    num_warps: int
    code: tuple[Instruction, ...]

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return sum(line.name.startswith(("LDL", "STL")) for line in self.code)

    @property
    def loads(self) -> dict[int, int]:
        """Number of global loads by width in bits."""
        return widths(self.code, "LDG")

    @property
    def stores(self) -> dict[int, int]:
        """Number of global stores by width in bits."""
        return widths(self.code, "STG")

    @property
    def mnemonics(self) -> frozenset[str]:
        """Names of the machine instructions up to the first dot."""
        return frozenset(line.name.split(".")[0] for line in self.code)

    @property
    def warps_per_sm(self) -> int:
        """How many warps fit on one multiprocessor, as far as registers limit them."""
        per_warp = -(-self.registers * 32 // 256) * 256  # allocated in steps of 256
        return min(WARPS_PER_SM, REGISTERS_PER_SM // per_warp // self.num_warps * self.num_warps)

    def __repr__(self) -> str:
        memory = f"loads {self.loads}, stores {self.stores}"
        return f"{self.registers} registers, {self.spills} spills, {self.shared} B shared, {memory}"


def widths(code: tuple[Instruction, ...], mnemonic: str) -> dict[int, int]:
    """How many loads or stores there are, by width in bits."""
    counts: Counter[int] = Counter()
    for line in code:
        if line.name.startswith(mnemonic):
            width = re.search(r"\.(?:U|S)?(8|16|64|128)(?:\.|$)", line.name)
            counts[int(width[1]) if width else 32] += 1
    return dict(counts)


def cuobjdump() -> str:
    """The disassembler beside nvcc, or the one in Triton's wheel; "" if there is neither."""
    spec = find_spec("triton")
    packages = spec.submodule_search_locations if spec else None
    wheel = [str(Path(package) / "backends" / "nvidia" / "bin") for package in packages or ()]
    return next(filter(None, (shutil.which("cuobjdump", path=path) for path in (None, *wheel))), "")


def disassemble(cubin: Path) -> dict[str, tuple[Instruction, ...]]:
    """The machine code of each function."""
    text = _dump("-sass", cubin)
    functions: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            functions[name[1]] = code = []
        found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*);", line)
        if found:
            address, predicate, name, rest = found.groups()
            target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
            where = int(target[1], 16) if target else None
            may = bool(predicate) or name == "BRA.DIV"  # taken by a warp that has diverged
            code.append(Instruction(int(address, 16), name, where, may))
    return {name: tuple(code) for name, code in functions.items()}


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int = 3,
) -> Compiled:
    """Compile a Triton kernel for an architecture that this machine need not have.

    Args:
        kernel: the function under `@triton.jit`.
        types: of the other arguments, such as "*bf16", "i64" or "fp32". A trailing ":16" says that
            the value is a multiple of 16, which a launch finds out itself; pointers always are.
        constants: of the `tl.constexpr` arguments.
        arch: compute capability times 10.
        num_warps: for each program.
        num_stages: of loops with loads that feed products.
    """
    signature = {name: "constexpr" for name in kernel.arg_names}
    signature |= {name: kind.removesuffix(":16") for name, kind in types.items()}
    divisible = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if types.get(name, "").startswith("*") or types.get(name, "").endswith(":16")
    }
    binary = triton.compile(
        ASTSource(kernel, signature, constants, divisible),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        registers = re.search(r"REG:(\d+)", resources := _dump("--dump-resource-usage", cubin))
        assert registers, resources
        [code] = disassemble(cubin).values()
    return Compiled(int(registers[1]), binary.metadata.shared, num_warps, code)


def _dump(option: str, cubin: Path) -> str:
    command = [cuobjdump(), option, cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


# The usual call on CUDA: logits in fp32, a bf16 gradient. A vocabulary of odd size in a padded row:
# the loads must be wide all the same.
SOURCE = {
    "student_ptr": "*fp32",
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


def _rows(kernel: Any, arch: int, config: Any, full: bool, types: dict[str, str], **constants: Any):
    types = {**SOURCE, **types, **(OPTIONAL if full else {})}
    constants |= {"BLOCK_V": config.block_v, "DELTA": True}
    constants |= {name: None for name in OPTIONAL if not full}
    constants |= {"rows": 1}  # of a single row, a launch makes a constant
    return compile_kernel(kernel, types, constants, arch=arch, num_warps=config.num_warps)


def statistics(arch: int, full: bool = False) -> Compiled:
    """The sweep of `row_statistics`."""
    types = {"target_ids_ptr": "*i64", "parts_ptr": "*fp32", "first_column": "i32:16"}
    return _rows(statistics_kernel, arch, STATISTICS[arch], full, types)


def divergence(
    arch: int, name: str, *, values: bool, grad: bool, stats: bool | None = None, full: bool = False
) -> Compiled:
    """The sweep of `row_values` (values), `row_gradient` (grad) or both; `stats` as `values`."""
    types = {**dict.fromkeys(("statistics_ptr", "values_ptr"), "*fp32"), "stride_gr": "i32:16"}
    types |= dict.fromkeys(("beta", "other_beta"), "fp32")
    gradient = {"grad_ptr": "*bf16", "row_scale_ptr": "*fp32"}
    types |= gradient if grad else {}
    return _rows(
        divergence_kernel,
        arch,
        ROWS[arch],
        full,
        types,
        **({} if grad else dict.fromkeys(gradient)),
        DIVERGENCE=DIVERGENCE_CODES[name],
        WITH_VALUES=values,
        WITH_STATS=values if stats is None else stats,
    )


def logprobs(arch: int, *, gradient: bool, full: bool = False) -> Compiled:
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
    return compile_kernel(kernel, types, constants, arch=arch, num_warps=config.num_warps)


@functools.cache
def cuda_rows(arch: str) -> dict[tuple[int, bool, bool], Compiled]:
    """The CUDA row kernels for an architecture such as "90a", by divergence, delta and `leaves`
    (csrc/cuda/row_kernel.h).

    Raises:
        RuntimeError: nvcc failed or had something to warn of.
    """
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "rows.cubin"
        done = subprocess.run(
            [*command, CUDA_SOURCE, "-o", cubin], capture_output=True, text=True, timeout=300
        )
        if done.returncode or "warning" in done.stderr:
            raise RuntimeError(f"{' '.join(map(str, command))} says: {done.stderr}")
        functions = disassemble(cubin)
    pattern = (
        r"Compiling entry function '(\S+ILi(\d)ELb(\d)ELb(\d)E\S+)'.*?Used (\d+) registers([^\n]*)"
    )
    kernels = {}
    for name, code, delta, leaves, registers, rest in re.findall(pattern, done.stderr, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels[int(code), delta == "1", leaves == "1"] = Compiled(
            int(registers), int(shared[1]) if shared else 0, 16, functions[name]
        )
    return kernels
