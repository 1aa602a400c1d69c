"""What the compiled row kernels demand of their tensors: they read raw memory."""

from __future__ import annotations

import torch
from torch import Tensor

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_matrices(student: Tensor, teacher: Tensor, grad: Tensor | None, vocab_size: int) -> None:
    """The [R, V] tensors fit each other, and `grad` covers an input exactly or not at all."""
    _check_matrices({"student": student, "teacher": teacher}, grad, vocab_size)


def check_logits(logits: Tensor, grad: Tensor | None, vocab_size: int) -> None:
    """The same where there is only one distribution."""
    _check_matrices({"logits": logits}, grad, vocab_size)


def _check_matrices(inputs: dict[str, Tensor], grad: Tensor | None, vocab_size: int) -> None:
    first, student = next(iter(inputs.items()))
    for name, tensor in (*inputs.items(), ("grad", grad)):
        if tensor is None:
            continue
        if tensor.ndim != 2 or tensor.shape != student.shape:
            raise ValueError(
                f"{name} must be [R, V] = {list(student.shape)} like {first}, "
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
    for name, tensor in inputs.items():
        if grad is None or grad.numel() == 0 or grad.data_ptr() != tensor.data_ptr():
            continue
        if (grad.itemsize, grad.stride(0)) != (tensor.itemsize, tensor.stride(0)):
            raise ValueError(
                f"grad shares the memory of {name} but not the size of its elements and strides: "
                f"got {grad.dtype}, {grad.stride()}, expected {tensor.dtype}, {tensor.stride()}; "
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
    _check_fits("row_weights", row_weights, student.shape[:1], torch.float32, student)
    _check_fits("old_logprobs", old_logprobs, student.shape[:1], torch.float32, student)
    _check_fits("absolute_rows", absolute_rows, student.shape[:1], torch.bool, student)
    check_targets(student, target_ids, vocab_size)


def check_of_rows(logits: Tensor, name: str, tensor: Tensor, columns: int) -> None:
    """`tensor` is [R, columns] in fp32."""
    _check_fits(name, tensor, (logits.shape[0], columns), torch.float32, logits)


def _check_fits(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, student: Tensor
) -> None:
    if tensor is None:
        return
    if (tensor.shape, tensor.dtype) != (shape, dtype) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {list(shape)} tensor of {dtype}, "
            f"got {list(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}."
        )
    if tensor.device != student.device:
        raise ValueError(f"{name} must be on {student.device}, got {tensor.device}.")


def check_targets(student: Tensor, target_ids: Tensor | None, vocab_size: int) -> None:
    """`target_ids` is [R] and, on CPU, within the vocabulary."""
    _check_fits("target_ids", target_ids, student.shape[:1], torch.int64, student)
    if target_ids is not None and target_ids.numel() and target_ids.device.type == "cpu":
        # A wrong id would be a read outside of the row.
        low, high = (int(bound) for bound in target_ids.aminmax())
        if low < -1 or high >= vocab_size:
            raise ValueError(
                f"target_ids must be in [0, {vocab_size}), or -1 for none; "
                f"got values from {low} to {high}."
            )
