"""Checks of what users pass: each failure says what was got, what was expected and what to do."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

from hero_kernels.options import (
    Design,
    Divergence,
    KernelOptions,
    LossAggregation,
    Objective,
    Support,
    TopKSource,
)

Choice = TypeVar("Choice", bound=Enum)


def choice(name: str, value: Any, kind: type[Choice]) -> Choice:
    """`value` as a member of `kind`."""
    try:
        return kind(value)
    except ValueError:
        expected = ", ".join(repr(str(member.value)) for member in kind)
        raise ValueError(f"{name} must be one of {expected}; got {value!r}.") from None


def positive(name: str, value: float | None, optional: bool = False) -> None:
    if value is None and optional:
        return
    # Comparisons alone, which torch.compile traces for a number that varies; false for NaN too.
    if value is None or not 0 < value < math.inf:
        remedy = ", or None to switch it off" if optional else ""
        raise ValueError(f"{name} must be a finite number above 0{remedy}; got {value}.")


def is_tensor(name: str, value: Any, dims: str) -> None:
    """A plain tensor; `dims` says its shape in the message."""
    if isinstance(value, torch.nn.Module):
        raise TypeError(
            f"{name} must be a tensor {dims}, got the module {type(value).__name__}: pass its "
            ".weight. If an "
            "adapter (LoRA) sits on the head, pass base weight plus adapter as one tensor: the "
            "base weight "
            "alone would ignore the adapter."
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {dims}, got {type(value).__name__}.")
    if hasattr(value, "full_tensor"):
        raise ValueError(
            f"{name} is a DTensor of placements {getattr(value, 'placements', '?')}; a whole "
            f"tensor {dims} is "
            "expected: gather the head once a step by hero_kernels.integrations.fsdp.whole_head, "
            "which has the gradient that FSDP2 wants; without gradient .full_tensor() will do."
        )


def no_grad_wanted(name: str, value: Tensor | None, what: str) -> None:
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but the loss has no gradient for {what}: pass {name}.detach(), "
            "or compute "
            "it under torch.no_grad()."
        )


def autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under torch.autocast, both in its type, as a linear layer would take them: fp64 stays."""
    if isinstance(hidden, Tensor) and isinstance(weight, Tensor):
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            return _autocast_to(dtype, hidden), _autocast_to(dtype, weight)
    return hidden, weight


def _autocast_to(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    is_eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if is_eligible else tensor


def first_order(function: str) -> None:
    """In a backward pass: gradients are constants there, second ones would be wrong."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{function} has no second-order gradients, which create_graph=True asks for: leave it "
            "out, or compute the loss by hero_kernels.reference, which is differentiable twice."
        )


def can_be_saved(name: str, value: Tensor | None) -> None:
    """Autograd keeps no tensor made under torch.inference_mode for a backward pass."""
    if value is not None and not torch.compiler.is_compiling() and value.is_inference():
        raise ValueError(
            f"{name} was made under torch.inference_mode, but reduction='none' and "
            "design='sliced' keep it for the backward pass: compute it under torch.no_grad() "
            f"instead, or pass {name}.clone()."
        )


def head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Hidden states [..., H], weight [V, H] and bias [V] belong together."""
    is_tensor(f"{side}_hidden", hidden, "[..., H]")
    is_tensor(f"{side}_weight", weight, "[V, H]")
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{side}_hidden {list(hidden.shape)} and {side}_weight {list(weight.shape)} do not "
            "match: expected "
            "[..., H] and [V, H] with the same H."
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(
            f"{side}_hidden is {hidden.dtype} and {side}_weight is {weight.dtype}: expected one "
            "floating-point "
            "type. Cast one of them, or call under torch.autocast, which casts both."
        )
    same_device(f"{side}_weight", weight, hidden)
    if bias is not None:
        is_tensor(f"{side}_bias", bias, "[V]")
        same_device(f"{side}_bias", bias, hidden)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"{side}_bias is {list(bias.shape)}; expected [{weight.shape[0]}], one per token."
            )


def same_device(name: str, value: Tensor, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(
            f"{name} is on {value.device}, the student's hidden states on {reference.device}: move "
            "it with "
            f".to({str(reference.device)!r})."
        )


def per_token(name: str, value: Tensor | None, hidden: Tensor, integer: bool = False) -> None:
    """`value` has the leading shape of `hidden` [..., H] or is that shape flattened."""
    if value is None:
        return
    is_tensor(name, value, "[...]")
    same_device(name, value, hidden)
    leading = tuple(hidden.shape[:-1])
    if tuple(value.shape) not in (leading, (math.prod(leading),)):
        raise ValueError(
            f"{name} is {list(value.shape)}; expected {list(leading)}, the leading shape of "
            "student_hidden "
            f"{list(hidden.shape)}: one entry per token."
        )
    if integer and (value.is_floating_point() or value.dtype == torch.bool):
        raise ValueError(f"{name} is {value.dtype}; expected int64 indices: use .long().")
    if not integer:
        no_grad_wanted(name, value, name)


def vocabulary(student: int, teacher: int | None, vocab_size: int | None) -> int:
    """The number of real tokens; two heads of different length need it said."""
    if vocab_size is None:
        if teacher is not None and teacher != student:
            raise ValueError(
                f"The student has {student} tokens and the teacher {teacher}. If one of them is "
                "padded and the "
                "tokenizers are the same, pass vocab_size, the number of tokens that are real; "
                "otherwise "
                "the two cannot be compared."
            )
        return student
    smaller = student if teacher is None else min(student, teacher)
    if not 1 <= vocab_size <= smaller:
        raise ValueError(
            f"vocab_size must be between 1 and {smaller}, the smaller head; got {vocab_size}."
        )
    return vocab_size


def objective(
    *,
    divergence: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    is_clip: float | None,
    pointwise_clip: float | None,
    vocab_size: int,
    support: str,
    top_k: int | None,
    top_k_source: str,
    top_k_tail: bool,
    has_teacher_topk: bool,
    has_old_logprobs: bool,
    has_targets: bool,
) -> Objective:
    """The settings as an `Objective`; ValueError for those that exclude or need each other."""
    kind = choice("divergence", divergence, Divergence)
    where = choice("support", support, Support)
    positive("temperature", temperature)
    positive("logit_scale", logit_scale)
    for name, bound in (
        ("softcap", softcap),
        ("is_clip", is_clip),
        ("pointwise_clip", pointwise_clip),
    ):
        positive(name, bound, optional=True)
    if kind == Divergence.JSD and not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta must lie between 0 and 1, got {beta}: at the ends the JSD is 0 for any student. "
            "For what other "
            "libraries call beta=0 and beta=1 use divergence='forward_kl' and 'reverse_kl'."
        )
    if has_old_logprobs and not has_targets:
        raise ValueError(
            "old_logprobs needs target_ids: the tokens whose log-probabilities they are."
        )
    if is_clip is not None and not has_old_logprobs:
        raise ValueError(
            "is_clip needs old_logprobs: there is no importance ratio to clip without them."
        )
    if where == Support.SAMPLED and (not has_targets or kind != Divergence.REVERSE_KL):
        raise ValueError(
            "support='sampled' estimates the reverse KL from the sampled token: pass target_ids "
            "and "
            f"divergence='reverse_kl'; got divergence={divergence!r}, target_ids "
            f"{'given' if has_targets else 'missing'}."
        )
    if where == Support.TOPK and not has_teacher_topk:
        if top_k is None or not 1 <= top_k <= vocab_size:
            raise ValueError(
                f"support='topk' needs top_k between 1 and {vocab_size}, the vocabulary; got "
                f"{top_k}."
            )
    elif top_k is not None:
        raise ValueError(
            f"top_k={top_k} has no effect here: it belongs to support='topk' and a teacher whose "
            "logits are known."
        )
    if has_teacher_topk and where != Support.TOPK:
        raise ValueError(f"teacher_topk needs support='topk'; got support={support!r}.")
    if pointwise_clip is not None and where != Support.FULL:
        raise ValueError(f"pointwise_clip needs support='full'; got support={support!r}.")
    return Objective(
        divergence=kind.code,
        beta=float(beta),
        temperature=float(temperature),
        softcap=float(softcap or 0.0),
        logit_scale=float(logit_scale),
        is_clip=float(is_clip or 0.0),
        pointwise_clip=float(pointwise_clip or 0.0),
        vocab_size=vocab_size,
        support=where.value,
        top_k=top_k or 0,
        top_k_source=choice("top_k_source", top_k_source, TopKSource).value,
        top_k_tail=top_k_tail,
    )


def pieces(
    options: KernelOptions, objective: Objective, weight: Tensor, teacher_weight: Tensor | None
) -> None:
    """What sees the vocabulary in pieces can do what is asked for; heads [V, H] or shards."""
    sharded = options.process_group is not None
    if sharded or options.design == Design.SLICED:
        asked = "options.process_group" if sharded else "options.design='sliced'"
        remedy = (
            "gather the head (torch.distributed.all_gather) and leave process_group None"
            if sharded
            else "use design='chunked'"
        )
        if objective.support != Support.FULL:
            raise ValueError(
                f"{asked} needs support='full', got support={objective.support!r}: {remedy}."
            )
        if objective.pointwise_clip:
            raise ValueError(
                f"{asked} has no pointwise_clip, got {objective.pointwise_clip}: leave it None, or "
                f"{remedy}."
            )
    if sharded and teacher_weight is not None and len(teacher_weight) != len(weight):
        raise ValueError(
            f"With options.process_group both heads must be cut alike: student_weight has "
            f"{len(weight)} tokens on this rank, teacher_weight {len(teacher_weight)}. Pad both "
            "vocabularies to the same length before cutting; vocab_size says how much is real."
        )
    if options.accumulate_weight_grad and torch.compiler.is_compiling():
        raise ValueError(
            "accumulate_weight_grad writes to the weight's gradient in the backward pass, which "
            "torch.compile cannot trace: leave it False, or call the loss outside of torch.compile."
        )
    if options.accumulate_weight_grad and weight.requires_grad and not weight.is_leaf:
        raise ValueError(
            "accumulate_weight_grad needs student_weight to be a parameter; got the result of an "
            "operation (a cast by torch.autocast, an adapter, a gathered shard): pass the "
            "parameter itself, or leave accumulate_weight_grad False."
        )


def whole_heads_only(function: str, options: KernelOptions) -> None:
    """The function sees whole rows of whole heads."""
    got = {
        "process_group": options.process_group,
        "design='sliced'": options.design == Design.SLICED,
        "memory_budget": options.memory_budget,
    }
    if named := [name for name, value in got.items() if value]:
        raise ValueError(
            f"{function} has no {named[0]}: it is an option of fused_linear_divergence. Leave it "
            "out; pass the whole head, and chunk_size for less memory."
        )


def grouping(
    turn_ids: Tensor | None,
    turn_weights: Tensor | None,
    trajectory_ids: Tensor | None,
    loss_aggregation: str,
) -> None:
    """Turns and trajectories are given where they are needed."""
    if turn_weights is not None:
        is_tensor("turn_weights", turn_weights, "[K]")
        if turn_ids is None:
            raise ValueError("turn_weights needs turn_ids: the turn that each token belongs to.")
        if turn_weights.dim() != 1:
            raise ValueError(
                f"turn_weights is {list(turn_weights.shape)}; expected [K], one per turn."
            )
        same_device("turn_weights", turn_weights, turn_ids)
        no_grad_wanted("turn_weights", turn_weights, "turn_weights")
    if loss_aggregation == LossAggregation.TURN and turn_ids is None:
        raise ValueError("loss_aggregation='turn' needs turn_ids: the turn of each token.")
    if loss_aggregation == LossAggregation.TRAJECTORY and trajectory_ids is None:
        raise ValueError(
            "loss_aggregation='trajectory' needs trajectory_ids: the trajectory of each token."
        )


def values_readable(reference: Tensor, validate: bool) -> bool:
    """Whether values may be looked at: on CPU unless traced, elsewhere only on request."""
    return not torch.compiler.is_compiling() and (validate or reference.device.type == "cpu")


def finite(name: str, value: Tensor | None) -> None:
    if value is not None and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(
            f"{name} has {bad} entries that are NaN or infinite of {value.numel()}; expected "
            "finite numbers "
            "(0 masks a token)."
        )


def below(name: str, ids: Tensor | None, size: int) -> None:
    """Ids are dense: no more of them than there are weights, or else tokens."""
    if ids is not None and ids.numel() and int(ids.max()) >= size:
        raise ValueError(
            f"{name} must be less than {size} (0-based; negative for none); got {int(ids.max())}."
        )


def targets(name: str, ids: Tensor, vocab_size: int, active: Tensor) -> None:
    """Tokens [N or N, k] of active rows [N] are in the vocabulary."""
    ids = ids[active]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(
            f"{name} of tokens with weight must lie between 0 and {vocab_size - 1}; got values "
            "from "
            f"{int(ids.min())} to {int(ids.max())}. Give the other tokens weight 0 in "
            "token_weights."
        )
