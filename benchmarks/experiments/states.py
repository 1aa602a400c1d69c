"""Hidden states of student and teacher, the gradient of their logits, and the truth in fp64.

Real ones come from SmolLM2-135M-Instruct reading files of this repository: the model is asked to go
on with a text, the student reads the request alone, the teacher the same with a block of hindsight
spliced in, as in training. `hint` gives away nothing of the text that follows, `answer` all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.problem import BETA, SHARPNESS
from hero_kernels import backends, gemm, reference
from hero_kernels.chunked import difference_operand
from hero_kernels.options import Divergence

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "smollm2-135m"
DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")
TEXTS = (
    "README.md", "docs/loss.md", "docs/method.md", "docs/environments.md",
    "hero_kernels/chunked.py", "hero/rollout.py", "csrc/row_kernel.cpp", "docs/faq.md",
)  # fmt: skip
REQUEST = "Go on with this text.\n\n"
HINT = "Be precise, keep to the style of the text, and do not repeat what was said already."
CONTEXT_CHARACTERS = 1200
_BLOCK_ROWS = 64


class States(NamedTuple):
    """N tokens that count equally, hidden size H, vocabulary V; bf16."""

    student: Tensor  # [N, H]
    teacher: Tensor  # [N, H]
    weight: Tensor  # [V, H], the head of both


class Truth(NamedTuple):
    """Of the mean over tokens, in fp64, for the states as they are."""

    loss: float
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]


def gaussian(tokens: int, hidden: int, vocab: int, distance: float) -> States:
    """Random states and head: no token is likelier than others beforehand.

    Args:
        tokens: N.
        hidden: H.
        vocab: V.
        distance: |h_s - h_t| / |h_t|.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, hidden, generator=generator) * (SHARPNESS / hidden**0.5)
    teacher = torch.randn(tokens, hidden, generator=generator)
    student = teacher + distance * torch.randn(tokens, hidden, generator=generator)
    return States(student.bfloat16(), teacher.bfloat16(), weight.bfloat16())


@torch.no_grad()
def smollm2(block: str, tokens: int) -> States:
    """Last hidden states of SmolLM2-135M, computed in fp32 and rounded.

    Args:
        block: what the teacher sees: "hint" or "answer".
        tokens: N, shared out among the files `TEXTS`.

    Raises:
        ValueError: the model is not there, or `block` is neither.
    """
    if not (MODEL / "config.json").is_file():
        raise ValueError(f"There is no model in {MODEL}: fetch it with `hero model smollm2-135m`.")
    if block not in ("hint", "answer"):
        raise ValueError(f"block must be 'hint' or 'answer'; got {block!r}.")
    from hero.config import ModelConfig
    from hero.policy import Policy
    from hero.prompts import Hindsight, StandardPrompts

    policy = Policy.load(ModelConfig(path=str(MODEL), dtype="float32", device="cpu"))
    renderer, prompts = policy.renderer, StandardPrompts()
    length = tokens // len(TEXTS)
    students: list[Tensor] = []
    teachers: list[Tensor] = []
    for name in TEXTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        before, after = text[:CONTEXT_CHARACTERS], text[CONTEXT_CHARACTERS:]
        prompt = renderer.start([{"role": "user", "content": REQUEST + before}])
        action = renderer.encode(after)[:length]
        shown = Hindsight(hint=HINT) if block == "hint" else Hindsight(hint=after[: 6 * length])
        branch = renderer.branch_at(prompt)
        spliced = prompt[:branch] + renderer.encode(prompts.block(shown)) + prompt[branch:]
        for context, states in ((prompt, students), (spliced, teachers)):
            hidden = policy.hidden(torch.tensor([context + action]))[0]
            states.append(hidden[len(context) - 1 : -1])
    weight = policy.head_weight.detach().bfloat16()
    return States(torch.cat(students).bfloat16(), torch.cat(teachers).bfloat16(), weight)


def fp64_truth(states: States, divergence: str) -> Truth:
    """The dense definition, differentiated by autograd, a few rows at a time."""
    weight = states.weight.double().requires_grad_()
    teacher_weight = weight.detach()
    d_hidden = torch.empty(states.student.shape, dtype=torch.float64)
    d_weight = torch.zeros_like(teacher_weight)
    loss = 0.0
    for start in range(0, len(states.student), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        hidden = states.student[rows].double().requires_grad_()
        value = reference.fused_linear_divergence(
            hidden,
            weight,
            states.teacher[rows].double(),
            teacher_weight,
            divergence=divergence,
            beta=BETA,
            reduction="sum",
        ).loss / len(states.student)
        d_hidden[rows], part = torch.autograd.grad(value, (hidden, weight))
        d_weight += part
        loss += float(value.detach())
    return Truth(loss, d_hidden, d_weight)


def logits(states: States) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher logits [N, V], delta [N, V] and [N] whether a row of it holds the student's logits,
    as the chunk loop makes them."""
    operand, absolute = difference_operand(states.student, states.teacher)
    teacher, delta = (torch.empty(len(operand), len(states.weight)) for _ in range(2))
    gemm.logits_into(states.weight, (teacher, states.teacher), (delta, operand))
    return teacher, delta, absolute


def logit_gradient(
    teacher: Tensor, delta: Tensor, divergence: str, absolute: Tensor | None = None
) -> tuple[Tensor, float]:
    """bf16 gradient [R, V] of the mean over R rows by the student's logits, and the mean.

    Args:
        teacher: [R, V] fp32 logits.
        delta: [R, V] fp32, student's minus teacher's.
        divergence: name.
        absolute: [R] bool, rows whose `delta` holds the student's logits all the same.
    """
    grad = torch.empty(teacher.shape, dtype=torch.bfloat16)
    arguments: dict[str, Any] = {
        "delta": True,
        "divergence": Divergence(divergence).code,
        "beta": BETA,
        "inv_temperature": 1.0,
        "softcap": 0.0,
        "logit_scale": 1.0,
        "student_bias": None,
        "teacher_bias": None,
        "target_ids": None,
        "row_weights": torch.full((len(teacher),), 1.0 / len(teacher)),
        "old_logprobs": None,
        "is_clip": 0.0,
        "vocab_size": teacher.shape[1],
        "with_stats": False,
        "absolute_rows": absolute,
    }
    request = backends.Request(teacher.device, teacher.dtype, "full", False)
    row_kernel = backends.row_kernel(backends.choose("auto", request))
    stats = row_kernel(delta, teacher, grad, **arguments)
    return grad, float(stats[:, 0].double().mean())


def gradient_of(states: States, divergence: str) -> tuple[Tensor, float]:
    """bf16 gradient [N, V] of the logits, as the chunk loop has it, and the loss."""
    teacher, delta, absolute = logits(states)
    return logit_gradient(teacher, delta, divergence, absolute)
