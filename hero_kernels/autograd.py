"""The custom op around the loop over tiles, its fake and its gradient.

To autograd and to `torch.compile` the loop is one opaque operation of 13 tensors, five numbers in
one list and one string, everything else that a call is. (Each argument of an op costs time in each
call; numbers stay numbers because torch.compile cannot turn a symbol into text.)

The op is registered with the dispatcher as `torch.library.custom_op` would do it, less what that
does in each call, as filling in defaults of 15 arguments that have none.

Gradients of a scalar loss are formed in the forward pass, and the backward pass multiplies them by
the one upstream number: in place, unless `retain_graph=True` may want them again. For a loss per
row, and where columns are split, the backward pass runs the loop again with the row weights
multiplied by the upstream gradient, so any upstream gradient is right; split rows get their
statistics and values back as `saved`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch._library.custom_ops import get_library_allowing_overwrite

from hero_kernels.call import decoded_call, decoded_objective, encoded
from hero_kernels.constants import NUM_STATS
from hero_kernels.divergence import divergence
from hero_kernels.kinds import is_plain
from hero_kernels.memory import SAVED
from hero_kernels.types import GRADIENT_DTYPE, Head, RowTensors


class Inputs(NamedTuple):
    """The arguments of the op, in order."""

    student_hidden: Tensor  # [N, H]
    student_weight: Tensor  # [V, H]
    student_bias: Tensor | None  # [V]
    teacher_hidden: Tensor | None  # [N, H_t]
    teacher_weight: Tensor | None  # [V, H_t]; None for the student's
    teacher_bias: Tensor | None  # [V]
    row_weights: Tensor  # [N], and so on as `RowTensors`
    target_ids: Tensor | None
    old_logprobs: Tensor | None
    temperatures: Tensor | None
    teacher_ids: Tensor | None
    teacher_logprobs: Tensor | None
    saved: Tensor | None  # [N, 15] of an earlier call
    numbers: Sequence[float]  # as `call.numbers_of` returns them
    call: str  # as `call.encoded` returns it


def same_memory(a: Any, b: Any) -> bool:
    """Whether two tensors, or None, are one. Traced ones have no address yet: False for views."""
    if a is b:
        return True
    if torch.compiler.is_compiling() or not (is_plain(a) and is_plain(b)):
        return False
    if not (a.layout == b.layout == torch.strided) or a.is_nested or b.is_nested:
        return False  # neither is served: the checks say so
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return alike and a.stride() == b.stride() and a.data_ptr() == b.data_ptr() != 0


def _schema() -> str:
    kinds: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str"}
    kinds[Sequence[float]] = "float[]"
    hints = get_type_hints(Inputs)
    arguments = ", ".join(f"{kinds[hints[name]]} {name}" for name in Inputs._fields)
    return f"({arguments}) -> ({', '.join(['Tensor'] * 6)})"


# As custom_op does it: an import after the package left sys.modules takes the place of the former.
_LIBRARY = get_library_allowing_overwrite("hero_kernels", "linear_divergence")
_LIBRARY.define("linear_divergence" + _schema(), tags=(torch.Tag.pt2_compliant_tag,))
linear_divergence = torch.ops.hero_kernels.linear_divergence.default


@torch.library.impl(_LIBRARY, "linear_divergence", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics and gradients; arguments as in `Inputs`.

    Returns:
        loss ([N] if per row, else []), stats [N, 8], the gradients of the student's hidden states,
        weight and bias, of type `GRADIENT_DTYPE`, empty where not asked for; and what split rows
        want back as `saved`, [N, 15], else empty.
    """
    inputs = Inputs(*arguments)
    call = decoded_call(inputs.call)
    student = Head(*inputs[:3])
    teacher = None
    if inputs.teacher_hidden is not None:
        teacher = student._replace(hidden=inputs.teacher_hidden)
        if inputs.teacher_weight is not None:
            own = Head(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias)
            # To torch.compile a detached view of the student's weight was another tensor.
            if not all(same_memory(*pair) for pair in zip(student[1:], own[1:], strict=True)):
                teacher = own
    objective = decoded_objective(inputs.call, *inputs.numbers)
    result = divergence(student, teacher, RowTensors(*inputs[6:12]), objective, call, inputs.saved)
    saved = result.saved if call.tile_columns else None
    d_hidden, d_weight, d_bias, saved = [
        student.hidden.new_empty(0) if tensor is None else tensor
        for tensor in (*result.gradients, saved)
    ]
    loss = result.losses if call.per_row else result.losses.sum()
    return loss, result.stats, d_hidden, d_weight, d_bias, saved


@torch.library.register_fake("hero_kernels::linear_divergence", lib=_LIBRARY)
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(*arguments)
    call = decoded_call(inputs.call)
    num_rows = inputs.student_hidden.shape[0]
    wide = torch.promote_types(inputs.student_hidden.dtype, torch.float32)
    loss = inputs.row_weights.new_empty(num_rows if call.per_row else ())
    stats = inputs.student_hidden.new_empty(num_rows, NUM_STATS, dtype=wide)
    needed = call.need_hidden, call.need_weight, call.need_bias
    hidden, weight, bias = (
        tensor.new_empty(tensor.shape, dtype=GRADIENT_DTYPE[tensor.dtype])
        if need and tensor is not None
        else inputs.student_hidden.new_empty(0)
        for tensor, need in zip(inputs[:3], needed, strict=True)
    )
    saved = inputs.student_hidden.new_empty(0)
    if call.tile_columns:
        saved = stats.new_empty(num_rows, SAVED)
    return loss, stats, hidden, weight, bias, saved


class _LinearDivergence(torch.autograd.Function):
    """The op for tensors of which some require grad."""

    @staticmethod
    def forward(ctx: Any, keys: torch._C.DispatchKeySet, *arguments: Any) -> tuple[Tensor, ...]:
        output = _below_autograd(keys, *arguments)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        given = Inputs(*arguments)
        call = decoded_call(given.call)
        ctx.call, ctx.numbers = given.call, given.numbers
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in given[:3]]
        ctx.recomputes = call.per_row or call.tile_columns > 0
        if ctx.recomputes:
            saved = output[5] if call.tile_columns else None
            ctx.save_for_backward(*given[:12], saved)
        else:
            ctx.spent = False
            ctx.save_for_backward(*output[2:5])
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:4]
        constants = (None,) * (len(Inputs._fields) - 3)
        if upstream is None:
            return (None, None, None, None, *constants)
        first_order("fused_linear_divergence")
        if ctx.recomputes:
            call = decoded_call(ctx.call).with_needs(needed)
            text = encoded(decoded_objective(ctx.call, *ctx.numbers), call.text)
            inputs = Inputs._make((*ctx.saved_tensors, ctx.numbers, text))
            # A masked row stays masked, whatever gradient arrives for it.
            weights = (inputs.row_weights * upstream).where(inputs.row_weights != 0, 0.0)
            grads = linear_divergence(*inputs._replace(row_weights=weights))[2:5]
        else:
            saved = ctx.saved_tensors
            if ctx.spent:  # an earlier pass raised before torch could free the graph
                raise RuntimeError(
                    "A backward pass of this loss has failed before and used its gradients up: "
                    "compute the loss again."
                )
            ctx.spent = _is_last_use(upstream)
            times = _in_place if ctx.spent else torch.mul
            grads = [times(grad, upstream) for grad in saved]
        wanted = (
            grad.to(dtype) if need else None
            for grad, dtype, need in zip(grads, ctx.dtypes, needed, strict=True)
        )
        return (None, *wanted, *constants)


def _is_last_use(upstream: Tensor) -> bool:
    """Whether nobody can want the saved gradients after their product with `upstream`.

    Others may: a later pass (`retain_graph`), further upstream gradients of a batch, a trace that
    is being recorded, and the replay of a CUDA graph.
    """
    functorch: Any = torch._C._functorch
    if torch.compiler.is_compiling() or type(upstream) is not Tensor:
        return False
    if functorch.is_legacy_batchedtensor(upstream) or functorch.is_batchedtensor(upstream):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._ops._len_torch_dispatch_stack_pre_dispatch():
        return False
    if upstream.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _in_place(grad: Tensor, upstream: Tensor) -> Tensor:
    """The product, in the memory of `grad`."""
    if upstream.is_cpu and upstream.item() == 1:  # on a GPU the question would wait for it
        return grad
    return grad.mul_(upstream)


def _below_autograd(keys: torch._C.DispatchKeySet, *arguments: Any) -> tuple[Tensor, ...]:
    """The op by those of its dispatch keys that come after autograd's."""
    with torch._C._AutoDispatchBelowAutograd():
        keys = keys & torch._C._after_autograd_keyset
        output: tuple[Tensor, ...] = linear_divergence.redispatch(keys, *arguments)
        return output


def _autograd(keys: torch._C.DispatchKeySet, *arguments: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        output: tuple[Tensor, ...] = _LinearDivergence.apply(keys, *arguments)
        return output
    return _below_autograd(keys, *arguments)


_LIBRARY.impl("linear_divergence", _autograd, "Autograd", with_keyset=True)


def first_order(function: str) -> None:
    """In a backward pass: gradients are constants there, second ones would be wrong."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{function} has no second-order gradients, which create_graph=True asks for: leave it "
            "out, or compute the loss by hero_kernels.reference, which is differentiable twice."
        )
