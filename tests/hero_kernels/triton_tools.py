"""Proofs about Triton kernels without a GPU: offline compilation, and a safer interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
"""Where the triton_*_cases.py run: in the interpreter, or on a GPU."""
REGISTERS_PER_SM = 65536
WARPS_PER_SM = 64
SHARED_MEMORY_PER_BLOCK = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel."""

    registers: int
    spills: int
    """Loads and stores of local memory."""
    shared: int
    """Bytes for each program."""
    loads: dict[int, int]
    """Number of global loads by width in bits."""
    stores: dict[int, int]
    num_warps: int
    mnemonics: frozenset[str]
    """Names of the machine instructions up to the first dot."""

    @property
    def warps_per_sm(self) -> int:
        """How many warps fit on one multiprocessor, as far as registers limit them."""
        per_warp = -(-self.registers * 32 // 256) * 256  # allocated in steps of 256
        return min(WARPS_PER_SM, REGISTERS_PER_SM // per_warp // self.num_warps * self.num_warps)


def to_device(group: Any) -> Any:
    """A named tuple, with its tensors on `DEVICE`."""
    return type(group)(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in group))


def mend_interpreter() -> None:
    """Correct what Triton 3.6's interpreter does with bf16, which it holds as uint16.

    It truncates where a GPU rounds to the nearest, and adds or multiplies the bits: the first is
    put right, the second raises, as a kernel has to convert to fp32 after the load. Products
    of bf16 matrices become those of the numbers they stand for.
    """
    builder = interpreter.InterpreterBuilder
    original_cast, original_binary_op = builder.cast_impl, builder.binary_op
    original_dot = builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return original_cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError(f"{op.__name__} of bf16 numbers: convert them to fp32 after the load")
        return original_binary_op(self, lhs, rhs, op)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return original_dot(self, a, b, total, *options)
        product = np.matmul(*(original_cast(self, side, tl.float32).data for side in (a, b)))
        return interpreter.TensorHandle(product + total.data, tl.float32)

    builder.cast_impl, builder.binary_op, builder.create_dot = cast_impl, binary_op, create_dot


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int = 3,
) -> Compiled:
    """Compile for an architecture that this machine need not have.

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
        resources = _cuobjdump("--dump-resource-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    registers = re.search(r"REG:(\d+)", resources)
    assert registers, resources
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    return Compiled(
        registers=int(registers[1]),
        spills=sum(name.startswith(("LDL", "STL")) for name in instructions),
        shared=binary.metadata.shared,
        loads=_widths(instructions, "LDG"),
        stores=_widths(instructions, "STG"),
        num_warps=num_warps,
        mnemonics=frozenset(name.split(".")[0] for name in instructions),
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout


def _widths(instructions: list[str], mnemonic: str) -> dict[int, int]:
    counts: dict[int, int] = {}
    for name in instructions:
        if name.startswith(mnemonic):
            width = re.search(r"\.(?:U|S)?(8|16|64|128)(?:\.|$)", name)
            bits = int(width[1]) if width else 32
            counts[bits] = counts.get(bits, 0) + 1
    return counts
