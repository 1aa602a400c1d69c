"""What is no number, no tensor with data or no argument at all is named, with the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_errors import LONG, OWN, H, N, V, call
from torch import nn
from torch.masked import MaskedTensor

from hero_kernels import (
    FusedLinearDivergence,
    KernelOptions,
    divergence_from_logits,
    fused_linear_divergence,
    linear_logprobs,
)


def test_module_or_list_in_place_of_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"got the module Linear: pass its \.weight\."):
        call(student_weight=nn.Linear(H, V))
    for name in ("token_weights", "turn_ids", "trajectory_ids", "target_ids"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor.*got list"):
            call(**{name: [1] * N})


def test_dtensor_head() -> None:
    """Any tensor that answers to `full_tensor` is a shard of one."""

    class Shard(torch.Tensor):
        placements = ("Shard(0)",)

        def full_tensor(self) -> torch.Tensor:
            return torch.Tensor(self)

    with pytest.raises(
        ValueError,
        match=r"DTensor of placements \('Shard\(0\)',\).*fsdp\.whole_head.*\.full_tensor\(\)",
    ):
        call(student_weight=torch.randn(V, H).as_subclass(Shard))


FUNCTIONS: dict[str, Any] = {
    "fused_linear_divergence": call,
    "divergence_from_logits": lambda **changes: divergence_from_logits(
        torch.randn(N, V), torch.randn(N, V), **changes
    ),
    "FusedLinearDivergence": FusedLinearDivergence,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_unknown_keyword(name: str) -> None:
    message = rf"{name}\(\) got an unexpected keyword argument 'temprature'"
    with pytest.raises(TypeError, match=message):
        FUNCTIONS[name](temprature=0.5)
    with pytest.raises(TypeError, match=r"linear_logprobs.*'temprature'"):
        linear_logprobs(torch.randn(N, H), torch.randn(V, H), LONG, temprature=0.5)


def test_other_functions() -> None:
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    with pytest.raises(ValueError, match="impl='triton' cannot serve this call: it runs on cuda"):
        linear_logprobs(hidden, weight, LONG, impl="triton")
    with pytest.raises(ValueError, match=r"impl='cpu' cannot serve this call.*torch\.float64"):
        linear_logprobs(hidden.double(), weight.double(), LONG, impl="cpu")
    with pytest.raises(ValueError, match=r"Unknown impl 'cublas'.*'auto', 'torch', 'cpu'"):
        linear_logprobs(hidden, weight, LONG, impl="cublas")
    with pytest.raises(
        ValueError, match="target_ids of tokens with weight must lie between 0 and 19"
    ):
        linear_logprobs(hidden, weight, LONG + V)
    with pytest.raises(ValueError, match=r"logit_scale must be a finite .*got 0\.0"):
        linear_logprobs(hidden, weight, LONG, logit_scale=0.0)
    with pytest.raises(ValueError, match="same leading shape"):
        divergence_from_logits(torch.randn(3, V), torch.randn(4, V))
    with pytest.raises(ValueError, match="pass vocab_size"):
        divergence_from_logits(torch.randn(3, V), torch.randn(3, V + 1))
    with pytest.raises(ValueError, match=r"teacher_logits\.detach\(\)"):
        divergence_from_logits(torch.randn(3, V), torch.randn(3, V, requires_grad=True))


@pytest.mark.parametrize("value", ["2", [2.0], {"a": 1}])
@pytest.mark.parametrize("name", ["temperature", "beta", "logit_scale", "softcap", "top_k"])
def test_settings_of_the_wrong_type_are_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an? .*, got"):
        call(**{name: value})


def test_a_fractional_k_and_options_as_a_dict_are_named() -> None:
    with pytest.raises(TypeError, match=r"top_k must be an integer, got 5\.0"):
        call(support="topk", top_k=5.0)
    for function in (
        call,
        lambda **k: linear_logprobs(torch.zeros(N, H), OWN["teacher_weight"], LONG, **k),
    ):
        with pytest.raises(TypeError, match=r"options must be KernelOptions.*got dict"):
            function(options={"tile_rows": 4})


def test_everything_on_the_meta_device_is_named() -> None:
    tensors = {"student_hidden": (N, H), "student_weight": (V, H), "teacher_hidden": (N, H)}
    with pytest.raises(ValueError, match="student_hidden is on the meta device, without data"):
        call(**{name: torch.empty(shape, device="meta") for name, shape in tensors.items()})


def test_fake_tensors_have_shapes_and_no_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = {"student_hidden": (N, H), "student_weight": (V, H), "teacher_hidden": (N, H)}
        made = {name: torch.empty(shape) for name, shape in tensors.items()}
        assert call(**made, token_weights=torch.ones(N)).shape == ()


class Doubled(torch.Tensor):
    """A class of a library that overrides what torch's functions do."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return super().__torch_function__(function, types, args, kwargs or {})


class Wrapper(torch.Tensor):
    """A class that overrides what torch's operations do, without memory of its own."""

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RecursionError("a way back into itself")


CHANGED = "whose class changes what torch's functions do; expected a plain dense tensor"
STRANGE = {
    "masked": (lambda value: MaskedTensor(value, value == value), rf"MaskedTensor, {CHANGED}"),
    "function": (lambda value: value.as_subclass(Doubled), rf"Doubled, {CHANGED}"),
    "dispatch": (Wrapper, rf"Wrapper, {CHANGED}"),
    "lazy": (lambda value: nn.UninitializedParameter(), rf"UninitializedParameter, {CHANGED}"),
    "jagged": (
        lambda value: torch.nested.nested_tensor([value], layout=torch.jagged),
        rf"NestedTensor, {CHANGED}",
    ),
    "nested": (lambda value: torch.nested.nested_tensor([value]), r"nested tensor.*\.values\(\)"),
    "sparse": (lambda value: value.to_sparse(), r"sparse_coo; expected a dense tensor"),
    "csr": (lambda value: value.view(len(value), -1).to_sparse_csr(), r"sparse_csr; expected"),
    "quantized": (
        lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        r"qint8; expected a dense tensor.*\.dequantize\(\)",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize(
    "name",
    ["student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "token_weights",
     "turn_ids", "turn_weights", "trajectory_ids", "target_ids", "student_bias", "temperature",
     "teacher_topk", "teacher_bias", "old_logprobs", "num_items"],
)  # fmt: skip
def test_tensors_of_another_build_are_named(name: str, kind: str) -> None:
    make, message = STRANGE[kind]
    shapes = {
        "student_weight": (V, H), "teacher_weight": (V, H), "student_bias": (V,),
        "teacher_bias": (V,), "num_items": (1,),
    }  # fmt: skip
    plain = torch.ones(shapes.get(name, (N, H) if "hidden" in name else (N,)))
    given: dict[str, Any] = {name: make(plain.long() if name.endswith("_ids") else plain)}
    if name == "teacher_topk":
        pair = (make(torch.ones(N, 2).long()), torch.full((N, 2), -2.0))
        given = {name: pair, "teacher_hidden": None, "support": "topk"}
    elif name == "turn_weights":
        given["turn_ids"] = LONG
    elif name == "old_logprobs":
        given["target_ids"] = LONG
    elif name == "teacher_bias":
        given |= OWN
    with pytest.raises(ValueError, match=rf"{name}.* is (a |torch\.){message}"):
        call(**given)


def test_a_class_that_changes_nothing_is_served() -> None:
    class Named(torch.Tensor):
        """As some libraries have, to carry a name along."""

    given = {"student_hidden": torch.randn(N, H), "teacher_hidden": torch.randn(N, H)}
    weight = torch.randn(V, H)
    named = {name: value.as_subclass(Named) for name, value in given.items()}
    assert float(call(**named, student_weight=weight)) == float(
        call(**given, student_weight=weight)
    )


TRANSFORMED = {
    "student_hidden": (N, H), "teacher_hidden": (N, H), "student_weight": (V, H),
    "student_bias": (V,), "token_weights": (N,), "temperature": (N,),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMED)
def test_batches_of_vmap_and_tangents_are_named(name: str) -> None:
    """A tangent would be dropped, as if the loss did not depend on the argument."""
    value = torch.rand(TRANSFORMED[name]) + 0.5
    others = {n: torch.randn(TRANSFORMED[n]) for n in list(TRANSFORMED)[:3] if n != name}
    with pytest.raises(RuntimeError, match=rf"{name} is inside torch\.vmap"):
        torch.vmap(lambda x: fused_linear_divergence(**others, **{name: x}))(
            value.expand(2, *value.shape)
        )
    with pytest.raises(RuntimeError, match=rf"{name} has a forward-mode tangent"):
        torch.func.jvp(lambda x: fused_linear_divergence(**others, **{name: x}), (value,), (value,))


def test_sizes_that_are_no_integers_are_named() -> None:
    for name in ("tile_rows", "tile_columns", "memory_budget", "max_active_rows"):
        for value in ("8", 2.5, 1e9, True):
            with pytest.raises(TypeError, match=f"{name} must be an integer, got"):
                KernelOptions(**{name: value})
    for value in ("20", 20.0, True, torch.tensor(20)):
        with pytest.raises(TypeError, match="vocab_size must be an integer, got"):
            call(vocab_size=value)


def test_complex_ids_of_a_server_are_named() -> None:
    pair = (LONG[:, None].to(torch.complex64), torch.full((N, 1), -2.0))
    with pytest.raises(ValueError, match=r"teacher_topk is of torch\.complex64.*integer ids"):
        call(teacher_hidden=None, teacher_topk=pair, support="topk")


@pytest.mark.parametrize("name", ["token_weights", "turn_weights", "old_logprobs", "temperature"])
@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.float8_e5m2, torch.float8_e4m3fn, torch.uint16, torch.uint64]
)
def test_numbers_that_torch_does_not_compute_with_are_named(name: str, dtype: torch.dtype) -> None:
    given: dict[str, Any] = {name: torch.ones(N).to(dtype)}
    if name == "turn_weights":
        given["turn_ids"] = torch.zeros(N, dtype=torch.int64)
    if name == "old_logprobs":
        given["target_ids"] = LONG
    with pytest.raises(ValueError, match=rf"{name} is {dtype}; expected real numbers"):
        call(**given)
    with pytest.raises(ValueError, match=r"turn_ids is torch\.complex64; expected int64"):
        call(turn_ids=LONG.to(torch.complex64))


def test_statistics_of_turns_with_names_too_large() -> None:
    huge = torch.full((N,), 2**40)
    call(turn_ids=huge, loss_aggregation="turn")
    with pytest.raises(ValueError, match=r"turn_ids go up to 1099511627776.*return_stats False"):
        call(turn_ids=huge, return_stats=True)
