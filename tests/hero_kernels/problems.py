"""Random problems, and the comparison of an implementation with the fp64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hero_kernels
from hero_kernels import DivergenceOutput, KernelOptions, reference

DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")
DEVICE = {"cuda": "cuda", "triton": "cuda"}
"""Where an implementation runs, if not on the CPU."""


def missing(impl: str, function: str = "fused_linear_divergence") -> str | None:
    """Why an implementation cannot run on this machine."""
    if DEVICE.get(impl) == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device"
    return hero_kernels.supports(impl, device=DEVICE.get(impl, "cpu"), function=function)


@dataclass
class Problem:
    """Tensors of one call; the student's require grad."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor | None
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None

    def to(self, device: str, dtype: torch.dtype) -> Problem:
        """A copy, detached; the student's part requires grad."""

        def copy(tensor: Tensor | None, trainable: bool) -> Tensor | None:
            if tensor is None:
                return None
            return (
                tensor.detach().to(device=device, dtype=dtype, copy=True).requires_grad_(trainable)
            )

        fields = vars(self).items()
        return Problem(**{name: copy(value, "student" in name) for name, value in fields})

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: value.grad
            for name, value in vars(self).items()
            if value is not None and value.grad is not None
        }

    def positional(self) -> tuple[Any, ...]:
        return self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight

    def biases(self) -> dict[str, Any]:
        return {"student_bias": self.student_bias, "teacher_bias": self.teacher_bias}


def make_problem(
    rows: int,
    hidden: int,
    vocab: int,
    *,
    shared: bool = True,
    bias: bool = False,
    distance: float = 0.3,
    sharpness: float = 1.0,
    teacher_size: int | None = None,
    teacher_vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """Hidden states [rows, hidden] and heads [vocab, hidden].

    Args:
        rows: N.
        hidden: H.
        vocab: V.
        shared: teacher and student share the head.
        bias: the heads have biases.
        distance: size of h_s - h_t relative to h_t.
        sharpness: standard deviation of the logits.
        teacher_size: H of a teacher with its own head.
        teacher_vocab: V of a teacher with its own head.
        dtype: of all tensors.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    weight = normal(vocab, hidden) * sharpness / hidden**0.5
    h_t = normal(rows, hidden)
    h_s = h_t + distance * normal(rows, hidden)
    own = None if shared else normal(teacher_vocab or vocab, teacher_size or hidden) / hidden**0.5
    if not shared:
        h_t = normal(rows, teacher_size or hidden)
    return Problem(
        h_s,
        weight,
        h_t,
        own,
        normal(vocab) if bias else None,
        normal(teacher_vocab or vocab) if bias and not shared else None,
    ).to("cpu", dtype)


def run(
    problem: Problem,
    impl: str,
    device: str,
    dtype: torch.dtype,
    loss_scale: float = 1.0,
    **settings: Any,
) -> tuple[DivergenceOutput, Problem]:
    """Loss, statistics and (`loss_scale` times) gradients of an implementation."""
    copy = problem.to(device, dtype)
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in settings.items()
    }
    output = hero_kernels.fused_linear_divergence(
        *copy.positional(), **copy.biases(), **moved, impl=impl, return_stats=True
    )
    assert isinstance(output, DivergenceOutput)
    (loss_scale * output.loss.sum()).backward()
    return output, copy


def truth(problem: Problem, **settings: Any) -> tuple[DivergenceOutput, Problem]:
    """The same from the fp64 reference."""
    copy = problem.to("cpu", torch.float64)
    output = reference.fused_linear_divergence(*copy.positional(), **copy.biases(), **settings)
    output.loss.sum().backward()
    return output, copy


class ProductCounter(TorchDispatchMode):
    """Counts the floating-point operations of all matrix products beneath it."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            left, right = [value for value in args if isinstance(value, Tensor)][-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def relative_error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over that of `expected`, or over `floor` if larger; absolute at 0."""
    got, expected = got.detach().cpu().double(), expected.detach().double()
    scale = expected.norm().clamp(min=floor)
    return float((got - expected).norm() / (scale if scale > 0 else 1.0))


def active_tokens(
    rows: int,
    token_weights: Tensor | None = None,
    turn_ids: Tensor | None = None,
    turn_weights: Tensor | None = None,
    trajectory_ids: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """[rows] bool: the tokens that count; the statistics of the others are 0."""
    active = torch.ones(rows, dtype=torch.bool)
    if token_weights is not None:
        active &= token_weights != 0
    if turn_ids is not None:
        active &= turn_ids >= 0
        if turn_weights is not None:
            active &= turn_weights[turn_ids.clamp(min=0)] != 0
    if trajectory_ids is not None:
        active &= trajectory_ids >= 0
    return active


def assert_agrees(
    problem: Problem,
    impl: str,
    device: str,
    tolerance: float = 2e-5,
    options: KernelOptions | None = None,
    **settings: Any,
) -> None:
    """Loss, statistics and gradients in fp32 equal the fp64 reference, relatively."""
    got, student = run(problem, impl, device, torch.float32, **settings, options=options)
    expected, true_student = truth(problem, **settings)
    active = active_tokens(len(problem.student_hidden), **settings)
    for name, value in expected._asdict().items():
        ours = getattr(got, name)
        assert (ours is None) == (value is None), name
        if value is not None:
            if value.shape == active.shape and name != "per_turn":
                value = value.where(active, 0.0)
            assert relative_error(ours, value) <= tolerance, name
    gradients = true_student.gradients()
    assert student.gradients().keys() == gradients.keys()
    for name, value in gradients.items():
        assert relative_error(student.gradients()[name], value) <= 5 * tolerance, (
            f"gradient of {name}"
        )


def peak_bytes(function: Any) -> int:
    """Most bytes that the CPU allocator held at once during a call, beyond those before it and
    without memory that an earlier call has left."""
    hero_kernels.release_memory()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()
    del result
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def loss_of(problem: Problem, impl: str = "auto", **settings: Any) -> Tensor:
    """The fused divergence of a problem, biases included."""
    loss = hero_kernels.fused_linear_divergence(
        *problem.positional(), **problem.biases(), impl=impl, **settings
    )
    assert isinstance(loss, Tensor)
    return loss


def check_second_backward(loss: Tensor, leaves: list[Tensor]) -> None:
    """Two passes give the same gradients, and three times the upstream gradient thrice as much."""
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    threefold = torch.autograd.grad(3.0 * loss, leaves)
    for first, second, third in zip(once, again, threefold, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(third, 3 * first)
