"""The table of implementations: what each can do, and which one `impl="auto"` takes."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from hero_kernels.constants import DIVERGENCE_CODES
from hero_kernels.objective import SUPPORTS, choice

FUNCTIONS = ("fused_linear_divergence", "linear_logprobs")


@dataclass(frozen=True)
class Implementation:
    """One set of row kernels."""

    module: str
    """A module as `types.RowKernels`; without `splits` it has `divergence_rows` only."""
    device: str | None
    """The device it runs on; None for any."""
    dtypes: tuple[torch.dtype, ...]
    divergences: tuple[str, ...] = ("jsd", "forward_kl", "reverse_kl")
    full_only: bool = True
    """Whether it has `support="full"` only."""
    splits: bool = False
    """Whether it works on tiles of some columns too."""
    logprobs: str | None = None
    """A module with `logprob_rows` and `logprob_gradient` (rows_logprobs.py); None for none."""


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = {
    "torch": Implementation(
        "hero_kernels.rows",
        None,
        (*_FLOATS, torch.float64),
        divergences=tuple(DIVERGENCE_CODES),
        full_only=False,
        splits=True,
        logprobs="hero_kernels.rows_logprobs",
    ),
    "cpu": Implementation("hero_kernels.cpu", "cpu", _FLOATS),
    "cuda": Implementation("hero_kernels.cuda", "cuda", _FLOATS),
    "triton": Implementation(
        "hero_kernels.triton.rows",
        "cuda",
        _FLOATS,
        splits=True,
        logprobs="hero_kernels.triton.logprobs",
    ),
}
AUTO = ("torch", "cpu", "cuda", "triton")
"""What `impl="auto"` may take, the last one that serves: not before its speed has been measured.
`python -m benchmarks.settle` writes this line from a session on a GPU."""


class Request(NamedTuple):
    """What decides whether an implementation can serve a call."""

    device: str
    dtype: torch.dtype
    """Of the student's hidden states and weight."""
    divergence: str = "jsd"
    support: str = "full"
    split: bool = False
    """Whether the vocabulary is seen in tiles or on several ranks."""
    function: str = "fused_linear_divergence"
    """One of `FUNCTIONS`."""


def supports(
    impl: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    divergence: str = "jsd",
    support: str = "full",
    function: str = "fused_linear_divergence",
    split: bool = False,
) -> str | None:
    """Whether an implementation can serve a call of `fused_linear_divergence`, or of
    `linear_logprobs`.

    Args:
        impl: "torch", "cpu", "cuda" or "triton"; "auto" for any of them.
        device: where the tensors are.
        dtype: of the student's hidden states and weight.
        divergence: as there.
        support: as there.
        function: "fused_linear_divergence" (and `divergence_from_logits`) or "linear_logprobs".
        split: whether `tile_columns` or a process group splits the vocabulary.

    Returns:
        None if it can, else the reason why not.

    Raises:
        ValueError: there is no implementation, support or function of that name.
    """
    choice("function", function, FUNCTIONS)
    choice("divergence", divergence, DIVERGENCE_CODES)
    choice("support", support, SUPPORTS)
    where = torch.device(device)
    request = Request(str(where), dtype, str(divergence), str(support), split, str(function))
    if impl == "auto":
        try:
            choose(impl, request)
        except ValueError as error:
            return str(error)
        return None
    return refusal(impl, request)


@functools.lru_cache(maxsize=1024)
def refusal(impl: str, request: Request) -> str | None:
    """Why `impl` cannot serve, or None if it can; raises ValueError for an unknown name."""
    if impl not in IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in ("auto", *IMPLEMENTATIONS))
        raise ValueError(f"Unknown impl {impl!r}: expected one of {names}.")
    entry, device = IMPLEMENTATIONS[impl], torch.device(request.device)
    if entry.device not in (None, device.type):
        return f"it runs on {entry.device}, the tensors are on {device.type}"
    if request.dtype not in entry.dtypes:
        return f"it does not take {request.dtype}"
    if request.function == "linear_logprobs":
        if entry.logprobs is None:
            return f"it has no kernels for {request.function}"
        module = _load(entry.logprobs)
    else:
        if request.divergence not in entry.divergences:
            return f"it has no divergence={request.divergence!r}"
        if entry.full_only and request.support != "full":
            return f"support={request.support!r} is implemented by 'torch' only"
        if request.split and not entry.splits:
            return "it sees whole rows only, and here the vocabulary is split"
        module = _load(entry.module)
    return module if isinstance(module, str) else None


@functools.lru_cache(maxsize=1024)
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
    for name in reversed(AUTO):
        if refusal(name, request) is None:
            return name
    raise ValueError(
        f"No implementation takes {request.dtype}; expected float32, bfloat16, float16 or float64."
    )


def chosen(impl: str, *request: Any) -> str:
    """`choose` by the fields of a `Request`; `torch.compile` does not trace into it."""
    return choose(impl, Request(*request))


# As `torch.compiler.assume_constant_result` does, which would import torch._dynamo: seconds.
chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def row_kernels(impl: str) -> ModuleType:
    """The module of the implementation `impl`; see `types.RowKernels`."""
    return importlib.import_module(IMPLEMENTATIONS[impl].module)


@functools.cache
def logprob_kernels(impl: str) -> ModuleType:
    """The module with `logprob_rows` and `logprob_gradient` of the implementation `impl`."""
    path = IMPLEMENTATIONS[impl].logprobs
    assert path is not None  # `refusal` has been asked
    return importlib.import_module(path)


@functools.cache
def _load(path: str) -> ModuleType | str:
    """A module of row kernels, or why it is unavailable here."""
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        return f"it cannot be imported: {error}"
    available = getattr(module, "available", None)
    return (available and available()) or module
