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

from hero_kernels import checks
from hero_kernels.options import Design, Objective, StrEnum, Support

RowKernel = Callable[..., Tensor]
"""See `rows.divergence_rows`."""


class Function(StrEnum):
    """Which public function asks."""

    DIVERGENCE = "fused_linear_divergence"
    LOGPROBS = "linear_logprobs"


_CPU_CHUNK = 256
_CUDA_WORKSPACE = 3 << 30
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
    logprobs_module: str | None = None
    """Where `linear_logprobs` finds its two functions (see `logprob_rows.py`); None for nowhere."""


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = {
    "torch": Implementation(
        "hero_kernels.rows", None, (*_FLOATS, torch.float64), False, "hero_kernels.logprob_rows"
    ),
    "cpu": Implementation("hero_kernels.cpu", "cpu", _FLOATS, True, "hero_kernels.cpu_logprobs"),
    # Before "triton" until a GPU has shown which of the two is faster.
    "cuda": Implementation("hero_kernels.cuda", "cuda", _FLOATS, True),
    "triton": Implementation(
        "hero_kernels.triton.rows", "cuda", _FLOATS, True, "hero_kernels.triton.logprobs"
    ),
}
"""By name, in order of generality; `auto` takes the last one that serves."""


@functools.cache
def _load(path: str) -> ModuleType | str:
    """A module of row kernels, or why it cannot be had on this machine."""
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        return f"it cannot be imported: {error}"
    available = getattr(module, "available", None)  # the torch ones always are
    return (available and available()) or module


def _loaded(name: str, path: str | None) -> ModuleType:
    module = "it has no kernels for this function" if path is None else _load(path)
    if isinstance(module, str):
        raise ValueError(f"impl={name!r} cannot serve: {module}.")
    return module


def logprob_kernels(name: str) -> ModuleType:
    """The module with `logprob_rows` and `logprob_gradient` of the implementation `name`; raises
    ValueError if it is not to be had."""
    return _loaded(name, IMPLEMENTATIONS[name].logprobs_module)


def row_kernel(name: str) -> RowKernel:
    """The row kernel called `name`; raises ValueError if it is not to be had."""
    kernel: RowKernel = _loaded(name, IMPLEMENTATIONS[name].module).divergence_rows
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
    function: str = Function.DIVERGENCE
    """Value of `Function`."""


def supports(
    impl: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    support: str = "full",
    pointwise_clip: float | None = None,
    function: str = Function.DIVERGENCE,
    design: str = Design.AUTO,
    vocab_size: int = 1,
) -> str | None:
    """Whether an implementation can serve a call of `fused_linear_divergence`, or of
    `linear_logprobs`.

    Args:
        impl: "torch", "cpu", "cuda" or "triton"; "auto" for any, with a `design`.
        device: where the tensors are.
        dtype: of the student's hidden states and weight.
        support: as there.
        pointwise_clip: as there.
        function: "fused_linear_divergence" (and `divergence_from_logits`) or "linear_logprobs".
        design: as in `KernelOptions`; "auto" and "chunked" ask of the row kernel alone.
        vocab_size: V, of which the "fused" design has a largest.

    Returns:
        None if it can, else the reason why not.

    Raises:
        ValueError: there is no implementation, or no function, of that name.
    """
    clips = pointwise_clip is not None
    asked = checks.choice("function", function, Function)
    request = Request(torch.device(device), dtype, support, clips, asked)
    chosen = checks.choice("design", design, Design)
    if chosen == Design.FUSED:
        from hero_kernels import fused  # which imports this module

        return fused.refusal(impl, request, vocab_size)
    if chosen == Design.SLICED:
        if asked == Function.LOGPROBS:
            return "linear_logprobs has no design='sliced'"
        if Support(support) != Support.FULL or clips:
            return "design='sliced' has support='full' without pointwise_clip only"
        try:
            phases_of(impl, request)
        except ValueError as error:
            return str(error)
        return None
    return refusal(impl, request)


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
    logprobs = request.function == Function.LOGPROBS
    path = entry.logprobs_module if logprobs else entry.module
    if path is None:
        return f"it has no kernels for {request.function}"
    module = _load(path)
    return module if isinstance(module, str) else None


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


def resolve_logprobs(impl: str, tensor: Tensor) -> str:
    """`choose` for a call of `linear_logprobs` on these hidden states."""
    return choose(
        impl, Request(tensor.device, tensor.dtype, Support.FULL, False, Function.LOGPROBS)
    )


def chunk_rows(device: torch.device, vocab_size: int) -> int:
    """Rows of logits held at once if nothing is said.

    On CPU 256 rows keep the GEMM busy. On CUDA the chunk is as large as `_CUDA_WORKSPACE` of fp32
    logits of both sides allows, since dX of a small chunk has too few tiles to fill the device.
    """
    if device.type != "cuda":
        return _CPU_CHUNK
    rows = _CUDA_WORKSPACE // (8 * vocab_size) // 256 * 256
    return max(_MIN_CUDA_CHUNK, min(_MAX_CUDA_CHUNK, rows))
