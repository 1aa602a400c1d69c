"""What a call would do, in words."""

from __future__ import annotations

import torch

from hero_kernels import backends
from hero_kernels.chunked import Plan, layout
from hero_kernels.options import Design, KernelOptions
from hero_kernels.workspace import slice_width, workspace


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
    pointwise_clip: float | None = None,
    impl: str = "auto",
    options: KernelOptions | None = None,
) -> str:
    """Describe how `fused_linear_divergence` would compute a call: implementation, GEMMs, memory.

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
        pointwise_clip: as for `fused_linear_divergence`.
        impl: as for `fused_linear_divergence`.
        options: as for `fused_linear_divergence`.

    Returns:
        A few lines of text.

    Raises:
        ValueError: the implementation named cannot serve.
    """
    options = options or KernelOptions()
    where = torch.device(device)
    request = backends.Request(where, dtype, support, pointwise_clip is not None)
    if options.design == Design.SLICED:
        trained = ["dX"] * trainable_trunk + ["dW"] * trainable_head
        return _sliced(
            num_rows, hidden_size, vocab_size, request, shared_head, trained, impl, options
        )
    chosen = backends.choose(impl, request)
    plan = Plan(
        impl,
        backends.chunk_rows(options, where, vocab_size),
        str(options.storage),
        options.max_active_rows or 0,
        trainable_trunk,
        trainable_head,
        False,
        False,
    )
    chunks, types, groups, held, weight_sum = layout(
        num_rows, hidden_size, dtype, where, shared_head, plan
    )
    gemms = ["teacher logits", "h_s - h_t" if shared_head else "student logits"]
    gemms += ["dX"] * trainable_trunk + ["dW"] * trainable_head

    wide = torch.promote_types(dtype, torch.float32)
    logits_bytes = max(chunks, default=0) * vocab_size * (wide.itemsize + types.student.itemsize)
    gradient_bytes = held * vocab_size * types.gradient.itemsize
    lines = [f"implementation: {chosen}"]
    for name in backends.IMPLEMENTATIONS:
        if name != chosen:
            reason = backends.refusal(name, request)
            lines.append(f"  not {name}: {reason or f'{chosen} was preferred'}")
    lines += [
        "design: chunked",
        f"rows at once: {max(chunks, default=0)}, {len(chunks)} chunk(s) for {num_rows} rows",
        f"held as: teacher {_name(wide)}, student {_name(types.student)}, "
        f"gradient {_name(types.gradient)}",
        f"head GEMMs: {len(gemms)} ({', '.join(gemms)}), "
        f"{2e-9 * num_rows * hidden_size * vocab_size:.1f} GFLOP each",
        f"workspace: {_mebibytes(logits_bytes)} of logits, {_mebibytes(gradient_bytes)} of their "
        f"gradient ({max(groups, default=0)} chunk(s) held)",
    ]
    if trainable_head and weight_sum != dtype:
        size = vocab_size * hidden_size * weight_sum.itemsize
        lines.append(f"  and {_mebibytes(size)} for the {_name(weight_sum)} sum of dW")
    lines.append("masked rows: " + _masking(where, options))
    return "\n".join(lines)


def _sliced(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    request: backends.Request,
    shared_head: bool,
    trained: list[str],
    impl: str,
    options: KernelOptions,
) -> str:
    """`explain` for the sliced design; `trained` names the products of the gradients."""
    chosen = backends.phases_of(impl, request).__name__
    space = workspace(
        num_rows,
        hidden_size,
        dtype=request.dtype,
        device=request.device,
        storage=str(options.storage),
        shared_head=shared_head,
        in_torch=chosen == backends.PHASES["torch"],
    )
    width = slice_width(vocab_size, num_rows, space, options.memory_budget or 0)
    backward = ["2 for logits", *trained] if trained else []
    count = 2 + len(trained) if trained else 0
    slices = -(-vocab_size // max(width, 1))
    return "\n".join(
        [
            f"implementation: {chosen}",
            "design: sliced",
            f"columns at once: {width}, {slices} slice(s) for {vocab_size} tokens",
            f"head GEMMs: {4 + count} (4 forward, {count} backward: {', '.join(backward)}), "
            f"{2e-9 * num_rows * hidden_size * vocab_size:.1f} GFLOP each",
            f"workspace: {_mebibytes(space.bytes(width))} beyond inputs and gradients",
            "masked rows: " + _masking(request.device, options),
        ]
    )


def _masking(device: torch.device, options: KernelOptions) -> str:
    if device.type == "cpu" or options.max_active_rows is not None:
        return "dropped before the first GEMM"
    return "computed and thrown away; options.max_active_rows lets them be dropped"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
