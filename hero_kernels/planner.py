"""Which design, chunk and row kernel a call takes: predicted time and memory of every candidate.

The model is arithmetic: FLOPs over the rates of products, logits over the rates of row kernels,
bytes over the bandwidth, with the constants of `machines.py`. It ranks candidates; it is not a
benchmark. `explain()` prints what it predicts, and benchmarks/ sets the prediction beside the
measurement.

Without a memory budget the chunk loop holds as many rows as `backends.chunk_rows` says. With one
(`options.memory_budget`: bytes beyond inputs and gradients) the fastest candidate that fits is
taken, which may be the sliced design. The fused design is a rival of the chunk loop where its rate
has been measured, and taken elsewhere only if named.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from hero_kernels import backends, fused
from hero_kernels.layout import Plan, layout
from hero_kernels.machines import Machine, machine_of
from hero_kernels.options import Design, KernelOptions, Support
from hero_kernels.workspace import slice_width, workspace

_NOMINAL_ROWS = 8192
_LEAST_CHUNK = 16
"""Rows; a budget that only holds less is too small for the chunk loop."""


class Problem(NamedTuple):
    """What is known of a call before it runs."""

    num_rows: int
    """Tokens of non-zero weight, or a bound."""
    hidden_size: int
    vocab_size: int
    """Columns of the head, or of this rank's shard."""
    device: torch.device
    dtype: torch.dtype
    shared_head: bool
    divergence: str
    support: str
    clips: bool
    """Whether `pointwise_clip` is given."""
    plan: Plan
    """What the caller asked for: design and impl may be "auto", chunk_size 0."""

    @property
    def request(self) -> backends.Request:
        return backends.Request(self.device, self.dtype, self.support, self.clips)


class Candidate(NamedTuple):
    """One way to carry out a call."""

    design: str
    impl: str
    size: int
    """Rows of a chunk, or columns of a slice."""
    seconds: float
    """Predicted, forward and backward."""
    bytes: int
    """Predicted, beyond inputs and gradients."""


@torch.compiler.assume_constant_result
def decide(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    device: str,
    dtype: torch.dtype,
    shared_head: bool,
    divergence: str,
    support: str,
    clips: bool,
    *plan: Any,
) -> tuple[str, int]:
    """Design and rows of a chunk (0 if sliced): `choose` for constants, as `torch.compile` sees
    them.

    Raises:
        ValueError: as `choose`.
    """
    what = (num_rows, hidden_size, vocab_size, torch.device(device), dtype, shared_head)
    chosen = choose(Problem(*what, divergence, support, clips, Plan(*plan)))
    return str(chosen.design), 0 if chosen.design == Design.SLICED else chosen.size


def choose(problem: Problem) -> Candidate:
    """The fastest candidate that fits the budget.

    Raises:
        ValueError: what the caller named cannot serve, or nothing fits the budget.
    """
    found = candidates(problem)
    budget = problem.plan.memory_budget
    fitting = [one for one in found if not budget or one.bytes <= budget]
    if not fitting:
        least = min(found, key=lambda one: one.bytes)
        raise ValueError(
            f"memory_budget={budget} bytes is too small for {problem.num_rows} rows of "
            f"{problem.vocab_size} logits: the least is {least.bytes}, by design="
            f"{str(least.design)!r}. Raise it, or pass fewer rows at a time."
        )
    return min(fitting, key=lambda one: one.seconds)


def candidates(problem: Problem) -> list[Candidate]:
    """All that can serve and that the caller left open, in the order in which they are tried.

    Raises:
        ValueError: an implementation named cannot serve.
    """
    return [*_chunked(problem), *_fused(problem), *_sliced(problem)]


def _chunked(problem: Problem) -> Iterator[Candidate]:
    plan = problem.plan
    if plan.design not in (Design.AUTO, Design.CHUNKED):
        return
    impl = _phases_name(problem) if plan.group else backends.choose(plan.impl, problem.request)
    for size in _chunk_sizes(problem):
        yield _chunked_candidate(problem, impl, size)


def _fused(problem: Problem) -> Iterator[Candidate]:
    """If asked for; or, where its rate has been measured, as a rival of the chunk loop."""
    plan = problem.plan
    machine = machine_of(problem.device)
    is_known = machine.measured and machine.products_of(problem.dtype).fused > 0
    asked_for = plan.design == Design.FUSED
    if not asked_for and not (plan.design == Design.AUTO and is_known):
        return
    reason = fused.refusal(plan.impl, problem.request, problem.vocab_size)
    if plan.group:
        reason = "it has no shards of the vocabulary"
    if reason and asked_for:
        raise ValueError(
            f"design='fused' cannot serve this call: {reason}. design='auto' chooses one that can."
        )
    if reason:
        return
    for size in _chunk_sizes(problem):
        yield _chunked_candidate(problem, "triton", size, Design.FUSED)


def _chunk_sizes(problem: Problem) -> Iterator[int]:
    """What the caller says, else the default and, with a budget, halves of it."""
    plan = problem.plan
    size = plan.chunk_size or backends.chunk_rows(problem.device, problem.vocab_size)
    yield size
    while plan.memory_budget and not plan.chunk_size and size > _LEAST_CHUNK:
        size //= 2
        yield size


def _chunked_candidate(
    problem: Problem, impl: str, chunk_size: int, design: str = Design.CHUNKED
) -> Candidate:
    plan = problem.plan._replace(chunk_size=chunk_size, design=design)
    rows, hidden, vocab = problem.num_rows, problem.hidden_size, problem.vocab_size
    sizes, types, groups, held, weight_sum, in_place = layout(
        rows, hidden, problem.dtype, problem.device, problem.shared_head, plan
    )
    wide = torch.promote_types(problem.dtype, torch.float32)
    chunk = max(sizes, default=0)
    of_student = 0 if in_place and held else types.student.itemsize
    logits = chunk * vocab * (wide.itemsize + of_student)
    fresh = logits + held * vocab * types.gradient.itemsize
    summed = 0
    if plan.need_weight and weight_sum.itemsize > problem.dtype.itemsize:
        summed = vocab * hidden * weight_sum.itemsize
    machine = machine_of(problem.device)
    is_fused = design == Design.FUSED
    seconds = (
        _product_seconds(problem, machine, chunk, passes=1, is_fused=is_fused)
        + rows * vocab / machine.row_rate("fused" if is_fused else impl, problem.divergence)
        + (fresh + summed) / machine.fresh
        + len(sizes) * machine.chunk_seconds
        + max(len(groups) - 1, 0) * 2 * summed / machine.bandwidth
    )
    return Candidate(design, impl, chunk_size, seconds, fresh + summed)


def _sliced(problem: Problem) -> Iterator[Candidate]:
    """The low-memory design: if asked for, or if a budget may rule the chunk loop out."""
    plan = problem.plan
    asked_for = plan.design == Design.SLICED
    possible = (
        problem.support == Support.FULL
        and not (problem.clips or plan.chunk_size or plan.group)
        and plan.impl in ("auto", *backends.PHASES)
    )
    if not asked_for and not (plan.design == Design.AUTO and plan.memory_budget and possible):
        return
    if problem.support != Support.FULL or problem.clips:
        raise ValueError(
            "design='sliced' has support='full' without pointwise_clip only: use design='chunked'."
        )
    impl = _phases_name(problem)
    space = workspace(
        problem.num_rows,
        problem.hidden_size,
        dtype=problem.dtype,
        device=problem.device,
        storage=plan.storage,
        shared_head=problem.shared_head,
        in_torch=impl == "torch",
    )
    try:
        width = slice_width(problem.vocab_size, problem.num_rows, space, plan.memory_budget)
    except ValueError:
        if asked_for:
            raise
        return
    machine = machine_of(problem.device)
    rows = problem.num_rows
    passes = 3 if _needs_gradient(plan) else 2
    slices = -(-problem.vocab_size // max(width, 1))
    seconds = (
        # Forward the logits twice, for statistics and values; backward twice: see sliced.py.
        _product_seconds(problem, machine, rows, passes=passes)
        + passes
        * problem.num_rows
        * problem.vocab_size
        / machine.row_rate(impl, problem.divergence)
        + space.bytes(width) / machine.fresh
        + passes * slices * machine.chunk_seconds
    )
    yield Candidate(Design.SLICED, impl, width, seconds, space.bytes(width))


def _phases_name(problem: Problem) -> str:
    module = backends.phases_of(problem.plan.impl, problem.request).__name__
    return next(name for name, known in backends.PHASES.items() if known == module)


def _needs_gradient(plan: Plan) -> bool:
    return plan.need_hidden or plan.need_weight


def _product_seconds(
    problem: Problem, machine: Machine, rows: int, passes: int, is_fused: bool = False
) -> float:
    """Of the head's products, with the logits of both sides computed `passes` times."""
    plan = problem.plan
    products = machine.products_of(problem.dtype)
    flops = 2.0 * problem.num_rows * problem.hidden_size * problem.vocab_size
    rate = products.fused or products.logits if is_fused else products.logits
    seconds = 2 * passes * products.seconds(rate, flops, rows)
    if plan.need_hidden:
        seconds += products.seconds(products.hidden, flops, rows)
    if plan.need_weight:
        seconds += products.seconds(products.weight, flops, rows)
    return seconds


def constant(size: int) -> int:
    """`size`, which `torch.compile` compiles anew for where it would be a symbol: `decide` takes
    none."""
    return operator.index(size)


def row_bound(hidden: torch.Tensor, options: KernelOptions) -> int:
    """Rows that a call may compute; under `torch.compile` a nominal number, so that the plan does
    not tie compiled code to one batch size. What fits a budget depends on the rows there are: with
    one each number of rows is compiled for (`constant`).
    """
    if torch.compiler.is_compiling() and not options.memory_budget:
        return options.max_active_rows or _NOMINAL_ROWS
    return min(len(hidden), options.max_active_rows or len(hidden))
