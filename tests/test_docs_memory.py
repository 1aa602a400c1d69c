"""The formulas of memory in docs/loss.md, written out here, against what `explain` says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hero_kernels.layout import Plan, layout

from hero_kernels import KernelOptions, explain
from hero_kernels.gemm import takes_16_bit

MEBIBYTE = 2**20
VOCAB, HIDDEN = 151936, 1024
CALLS = [
    pytest.mark.parametrize("storage", ["float32", "mixed"]),
    pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"]),
    pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str),
    pytest.mark.parametrize("device", ["cpu", "cuda"]),
]


def for_calls(test: Callable[..., None]) -> Callable[..., None]:
    for mark in CALLS:
        test = mark(test)
    return test


def entry_bytes(
    storage: str, shared: bool, dtype: torch.dtype, device: str
) -> tuple[int, int, int]:
    """Teacher, student and gradient of one logit, by the page's table."""
    wide = 8 if dtype == torch.float64 else 4
    short, mixed = dtype == torch.bfloat16, storage == "mixed"
    student = 2 if short and mixed and shared else wide
    takes = takes_16_bit(torch.device(device), dtype)
    return wide, student, 2 if short and (mixed or takes) else wide


def explained(rows: int, trainable: bool, storage: str, design: str, **call: Any) -> str:
    return explain(
        rows,
        HIDDEN,
        VOCAB,
        trainable_trunk=trainable,
        trainable_head=trainable,
        impl="torch",
        options=KernelOptions(storage=storage, design=design),
        **call,
    )


@for_calls
@pytest.mark.parametrize(
    ("rows", "trainable"), [(9000, True), (3000, True), (100, True), (100, False)]
)
def test_memory_of_chunks(
    storage: str, shared: bool, dtype: torch.dtype, device: str, rows: int, trainable: bool
) -> None:
    """`explain` against the formula of the page."""
    call: dict[str, Any] = {"device": device, "dtype": dtype, "shared_head": shared}
    text = explained(rows, trainable, storage, "chunked", **call)
    teacher, student, gradient = entry_bytes(storage, shared, dtype, device)
    limit = 256 if device == "cpu" else 3 * 2**30 // (8 * VOCAB) // 256 * 256
    chunks = -(-rows // limit)
    longest = -(-rows // chunks)
    held, products = 0, chunks
    if trainable and gradient != student:
        at_most = max(1, HIDDEN * (4 if device == "cpu" else 2) // longest)
        products = -(-chunks // at_most)
        first = -(-chunks // products)  # chunks of the first product, the longest ones
        held = sum(-(-(rows - i) // chunks) for i in range(first))
    logits, waiting = (
        VOCAB * size / MEBIBYTE for size in (longest * (teacher + student), held * gradient)
    )
    gradient_words = f"{waiting:.1f} MiB" if held else "in place"
    assert f"workspace: {logits:.1f} MiB of logits, their gradient {gradient_words}" in text
    has_sum = trainable and dtype == torch.bfloat16 and (products > 1 or gradient != 2)
    weight_sum = f"and {VOCAB * HIDDEN * 4 / MEBIBYTE:.1f} MiB for the float32 sum of dW"
    assert (weight_sum in text) == has_sum and ("sum of dW" in text) == has_sum


@for_calls
@pytest.mark.parametrize("rows", [3000, 100])
def test_memory_of_slices(
    storage: str, shared: bool, dtype: torch.dtype, device: str, rows: int
) -> None:
    call: dict[str, Any] = {"device": device, "dtype": dtype, "shared_head": shared}
    text = explained(rows, True, storage, "sliced", **call)
    teacher, student, gradient = entry_bytes(storage, shared, dtype, device)
    wide, inputs, on_cpu = teacher, dtype.itemsize, device == "cpu"
    logit = teacher + student + (gradient if gradient != student else 0)
    element = wide + shared * (wide if on_cpu else inputs)
    element += (2 * wide * (inputs == 2)) if on_cpu else inputs
    scratch = 16 * wide * 2 ** (18 if on_cpu else 20)
    converted = wide if on_cpu and inputs == 2 else 0
    [columns] = map(int, re.findall(r"^columns at once: (\d+)", text, re.MULTILINE))
    assert columns == VOCAB or (columns % 128 == 0 and columns >= 1024)
    spaced = columns + 127 * on_cpu
    bytes_ = rows * (HIDDEN * element + 128 * wide + logit * spaced) + scratch
    bytes_ += columns * HIDDEN * converted
    assert f"workspace: {bytes_ / MEBIBYTE:.1f} MiB beyond inputs" in text
    assert bytes_ <= 448 * MEBIBYTE or columns == 1024


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_memory_of_the_fused_design(shared: bool, dtype: torch.dtype) -> None:
    """What the page says of delta; `explain` needs a GPU for this design."""
    device = torch.device("cuda")
    for trainable in (True, False):
        plan = Plan("auto", 256, "mixed", 0, trainable, trainable, False, False, "fused")
        found = layout(3000, HIDDEN, dtype, device, shared, plan)
        assert found.types.student == (torch.float16 if shared else torch.float32)
        assert found.types.gradient == dtype
        assert found.in_place == shared
        assert found.held == (1500 if trainable else 0)  # 12 chunks of 250; 8 would fit into 2 H
