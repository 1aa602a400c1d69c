"""What a call would do, in words."""

from __future__ import annotations

import torch

from hero_kernels import backends, planner
from hero_kernels.layout import Plan, layout
from hero_kernels.machines import machine_of
from hero_kernels.options import Design, KernelOptions


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
    pointwise_clip: float | None = None,
    impl: str = "auto",
    options: KernelOptions | None = None,
) -> str:
    """Describe how `fused_linear_divergence` would compute a call: implementation, design, GEMMs,
    memory, and the candidates it was chosen from with their predicted time.

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
        support: as for `fused_linear_divergence`.
        pointwise_clip: as for `fused_linear_divergence`.
        impl: as for `fused_linear_divergence`.
        options: as for `fused_linear_divergence`.

    Returns:
        A few lines of text.

    Raises:
        ValueError: the implementation named cannot serve.
    """
    options = options or KernelOptions()
    if options.process_group is not None:
        raise ValueError(
            "explain describes the work of one process: pass the shard's vocab_size and leave "
            "options.process_group None."
        )
    where = torch.device(device)
    plan = Plan(
        impl=impl,
        chunk_size=options.chunk_size or 0,
        storage=str(options.storage),
        max_active_rows=options.max_active_rows or 0,
        need_hidden=trainable_trunk,
        need_weight=trainable_head,
        need_bias=False,
        with_stats=False,
        design=str(options.design),
        memory_budget=options.memory_budget or 0,
    )
    problem = planner.Problem(
        num_rows,
        hidden_size,
        vocab_size,
        where,
        dtype,
        shared_head,
        str(divergence),
        support,
        pointwise_clip is not None,
        plan,
    )
    chosen = planner.choose(problem)
    lines = [f"implementation: {chosen.impl}"]
    for name in backends.IMPLEMENTATIONS:
        if name != chosen.impl:
            reason = backends.refusal(name, problem.request)
            if reason is None and chosen.design == Design.SLICED and name not in backends.PHASES:
                reason = "it sees whole rows only"
            lines.append(f"  not {name}: {reason or f'{chosen.impl} was preferred'}")
    lines.append(f"design: {chosen.design}")
    trained = ["dX"] * trainable_trunk + ["dW"] * trainable_head
    gflop = 2e-9 * num_rows * hidden_size * vocab_size
    describe = _sliced if chosen.design == Design.SLICED else _chunked
    lines += describe(problem, chosen, trained, f"{gflop:.1f} GFLOP each")
    lines.append("masked rows: " + _masking(where, options))
    return "\n".join([*lines, *_candidates(problem, chosen)])


def _chunked(
    problem: planner.Problem, chosen: planner.Candidate, trained: list[str], each: str
) -> list[str]:
    plan = problem.plan._replace(chunk_size=chosen.size, design=chosen.design)
    chunks, types, groups, held, weight_sum, in_place = layout(
        problem.num_rows,
        problem.hidden_size,
        problem.dtype,
        problem.device,
        problem.shared_head,
        plan,
    )
    gemms = ["teacher logits", "h_s - h_t" if problem.shared_head else "student logits", *trained]
    wide = torch.promote_types(problem.dtype, torch.float32)
    rows, vocab = max(chunks, default=0), problem.vocab_size
    of_student = 0 if in_place and held else types.student.itemsize
    logits_bytes = rows * vocab * (wide.itemsize + of_student)
    gradient_bytes = held * vocab * types.gradient.itemsize
    of_gradient = "in place"
    if held:
        of_gradient = f"{_mebibytes(gradient_bytes)} ({max(groups, default=0)} chunk(s) held)"
    lines = [
        f"rows at once: {rows}, {len(chunks)} chunk(s) for {problem.num_rows} rows",
        f"held as: teacher {_name(wide)}, student {_name(types.student)}, "
        f"gradient {_name(types.gradient)}",
        f"head GEMMs: {len(gemms)} ({', '.join(gemms)}), {each}",
        f"workspace: {_mebibytes(logits_bytes)} of logits, their gradient {of_gradient}",
    ]
    if problem.plan.need_weight and weight_sum != problem.dtype:
        size = vocab * problem.hidden_size * weight_sum.itemsize
        lines.append(f"  and {_mebibytes(size)} for the {_name(weight_sum)} sum of dW")
    return lines


def _sliced(
    problem: planner.Problem, chosen: planner.Candidate, trained: list[str], each: str
) -> list[str]:
    backward = ["2 for logits", *trained] if trained else []
    count = 2 + len(trained) if trained else 0
    slices = -(-problem.vocab_size // max(chosen.size, 1))
    return [
        f"columns at once: {chosen.size}, {slices} slice(s) for {problem.vocab_size} tokens",
        f"head GEMMs: {4 + count} (4 forward, {count} backward: {', '.join(backward)}), {each}",
        f"workspace: {_mebibytes(chosen.bytes)} beyond inputs and gradients",
    ]


def _candidates(problem: planner.Problem, chosen: planner.Candidate) -> list[str]:
    """What the planner compared, and by whose numbers."""
    machine = machine_of(problem.device)
    lines = [f"predicted with the costs of {machine.name!r}: {machine.source}"]
    budget = problem.plan.memory_budget
    for one in planner.candidates(problem):
        unit = "columns" if one.design == Design.SLICED else "rows"
        note = " <- taken" if one == chosen else ""
        if budget and one.bytes > budget:
            note = " over the budget"
        lines.append(
            f"  {one.design}, {one.impl}, {one.size} {unit} at once: {1e3 * one.seconds:.3g} ms, "
            f"{_mebibytes(one.bytes)}{note}"
        )
    return lines


def _masking(device: torch.device, options: KernelOptions) -> str:
    if device.type == "cpu" or options.max_active_rows is not None:
        return "dropped before the first GEMM"
    return "computed and thrown away; options.max_active_rows lets them be dropped"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
