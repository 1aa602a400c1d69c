"""The table of implementations: what each can do, and which one `impl="auto"` takes."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hero_kernels.options import KernelOptions, Objective, Support

RowKernel = Callable[..., Tensor]
"""See `rows.divergence_rows`."""

_CPU_CHUNK = 256
_CUDA_WORKSPACE = 2 << 30
_MIN_CUDA_CHUNK, _MAX_CUDA_CHUNK = 256, 8192


@dataclass(frozen=True)
class Implementation:
    """One row kernel."""

    module: str
    device: str | None
    """The device it runs on; None for any."""
    dtypes: tuple[torch.dtype, ...]
    dense_only: bool
    """Whether it lacks `support` other than "full" and `pointwise_clip`."""


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = {
    "torch": Implementation("hero_kernels.rows", None, (*_FLOATS, torch.float64), False),
    "cpu": Implementation("hero_kernels.cpu", "cpu", _FLOATS, True),
    # Before "triton" until a GPU has shown which of the two is faster.
    "cuda": Implementation("hero_kernels.cuda", "cuda", _FLOATS, True),
    "triton": Implementation("hero_kernels.triton.rows", "cuda", _FLOATS, True),
}
"""By name, in order of generality; `auto` takes the last one that serves."""


@functools.cache
def _load(name: str) -> RowKernel | str:
    """The row kernel, or why it cannot be had on this machine."""
    try:
        module = importlib.import_module(IMPLEMENTATIONS[name].module)
    except ImportError as error:
        return f"it cannot be imported: {error}"
    if name == "torch":
        return module.divergence_rows
    return module.available() or module.divergence_rows


def row_kernel(name: str) -> RowKernel:
    """The row kernel called `name`; raises ValueError if it is not to be had."""
    kernel = _load(name)
    if isinstance(kernel, str):
        raise ValueError(f"impl={name!r} cannot serve: {kernel}.")
    return kernel


PHASES = {"torch": "hero_kernels.phases", "triton": "hero_kernels.triton.phases"}
"""Implementations in three phases, by name; see phases.py."""


def phases_of(impl: str, request: Request) -> ModuleType:
    """The module of the three phases that `impl` stands for; "auto" takes the last that serves.

    Raises:
        ValueError: the implementation named has no phases or cannot serve.
    """
    reasons = {}
    for name in reversed(PHASES) if impl == "auto" else [impl]:
        reason = refusal(name, request)
        if reason is None and name not in PHASES:
            reason = "it sees whole rows only"
        if reason is None:
            try:
                return importlib.import_module(PHASES[name])
            except ImportError as error:
                reason = f"it cannot be imported: {error}"
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(
        f"impl={impl!r} cannot serve design='sliced' or a process group ({listed}). They are "
        f"implemented by {', '.join(map(repr, PHASES))}; impl='auto' chooses."
    )


class Request(NamedTuple):
    """What decides whether an implementation can serve a call."""

    device: torch.device
    dtype: torch.dtype
    """Of the student's hidden states and weight."""
    support: str
    clips: bool
    """Whether `pointwise_clip` is given."""


def supports(
    impl: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    support: str = "full",
    pointwise_clip: float | None = None,
) -> str | None:
    """Whether an implementation can serve a call of `fused_linear_divergence`.

    Args:
        impl: "torch", "cpu", "cuda" or "triton".
        device: where the tensors are.
        dtype: of the student's hidden states and weight.
        support: as there.
        pointwise_clip: as there.

    Returns:
        None if it can, else the reason why not.

    Raises:
        ValueError: there is no implementation of that name.
    """
    return refusal(impl, Request(torch.device(device), dtype, support, pointwise_clip is not None))


def refusal(impl: str, request: Request) -> str | None:
    """Why `impl` cannot serve, or None if it can; raises ValueError for an unknown name."""
    if impl not in IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in ("auto", *IMPLEMENTATIONS))
        raise ValueError(f"Unknown impl {impl!r}: expected one of {names}.")
    entry = IMPLEMENTATIONS[impl]
    if entry.device not in (None, request.device.type):
        return f"it runs on {entry.device}, the tensors are on {request.device.type}"
    if request.dtype not in entry.dtypes:
        return f"it does not take {request.dtype}"
    if entry.dense_only and Support(request.support) != Support.FULL:
        return f"support={str(request.support)!r} is implemented by 'torch' only"
    if entry.dense_only and request.clips:
        return "pointwise_clip is implemented by 'torch' only"
    kernel = _load(impl)
    return kernel if isinstance(kernel, str) else None


def choose(impl: str, request: Request) -> str:
    """The implementation that `impl` stands for.

    Raises:
        ValueError: the implementation named cannot serve; the message says why.
    """
    if impl != "auto":
        if reason := refusal(impl, request):
            raise ValueError(
                f"impl={impl!r} cannot serve this call: {reason}. impl='auto' chooses one that can."
            )
        return impl
    for name in reversed(IMPLEMENTATIONS):
        if refusal(name, request) is None:
            return name
    raise ValueError(
        f"No implementation takes {request.dtype}; expected float32, bfloat16, float16 or float64."
    )


def resolve(impl: str, tensor: Tensor, objective: Objective) -> str:
    """`choose` for the student's hidden states (or logits) and what is to be computed."""
    return choose(impl, request_of(tensor, objective))


def request_of(tensor: Tensor, objective: Objective) -> Request:
    """What decides, from the student's hidden states (or logits) and what is to be computed."""
    clips = objective.pointwise_clip > 0
    return Request(tensor.device, tensor.dtype, objective.support, clips)


def chunk_rows(options: KernelOptions, device: torch.device, vocab_size: int) -> int:
    """Rows of logits held at once.

    On CPU 256 rows keep the GEMM busy. On CUDA the chunk is as large as 2 GiB of logits allow,
    since dX of a small chunk has too few tiles to fill the device.
    """
    if options.chunk_size is not None:
        return options.chunk_size
    if device.type == "cpu":
        return _CPU_CHUNK
    rows = _CUDA_WORKSPACE // (6 * vocab_size) // 256 * 256
    return max(_MIN_CUDA_CHUNK, min(_MAX_CUDA_CHUNK, rows))
