"""Triton kernels without a GPU: a safer interpreter."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
"""Where the triton_*_cases.py run: in the interpreter, or on a GPU."""


def to_device(group: Any) -> Any:
    """A named tuple, with its tensors on `DEVICE`."""
    return type(group)(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in group))


@functools.cache
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
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)


def _once_a_launch(patch: Any) -> Any:
    """Triton's language is patched again at every call of a device function, which takes 40% of the
    interpreter's time and changes nothing."""
    patched: set[str] = set()

    def patch_lang(function: Any) -> Any:
        if function.__module__ in patched:
            return interpreter._LangPatchScope()
        patched.add(function.__module__)
        scope = patch(function)
        undo = scope.restore

        def restore() -> None:
            patched.clear()
            undo()

        scope.restore = restore
        return scope

    return patch_lang
