"""Names, options and results of the public functions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class StrEnum(str, Enum):
    """`enum.StrEnum` of Python 3.11, for Python 3.10."""

    __str__ = str.__str__


class Divergence(StrEnum):
    """How far the student's distribution p_s is from the teacher's p_t."""

    JSD = "jsd"  # (1-beta) KL(p_s | m) + beta KL(p_t | m), m = (1-beta) p_s + beta p_t
    FORWARD_KL = "forward_kl"  # KL(p_t | p_s)
    REVERSE_KL = "reverse_kl"  # KL(p_s | p_t)

    @property
    def code(self) -> int:
        """The number row kernels know it by."""
        return {"jsd": 0, "forward_kl": 1, "reverse_kl": 2}[self.value]


class Support(StrEnum):
    """Over which tokens of the vocabulary the divergence is taken."""

    FULL = "full"
    TOPK = "topk"
    SAMPLED = "sampled"


class TopKSource(StrEnum):
    """Whose largest probabilities choose the tokens of `support="topk"`."""

    STUDENT = "student"
    TEACHER = "teacher"
    UNION = "union"


class Reduction(StrEnum):
    MEAN = "mean"
    SUM = "sum"
    NONE = "none"


class LossAggregation(StrEnum):
    """What the mean is taken over."""

    TOKEN = "token"  # all tokens
    TURN = "turn"  # token means within turns, then turns
    TRAJECTORY = "trajectory"  # token means, then turn means, then trajectories


class Storage(StrEnum):
    """How a chunk of logits is held when the inputs are 16-bit; see `layout.buffer_types`."""

    FLOAT32 = "float32"  # logits in fp32: gradients within 0.3 % of fp64 for any divergence
    # Shared head: teacher fp32, delta 16-bit. In bf16 gradients are off by up to 2 % where the KL
    # is 4, 1.3 % at 1, 0.6 % at 0.1 and 0.36 % below 1e-2; in fp16 by an eighth of that. For the
    # JSD read 0.5, 0.25 and 0.03 in place of 4, 1 and 0.1. (Measured on CPU: test_precision.py.)
    MIXED = "mixed"


class Design(StrEnum):
    """How the logits of a call are cut, so that they never exist as a whole."""

    AUTO = "auto"
    CHUNKED = "chunked"  # by rows (chunked.py): four head GEMMs, gradients in the forward pass
    FUSED = "fused"  # by rows, with one Triton GEMM for both sides (fused.py): four, less traffic
    SLICED = "sliced"  # by vocabulary (sliced.py): eight, the least memory; gradients in backward


@dataclass(frozen=True)
class KernelOptions:
    """How the loss is computed; no option changes its definition."""

    chunk_size: int | None = None
    """Rows of logits held at once; None chooses by device and vocabulary."""
    storage: str = Storage.FLOAT32
    """"float32", or "mixed" to trade exactness for memory traffic. For 16-bit inputs only."""
    max_active_rows: int | None = None
    """Upper bound on the rows of non-zero weight.

    On CUDA it lets masked rows be dropped before the GEMMs without a device synchronisation; a
    bound that proves too small makes the loss NaN there. On CPU rows are always dropped and the
    bound is only checked.
    """
    validate: bool = False
    """Check values too (NaN weights, ids out of range); on CUDA that is a synchronisation."""
    design: str = Design.AUTO
    """"auto" lets the planner choose (planner.py), another name fixes it; see `Design`."""
    memory_budget: int | None = None
    """Bytes beyond inputs and gradients. The planner takes the fastest design and chunk that fit;
    without a budget "chunked", or for a named "sliced" slices that fit 448 MiB."""
    process_group: ProcessGroup | None = None
    """Tensor parallelism over the vocabulary: each member passes its shard of the head (and bias),
    all of the same size, in the order of their ranks; `vocab_size` counts the real tokens of all
    shards, target ids are those of the whole vocabulary, hidden states and weights of rows are the
    same on all members. Loss and the hidden states' gradient come out whole on each."""
    accumulate_weight_grad: bool = False
    """Add the head's gradient, slice by slice, to `main_grad` of the weight if it has one, else to
    its `.grad`; autograd is given none, so that hooks on the weight do not run. For "sliced"."""

    def __post_init__(self) -> None:
        if self.storage not in tuple(Storage):
            raise ValueError(f"storage must be 'float32' or 'mixed'; got {self.storage!r}.")
        if self.design not in tuple(Design):
            raise ValueError(
                f"design must be 'auto', 'chunked', 'fused' or 'sliced'; got {self.design!r}."
            )
        if self.chunk_size is not None and self.design == Design.SLICED:
            raise ValueError(
                "chunk_size counts rows of a chunk, which design='sliced' has none of: set "
                f"memory_budget for the width of slices; got chunk_size={self.chunk_size}."
            )
        if self.storage == Storage.MIXED and self.design == Design.FUSED:
            raise ValueError(
                "design='fused' has a storage of its own (fp32 teacher, fp16 delta): leave storage "
                "'float32', or use design='chunked'."
            )
        if self.accumulate_weight_grad and self.design != Design.SLICED:
            raise ValueError(
                "accumulate_weight_grad needs design='sliced', which forms the head's gradient in "
                f"the backward pass; got design={str(self.design)!r}."
            )
        for name in ("chunk_size", "max_active_rows", "memory_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"{name} must be at least 1, or None to leave it open; got {value}."
                )


class Objective(NamedTuple):
    """What is computed for one token: everything but the tensors.

    Attributes:
        divergence: `Divergence.code`.
        beta: weight of the teacher in the JSD's mixture.
        temperature: divides the logits.
        softcap: s of s·tanh(z / s), 0 for none.
        logit_scale: multiplies the logits before the soft cap.
        is_clip: upper bound of the importance ratio, 0 for none.
        pointwise_clip: upper bound of one vocabulary entry's contribution, 0 for none.
        vocab_size: columns that are real.
        support: value of `Support`.
        top_k: tokens kept by `support="topk"`.
        top_k_source: value of `TopKSource`.
        top_k_tail: keep the rest of the mass as one more bucket (True) or renormalise (False).
    """

    divergence: int
    beta: float
    temperature: float
    softcap: float
    logit_scale: float
    is_clip: float
    pointwise_clip: float
    vocab_size: int
    support: str
    top_k: int
    top_k_source: str
    top_k_tail: bool


class DivergenceOutput(NamedTuple):
    """What `return_stats=True` returns; N stands for the leading shape of the hidden states.

    All but `loss` is detached. Entries of masked tokens are 0. With `reduction="none"` `per_token`
    is `loss`.
    """

    loss: Tensor
    """[] or, with `reduction="none"`, [N]: weights and importance ratio included."""
    per_token: Tensor
    """[N] divergence of each token, in nats, without weights and importance ratio."""
    per_turn: Tensor | None
    """[K] weighted mean of each turn, 0 for a turn without weight; None without `turn_ids`."""
    student_logprobs: Tensor | None
    """[N] log-probability of `target_ids` at the given temperature; None without `target_ids`."""
    teacher_logprobs: Tensor | None
    """[N] the same under the teacher; None also for a teacher given by its top-k."""
    student_entropy: Tensor
    """[N] in nats."""
    teacher_entropy: Tensor | None
    """[N] in nats; None for a teacher given by its top-k."""
    top1_agreement: Tensor | None
    """[N] 1 where both rank the same token first; None for a teacher given by its top-k."""
