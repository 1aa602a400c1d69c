"""Checks of what users pass: each failure says what was got, what was expected and what to do."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from hero_kernels import gradients
from hero_kernels.kinds import is_plain, no_stand_in, served
from hero_kernels.objective import KernelOptions, Objective
from hero_kernels.types import RowTensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REAL = (*DTYPES, torch.bool, *INTEGERS)


@lru_cache(maxsize=256)
def _objective(**settings: Any) -> Objective:
    return Objective(**settings)


def objective(function: str, settings: Any) -> tuple[Objective, Tensor | None]:
    """The objective that keyword arguments describe, and the temperatures if they are a tensor.

    Args:
        function: public function, for the message about an unknown keyword.
        settings: as `ObjectiveKwargs`.
    """
    temperatures = None
    if unknown := settings.keys() - Objective.__dataclass_fields__.keys():
        raise TypeError(f"{function}() got an unexpected keyword argument {min(unknown)!r}.")
    for name, value in settings.items():
        if isinstance(value, Tensor) and name != "temperature":
            raise TypeError(
                f"{name} must be a number, got a tensor {list(value.shape)}: settings of the loss "
                "get no gradient. Pass a number, and a learnable scale by way of the head's weight."
            )
    if isinstance(settings.get("temperature"), Tensor):
        temperatures = settings["temperature"]
        is_tensor("temperature", temperatures, "[...]")
        real("temperature", temperatures)
        no_grad_wanted("temperature", temperatures, "the temperature")
        settings = {**settings, "temperature": 1.0}
    if torch.compiler.is_compiling():
        return Objective(**settings), temperatures
    try:
        return _objective(**settings), temperatures
    except TypeError:  # a list has no hash: Objective itself says what is wrong with it
        return Objective(**settings), temperatures


def options(given: Any) -> KernelOptions:
    if not isinstance(given, KernelOptions):
        raise TypeError(f"options must be KernelOptions(...), got {type(given).__name__}.")
    return given


def is_tensor(name: str, value: Any, dims: str) -> None:
    """A plain dense tensor with data; `dims` says its shape in the message."""
    is_usual = type(value) is Tensor or type(value) is torch.nn.Parameter
    is_usual = is_usual and value.layout == torch.strided and value.device.type != "meta"
    is_usual = is_usual and not (value.is_nested or value.is_quantized)
    if not is_usual or torch._C._are_functorch_transforms_active():
        served(name, value, dims)


def no_grad_wanted(name: str, value: Tensor | None, what: str) -> None:
    if value is None:
        return
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(
            f"{name} has a forward-mode tangent (jvp), and the loss is a constant in {what}: pass "
            f"{name}.detach()."
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but the loss has no gradient for {what}: pass {name}.detach(), "
            "or compute it under torch.no_grad()."
        )


def autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under torch.autocast, both in its type, as a linear layer would take them: fp64 stays."""
    usual = {Tensor, torch.nn.Parameter}
    are_usual = type(hidden) in usual and type(weight) in usual
    if (are_usual or (is_plain(hidden) and is_plain(weight))) and not hidden.is_meta:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            return _autocast_to(dtype, hidden), _autocast_to(dtype, weight)
    return hidden, weight


def _autocast_to(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    is_eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if is_eligible else tensor


def head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Hidden states [..., H], weight [V, H] and bias [V] belong together.

    Args:
        side: what the arguments' names begin with, as the caller knows them: "student_", "".
        hidden: states.
        weight: of the head.
        bias: of the head.
    """
    is_tensor(f"{side}hidden", hidden, "[..., H]")
    is_tensor(f"{side}weight", weight, "[V, H]")
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        gradients.no_tangent(
            {f"{side}hidden": hidden, f"{side}weight": weight, f"{side}bias": bias}
        )
    if (
        hidden.dim() < 1
        or weight.dim() != 2
        or hidden.shape[-1] != weight.shape[1]
        or 0 in weight.shape
    ):
        no_stand_in(f"{side}weight", weight)
        raise ValueError(
            f"{side}hidden {list(hidden.shape)} and {side}weight {list(weight.shape)} do not "
            "match: expected [..., H] and [V, H] with the same H, neither V nor H being 0."
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        no_stand_in(f"{side}weight", weight)
        raise ValueError(
            f"{side}hidden is {hidden.dtype} and {side}weight is {weight.dtype}: expected one type "
            "of float32, bfloat16, float16 and float64. Cast one of them, or call under "
            "torch.autocast, which casts both."
        )
    same_device(f"{side}weight", weight, f"{side}hidden", hidden)
    if bias is not None:
        is_tensor(f"{side}bias", bias, "[V]")
        same_device(f"{side}bias", bias, f"{side}hidden", hidden)
        if tuple(bias.shape) != (weight.shape[0],) or bias.dtype not in DTYPES:
            raise ValueError(
                f"{side}bias is {list(bias.shape)} of {bias.dtype}; expected "
                f"[{weight.shape[0]}], one floating-point number for each token."
            )


def same_device(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(
            f"{name} is on {value.device}, {reference_name} on {reference.device}: move it with "
            f".to({str(reference.device)!r})."
        )


def same_precision(student: Tensor, teacher: Tensor) -> None:
    """A teacher with its own head may have another type, but not fp64 beside another."""
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        raise ValueError(
            f"student_hidden is {student.dtype} and teacher_hidden {teacher.dtype}: float64 goes "
            "with float64 only. Cast the teacher's tensors to the student's type."
        )


def per_token(
    name: str, value: Tensor, reference_name: str, reference: Tensor, integer: bool = False
) -> None:
    """`value` has the leading shape of `reference` [..., H] or is that shape flattened."""
    is_tensor(name, value, "[...]")
    same_device(name, value, reference_name, reference)
    leading = tuple(reference.shape[:-1])
    if tuple(value.shape) not in (leading, (math.prod(leading),)):
        raise ValueError(
            f"{name} is {list(value.shape)}; expected {list(leading)}, the leading shape of "
            f"{reference_name} {list(reference.shape)}: one entry per token."
        )
    if integer and value.dtype not in INTEGERS:
        raise ValueError(f"{name} is {value.dtype}; expected int64 indices: use .long().")
    if not integer:
        real(name, value)
        no_grad_wanted(name, value, name)


def real(name: str, value: Tensor) -> None:
    if value.dtype not in REAL:
        raise ValueError(f"{name} is {value.dtype}; expected real numbers: use .float().")


def vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    """The number of real tokens of two heads, or of one twice; different lengths need it said."""
    if vocab_size is not None and (
        isinstance(vocab_size, bool | Tensor) or not hasattr(vocab_size, "__index__")
    ):
        raise TypeError(
            f"vocab_size must be an integer, got {vocab_size!r} ({type(vocab_size).__name__})."
        )
    if vocab_size is None:
        if teacher != student:
            raise ValueError(
                f"The student has {student} tokens and the teacher {teacher}. If one of them is "
                "padded and the tokenizers are the same, pass vocab_size, the number of tokens "
                "that are real; otherwise the two cannot be compared."
            )
        return student
    if not 1 <= vocab_size <= min(student, teacher):
        raise ValueError(
            f"vocab_size must be between 1 and {min(student, teacher)}, the smaller head; got "
            f"{vocab_size}."
        )
    return vocab_size


def objective_with(
    objective: Objective,
    vocab_size: int,
    target_ids: Tensor | None,
    old_logprobs: Tensor | None,
    teacher_topk: Any = None,
) -> None:
    """The settings go with the tensors that were given."""
    if old_logprobs is not None and target_ids is None:
        raise ValueError(
            "old_logprobs needs target_ids: the tokens whose log-probabilities they are."
        )
    if objective.is_clip is not None and old_logprobs is None:
        raise ValueError(
            "is_clip needs old_logprobs: there is no importance ratio to clip without them."
        )
    if objective.support == "sampled" and target_ids is None:
        raise ValueError("support='sampled' needs target_ids: the sampled tokens.")
    if teacher_topk is not None:
        if objective.support != "topk":
            raise ValueError(
                f"teacher_topk needs support='topk'; got support={str(objective.support)!r}."
            )
        if objective.top_k is not None:
            raise ValueError(
                f"top_k={objective.top_k} has no effect beside teacher_topk, whose tokens are the "
                "support: leave it out."
            )
    elif objective.support == "topk" and not 1 <= (objective.top_k or 0) <= vocab_size:
        raise ValueError(
            f"support='topk' needs top_k between 1 and {vocab_size}, the vocabulary; got "
            f"{objective.top_k}."
        )


def split(options: KernelOptions, objective: Objective, weights: tuple[Tensor, ...]) -> None:
    """What sees the vocabulary in parts can do what is asked for; heads [V, H] or shards."""
    sharded = options.process_group is not None
    if objective.support != "full":
        asked = "options.process_group" if sharded else "options.tile_columns"
        raise ValueError(
            f"{asked} needs support='full', got support={str(objective.support)!r}: leave it None; "
            "a whole head can be gathered by torch.distributed.all_gather."
        )
    if sharded and len(weights) == 2 and len(weights[0]) != len(weights[1]):
        raise ValueError(
            f"With options.process_group both heads must be cut alike: student_weight has "
            f"{len(weights[0])} tokens on this rank, teacher_weight {len(weights[1])}. Pad both "
            "vocabularies to the same length before cutting; vocab_size says how much is real."
        )


def values_readable(reference: Tensor, validate: bool) -> bool:
    """Whether values may be looked at: on CPU unless traced, elsewhere only on request."""
    if torch.compiler.is_compiling() or isinstance(reference, FakeTensor):
        return False
    return validate or reference.device.type == "cpu"


def finite(name: str, value: Tensor | None) -> None:
    if value is not None and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(
            f"{name} has {bad} entries that are NaN or infinite of {value.numel()}; expected "
            "finite numbers (0 masks a token)."
        )


def targets(
    name: str, ids: Tensor, vocab_size: int, active: Tensor,
    remedy: str = "Give the other tokens weight 0.",
) -> None:  # fmt: skip
    """Tokens [N or N, k] of active rows [N] are in the vocabulary."""
    ids = ids[active]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(
            f"{name} of tokens with weight must lie between 0 and {vocab_size - 1}; got values "
            f"from {int(ids.min())} to {int(ids.max())}. {remedy}"
        )


SHORT_ROW = "Fill a row of fewer tokens with others that it does not name, at log-probability -inf."


def rows(tensors: RowTensors, vocab_size: int, active: Tensor) -> None:
    """Rows that are `active` [N] hold values that can be."""
    if tensors.old_logprobs is not None:
        finite("old_logprobs", tensors.old_logprobs[active])
    if tensors.temperatures is not None and not bool((tensors.temperatures > 0).all()):
        raise ValueError(
            f"temperature must be above 0 for every token; got {float(tensors.temperatures.min())}."
        )
    if tensors.temperatures is not None:
        finite("temperature", tensors.temperatures)
    ids, logprobs = tensors.teacher_ids, tensors.teacher_logprobs
    if ids is None or logprobs is None:
        return
    targets("teacher_topk[0]", ids, vocab_size, active, SHORT_ROW)
    ids, logprobs = ids[active], logprobs[active]
    if bool(logprobs.isnan().any()) or bool((logprobs > 1e-3).any()):
        raise ValueError(
            "teacher_topk[1] holds NaN or numbers above 0, which are no log-probabilities: if they "
            "are probabilities, pass their .log()."
        )
    in_order = ids.sort(-1).values
    if bool((in_order[:, 1:] == in_order[:, :-1]).any()):
        raise ValueError(
            f"teacher_topk[0] names a token twice in a row: pass each token once. {SHORT_ROW}"
        )
    mass = logprobs.double().exp().sum(-1)
    if mass.numel() and float(mass.max()) > 1.0 + 1e-3:
        raise ValueError(
            f"teacher_topk[1] holds a mass of {float(mass.max()):.4f} in one row, more than 1: "
            "pass log-probabilities over the whole vocabulary, at this temperature."
        )
