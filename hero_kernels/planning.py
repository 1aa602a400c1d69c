"""Which implementation and which tile a call takes, and `explain`, which says so in words.

The rule: the implementation that the caller names, else the most special one that can serve; of
tiles the largest that fits `memory_budget`, without a budget the device's usual number of whole rows.
"""

from __future__ import annotations

import operator
from functools import lru_cache

import torch

from hero_kernels import backends
from hero_kernels.memory import Shape, default_rows, layout, tile_for, workspace
from hero_kernels.objective import KernelOptions

_NOMINAL_ROWS = 8192


@lru_cache(maxsize=1024)
def decide(
    impl: str,
    device: str,
    dtype: torch.dtype,
    support: str,
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    shared_head: bool,
    need_weight: bool,
    need_grad: bool,
    tile_rows: int,
    tile_columns: int,
    memory_budget: int,
    sharded: bool,
) -> tuple[str, int, int]:
    """Implementation, rows and columns of a tile (0 for all). Numbers are 0 where left open.

    Raises:
        ValueError: the implementation named cannot serve, or no tile fits the budget.
    """
    if tile_columns >= vocab_size:
        tile_columns = 0

    def request(split: bool) -> backends.Request:
        return backends.Request(device, dtype, support, split, vocab_size=vocab_size)

    name = backends.choose(impl, request(split=bool(tile_columns) or sharded))
    if not memory_budget:
        if tile_columns:
            return name, tile_rows, tile_columns
        return name, tile_rows or default_rows(device, vocab_size), 0
    may_split = support == "full" and not sharded
    if may_split and impl != "auto":
        may_split = backends.refusal(impl, request(split=True)) is None
    shape = Shape(
        num_rows, hidden_size, vocab_size, dtype, device, shared_head, need_weight, need_grad,
        backends.IMPLEMENTATIONS[name].delta_dtype,
    )  # fmt: skip
    rows, columns = tile_for(shape, memory_budget, may_split, in_torch=name == "torch")
    if columns:
        name = backends.choose(impl, request(split=True))
    return name, rows, columns


decide_once = torch.compiler.assume_constant_result(decide.__wrapped__)
"""`decide` as `torch.compile` takes it: for constants, at compile time."""


def constant(size: int) -> int:
    """`size`, which `torch.compile` compiles anew for where it would be a symbol: `decide` takes
    none."""
    return operator.index(size)


def row_bound(hidden: torch.Tensor, options: KernelOptions) -> int:
    """Rows that a call may compute. What fits a budget depends on the rows there are: under
    `torch.compile` a call with a budget is compiled anew for each number of rows."""
    return constant(min(len(hidden), options.max_active_rows or len(hidden)))


def explain(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    shared_head: bool = True,
    trainable_trunk: bool = True,
    trainable_head: bool = True,
    support: str = "full",
    impl: str = "auto",
    options: KernelOptions | None = None,
) -> str:
    """Describe how `fused_linear_divergence` would compute a call: implementation, tile, products,
    memory, and why.

    Args:
        num_rows: tokens with a weight other than 0.
        hidden_size: H.
        vocab_size: V.
        device: of the tensors.
        dtype: of the student's hidden states and weight.
        shared_head: whether `teacher_weight` is None.
        trainable_trunk: whether the student's hidden states require grad.
        trainable_head: whether the student's weight requires grad.
        support: as for `fused_linear_divergence`.
        impl: as there.
        options: as there.

    Returns:
        A few lines of text.

    Raises:
        ValueError: the implementation named cannot serve, or no tile fits the budget.
    """
    options = options or KernelOptions()
    if options.process_group is not None:
        raise ValueError(
            "explain describes the work of one process: pass the shard's vocab_size and leave "
            "options.process_group None."
        )
    where = str(torch.device(device))
    need_grad = trainable_trunk or trainable_head
    name, rows, columns = decide(
        impl, where, dtype, support, num_rows, hidden_size, vocab_size, shared_head,
        trainable_head, need_grad, options.tile_rows or 0, options.tile_columns or 0,
        options.memory_budget or 0, False,
    )  # fmt: skip
    request = backends.Request(where, dtype, support, bool(columns), vocab_size=vocab_size)
    lines = [f"implementation: {name}"]
    for other, entry in backends.IMPLEMENTATIONS.items():
        if other != name:
            reason = backends.refusal(other, request)
            if reason is None:
                reason = f"{name} was preferred" if entry.in_auto else "only if named: not measured"
            lines.append(f"  not {other}: {reason}")
    shape = Shape(
        num_rows, hidden_size, vocab_size, dtype, where, shared_head, trainable_head, need_grad,
        backends.IMPLEMENTATIONS[name].delta_dtype,
    )  # fmt: skip
    plan = layout(shape, rows, columns)
    whole = max(plan.sizes, default=0)
    products = (6 if columns else 2) + trainable_trunk + trainable_head
    asked = options.memory_budget or options.tile_rows or options.tile_columns
    lines.append(
        f"tile: {whole} of {num_rows} rows x {plan.columns} of {vocab_size} columns "
        f"({'as asked for' if asked else 'default'}); teacher logits {_name(plan.wide)}, "
        f"{'delta' if shared_head else 'student logits'} {_name(plan.student)}, gradient "
        f"{_name(plan.gradient)}"
    )
    where_formed = "backward" if columns else "forward"
    lines.append(
        f"products with the head: {products}, gradients in the {where_formed} pass; "
        f"{2e-9 * products * num_rows * hidden_size * vocab_size:.1f} GFLOP"
    )
    needed = workspace(shape, rows, columns, in_torch=name == "torch") / 2**20
    lines.append(f"memory beyond inputs and gradients: at most {needed:.1f} MiB")
    return "\n".join(lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
