"""Which implementation and which tile a call takes, and `explain`, which says so in words.

The rule: the implementation that the caller names, else the most special one that can serve; the
largest tile that fits `memory_budget`, or without one the device's usual number of whole rows.
"""

from __future__ import annotations

import operator
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple

import torch

from hero_kernels import backends, checks
from hero_kernels.call import Call, encoded, numbers_of
from hero_kernels.memory import Shape, default_rows, layout, tile_for, workspace
from hero_kernels.objective import SUPPORTS, KernelOptions, Objective, choice


class Facts(NamedTuple):
    """What decides how a call is carried out; numbers are 0 where the caller leaves them open."""

    device: str
    dtype: torch.dtype
    """Of the student's hidden states and weight."""
    divergence: str
    support: str
    num_rows: int
    """Rows that the call may compute; read only with a budget."""
    hidden_size: int
    """H, the larger one where teacher and student differ."""
    columns: int
    """Of the head, or of this rank's shard."""
    vocab_size: int
    """Real tokens of the whole vocabulary."""
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    tile_rows: int
    tile_columns: int
    memory_budget: int
    max_active_rows: int
    impl: str = "auto"
    shared: bool = True
    """Whether teacher and student have one head."""
    with_stats: bool = False
    per_row: bool = False
    sharded: bool = False
    group: str = ""


class Plan(NamedTuple):
    """What `fused_linear_divergence` hands to the op beside its tensors."""

    text: str
    """As `call.encoded` returns it."""
    numbers: tuple[float, ...]
    """As `call.numbers_of` returns them."""
    in_backward: bool
    """Whether tensors are kept to form gradients in the backward pass."""


@lru_cache(maxsize=1024)
def plan(objective: Objective, facts: Facts) -> Plan:
    """How a call is carried out.

    Raises:
        ValueError: the implementation named cannot serve, or no tile fits the budget.
    """
    text, in_backward = _call_of(*facts)
    return Plan(encoded(objective, text), numbers_of(objective), in_backward)


def traced_plan(objective: Objective, facts: Facts) -> Plan:
    """`plan` for `torch.compile`: facts are made constants, so that a size that would be a symbol
    is compiled for anew; the objective's numbers stay as they are."""
    constants = [operator.index(fact) if type(fact) is int else fact for fact in facts]
    text, in_backward = _call_of(*constants)
    return Plan(encoded(objective, text), numbers_of(objective), in_backward)


def _call_of(*values: Any) -> tuple[str, bool]:
    """`Call.text`, and whether gradients are formed in the backward pass."""
    facts = Facts(*values)
    name, rows, columns = decide(facts)
    in_backward = facts.per_row or columns > 0
    needs = (facts.need_hidden, facts.need_weight, facts.need_bias)
    call = Call(
        name, rows, columns, facts.vocab_size, facts.max_active_rows,
        *((False,) * 3 if in_backward else needs), facts.with_stats, facts.per_row, facts.group,
    )  # fmt: skip
    return call.text, in_backward and any(needs)


# As `torch.compiler.assume_constant_result` does, which would import torch._dynamo: seconds.
_call_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def decide(facts: Facts) -> tuple[str, int, int]:
    """Implementation, rows and columns of a tile (0 for all).

    Raises:
        ValueError: the implementation named cannot serve, or no tile fits the budget.
    """
    tile_columns = facts.tile_columns if facts.tile_columns < facts.columns else 0
    name = backends.choose(facts.impl, _request(facts, split=bool(tile_columns) or facts.sharded))
    if not facts.memory_budget:
        if tile_columns:
            return name, facts.tile_rows, tile_columns
        return name, facts.tile_rows or default_rows(facts.device, facts.columns), 0
    may_split = facts.support == "full" and not facts.sharded
    if may_split and facts.impl != "auto":
        may_split = backends.refusal(facts.impl, _request(facts, split=True)) is None
    split_in_torch = not facts.device.startswith("cuda") or facts.impl == "torch"
    rows, columns = tile_for(
        shape_of(facts), facts.memory_budget, may_split, name == "torch", split_in_torch
    )
    if columns:
        name = backends.choose(facts.impl, _request(facts, split=True))
    return name, rows, columns


def _request(facts: Facts, split: bool) -> backends.Request:
    return backends.Request(facts.device, facts.dtype, facts.divergence, facts.support, split)


def shape_of(facts: Facts) -> Shape:
    """What memory.py asks of a call."""
    return Shape(
        facts.num_rows,
        facts.hidden_size,
        facts.columns,
        facts.dtype,
        facts.device,
        facts.shared,
        facts.need_hidden,
        facts.need_weight,
        facts.need_bias,
    )


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
    divergence: str = "jsd",
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
        divergence: as for `fused_linear_divergence`.
        support: as there.
        impl: as there.
        options: as there.

    Returns:
        A few lines of text.

    Raises:
        TypeError: a size is no whole number.
        ValueError: the implementation named cannot serve, or no tile fits the budget.
    """
    sizes = {"num_rows": num_rows, "hidden_size": hidden_size, "vocab_size": vocab_size}
    for size, value in sizes.items():
        if not isinstance(value, Integral):
            raise TypeError(
                f"{size} must be a whole number, got a {type(value).__name__}: explain takes the "
                "sizes of a call, explain(num_rows, hidden_size, vocab_size), not its tensors."
            )
    options = checks.options(options or KernelOptions())
    if options.process_group is not None:
        raise ValueError(
            "explain describes the work of one process: pass the shard's vocab_size and leave "
            "options.process_group None."
        )
    choice("support", support, SUPPORTS)
    facts = Facts(
        str(torch.device(device)), dtype, divergence, support, num_rows, hidden_size, vocab_size,
        vocab_size, trainable_trunk, trainable_head, False, options.tile_rows or 0,
        options.tile_columns or 0, options.memory_budget or 0, 0, impl, shared_head,
    )  # fmt: skip
    name, rows, columns = decide(facts)
    request = _request(facts, bool(columns))
    lines = [f"implementation: {name}"]
    for other in backends.IMPLEMENTATIONS:
        if other != name:
            reason = backends.refusal(other, request)
            if reason is None and impl != "auto":
                reason = f"{name} was named"
            elif reason is None:
                preferred = other in backends.AUTO
                reason = f"{name} was preferred" if preferred else "only if named: not measured"
            lines.append(f"  not {other}: {reason}")
    shape = shape_of(facts)
    found = layout(shape, rows, columns)
    whole = max(found.sizes, default=0)
    passes = 1 if not columns else 3 if trainable_trunk or trainable_head else 2
    products = 2 * passes + trainable_trunk + trainable_head  # logits of both sides in each pass
    asked = options.memory_budget or options.tile_rows or options.tile_columns
    lines.append(
        f"tile: {whole} of {num_rows} rows x {found.columns} of {vocab_size} columns "
        f"({'as asked for' if asked else 'default'}); logits {_name(found.wide)}, gradient "
        f"{_name(found.gradient)}"
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
