"""Which calls may stand inside a CUDA graph, found without a GPU.

What breaks a capture is an operation whose value or shape the host waits for, and a copy from
unpinned host memory. Torch's fake tensors pretend to be on a GPU: on the first they raise, and the
second is seen as an operation between devices. So this runs all of `hero_kernels` in front of the
row kernel, and the row kernel in torch; the Triton kernel makes no tensor but its result. It does
not prove that a capture works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hero_kernels import KernelOptions, fused_linear_divergence
from hero_kernels.call import Call
from hero_kernels.divergence import divergence
from hero_kernels.objective import Objective
from hero_kernels.types import Gradients, Head, RowTensors

N, H, V = 12, 8, 32
HOST_WAITS = (DataDependentOutputException, DynamicOutputShapeException)


class HostCopy(Exception):
    """A copy between host and device."""


class _Devices(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and (
            len({tensor.device for tensor in tensors}) > 1
        ):
            raise HostCopy(str(func))
        return result


def _copy(target: Tensor, source: Tensor) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.aten.copy_.default(target, source)


def _set_item(tensor: Tensor, index: Any, value: Any) -> None:
    target = _item(tensor, index)
    _copy(target, value) if isinstance(value, Tensor) else target.fill_(value)


def _item(tensor: Tensor, index: Any) -> Tensor:
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if part is Ellipsis:
            dim = tensor.dim() - (len(index) - 1)
            continue
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        else:
            tensor = torch.ops.aten.index(tensor, [*[None] * dim, part])
        dim += 1
    return tensor


OPERATIONS: dict[str, Callable[..., Any]] = {
    "__getitem__": _item,
    "__setitem__": _set_item,
    "__invert__": torch.ops.aten.bitwise_not.default,
    "contiguous": lambda tensor: torch.ops.aten.clone(
        tensor, memory_format=torch.contiguous_format
    ),
    "copy_": _copy,
    "nonzero": torch.ops.aten.nonzero.default,
    **dict.fromkeys(
        ("item", "__bool__", "__int__", "__float__"), torch.ops.aten._local_scalar_dense.default
    ),
}
"""Methods that ask for a guard of the device, which torch without CUDA has not, and the operations
that they are."""


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, operation in OPERATIONS.items():
        monkeypatch.setattr(Tensor, name, lambda *args, call=operation: call(*args))
    with FakeTensorMode(), _Devices():
        yield


def gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def ids() -> Tensor:
    return gpu(N, dtype=torch.int64)


def call(**settings: Callable[[], Tensor] | Any) -> Any:
    """The public function up to the op, whose fake stands for the loop."""
    arguments = {name: value() if callable(value) else value for name, value in settings.items()}
    hidden = gpu(N, H, dtype=torch.bfloat16)
    return fused_linear_divergence(
        hidden, gpu(V, H, dtype=torch.bfloat16), hidden.clone(), token_weights=gpu(N), **arguments
    )


def loop(
    dtype: torch.dtype = torch.bfloat16,
    shared: bool = True,
    tile_columns: int = 0,
    max_active_rows: int = 0,
    temperatures: bool = False,
    **objective: Any,
) -> Gradients:
    """The loop over tiles with gradients, statistics, targets and importance ratios."""
    weight = gpu(V, H, dtype=dtype)
    student = Head(gpu(N, H, dtype=dtype), weight, None)
    teacher = Head(gpu(N, H, dtype=dtype), weight if shared else weight.clone(), None)
    rows = RowTensors(gpu(N), ids(), gpu(N), gpu(N) if temperatures else None)
    call = Call("torch", 5, tile_columns, V, max_active_rows, True, True, with_stats=True)
    return divergence(student, teacher, rows, Objective(is_clip=2.0, **objective), call).gradients


SAFE_CALLS: dict[str, dict[str, Any]] = {
    "mask": {},
    "max_active_rows": {"options": KernelOptions(max_active_rows=6)},
    "num_items on the device": {"num_items": gpu},
    "num_items, a number": {"num_items": 5.0},
    "sum": {"reduction": "sum"},
    "per token": {"reduction": "none"},
    "temperature of each token": {"temperature": lambda: gpu(N)},
    "importance ratio": {"target_ids": ids, "old_logprobs": lambda: gpu(N), "is_clip": 2.0},
    "statistics": {"return_stats": True, "target_ids": ids},
    "turns with weights": {
        "return_stats": True,
        "turn_ids": ids,
        "turn_weights": lambda: gpu(4),
        "loss_aggregation": "turn",
    },
    "trajectories": {
        "turn_ids": ids,
        "trajectory_ids": ids,
        "loss_aggregation": "trajectory",
    },
}
UNSAFE_CALLS: dict[str, dict[str, Any]] = {
    "statistics of turns without weights": {"return_stats": True, "turn_ids": ids},
}


@pytest.mark.parametrize("name", SAFE_CALLS)
def test_no_wait_in_front_of_the_op(pretended_gpu: None, name: str) -> None:
    output = call(**SAFE_CALLS[name])
    loss = output.loss if SAFE_CALLS[name].get("return_stats") else output
    assert loss.device.type == "cuda"


@pytest.mark.parametrize("name", UNSAFE_CALLS)
def test_these_wait_for_the_device(pretended_gpu: None, name: str) -> None:
    with pytest.raises((*HOST_WAITS, HostCopy)):
        call(**UNSAFE_CALLS[name])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_active_rows": 6},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"shared": False},
        {"tile_columns": 16},
        {"temperatures": True},
        {"softcap": 5.0},
        {"support": "topk", "top_k": 3},
        {"support": "topk", "top_k": 3, "top_k_source": "teacher", "top_k_tail": False},
        {"support": "sampled", "divergence": "reverse_kl"},
    ],
    ids=lambda settings: ", ".join(f"{k}={v}" for k, v in settings.items()) or "default",
)
def test_no_wait_in_the_loop(pretended_gpu: None, settings: dict[str, Any]) -> None:
    grads = loop(**settings)
    assert grads.hidden is not None and grads.weight is not None
    assert grads.hidden.shape == (N, H) and grads.weight.shape == (V, H)
    assert grads.hidden.device.type == grads.weight.device.type == "cuda"


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: float(x.sum()),
        lambda x: bool(x.all()),
        Tensor.cpu,
    ],
    ids=["nonzero", "mask", "float", "bool", "cpu"],
)
def test_the_instrument_sees_a_wait(pretended_gpu: None, wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises((*HOST_WAITS, HostCopy)):
        wait(gpu(N))
