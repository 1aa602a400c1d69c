"""What the compiled row kernels demand of their tensors: they read raw memory."""

from __future__ import annotations

import torch
from torch import Tensor

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_matrices(student: Tensor, teacher: Tensor, grad: Tensor | None, vocab_size: int) -> None:
    """The [R, V] tensors fit each other, and `grad` covers an input exactly or not at all."""
    for name, tensor in (("student", student), ("teacher", teacher), ("grad", grad)):
        if tensor is None:
            continue
        if tensor.ndim != 2 or tensor.shape != student.shape:
            raise ValueError(
                f"{name} must be [R, V] = {list(student.shape)} like student, "
                f"got {list(tensor.shape)}."
            )
        if tensor.device != student.device:
            raise ValueError(f"{name} must be on {student.device}, got {tensor.device}.")
        if tensor.dtype not in ROW_DTYPES:
            expected = ", ".join(str(dtype) for dtype in ROW_DTYPES)
            raise ValueError(f"{name} must be one of {expected}, got {tensor.dtype}: convert it.")
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(
                f"{name} must have last stride 1, got strides {tensor.stride()}: "
                "call .contiguous()."
            )
    if not 1 <= vocab_size <= student.shape[1]:
        raise ValueError(
            f"vocab_size must be in [1, {student.shape[1]}] (the columns), got {vocab_size}."
        )
    for name, tensor in (("student", student), ("teacher", teacher)):
        if grad is None or grad.numel() == 0 or grad.data_ptr() != tensor.data_ptr():
            continue
        if (grad.dtype, grad.stride(0)) != (tensor.dtype, tensor.stride(0)):
            raise ValueError(
                f"grad shares the memory of {name} but not its dtype and strides: got "
                f"{grad.dtype}, {grad.stride()}, expected {tensor.dtype}, {tensor.stride()}; "
                f"pass {name} itself."
            )


def check_vectors(
    student: Tensor,
    target_ids: Tensor | None,
    row_weights: Tensor,
    old_logprobs: Tensor | None,
    absolute_rows: Tensor | None,
    vocab_size: int,
) -> None:
    """The [R] tensors fit `student`; on CPU, where nothing waits for it, the target ids too."""
    vectors = (
        ("target_ids", target_ids, torch.int64),
        ("row_weights", row_weights, torch.float32),
        ("old_logprobs", old_logprobs, torch.float32),
        ("absolute_rows", absolute_rows, torch.bool),
    )
    for name, tensor, dtype in vectors:
        if tensor is None:
            continue
        if (tensor.shape, tensor.dtype) != (student.shape[:1], dtype) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous [{student.shape[0]}] tensor of {dtype}, "
                f"got {list(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}."
            )
        if tensor.device != student.device:
            raise ValueError(f"{name} must be on {student.device}, got {tensor.device}.")
    if target_ids is not None and target_ids.numel() and target_ids.device.type == "cpu":
        # A wrong id would be a read outside of the row.
        low, high = (int(bound) for bound in target_ids.aminmax())
        if low < -1 or high >= vocab_size:
            raise ValueError(
                f"target_ids must be in [0, {vocab_size}), or -1 for none; "
                f"got values from {low} to {high}."
            )
