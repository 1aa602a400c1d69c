"""What is computed, and how: the settings of the public functions, with defaults and checks."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from hero_kernels.constants import DIVERGENCE_CODES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


SUPPORTS = ("full", "topk", "sampled")
"""Over which tokens of the vocabulary the divergence is taken."""


class ObjectiveKwargs(TypedDict, total=False):
    """The keyword arguments that say what is computed; meanings and defaults as in `Objective`."""

    divergence: str
    beta: float
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    is_clip: float | None
    support: str
    top_k: int | None
    top_k_source: str
    top_k_tail: bool


@dataclass(frozen=True, slots=True)
class Objective:
    """What is computed for one token: everything but the tensors.

    Raises:
        ValueError: a value out of range, or values that exclude each other.
    """

    divergence: str = "jsd"
    """"jsd" = (1-beta) KL(p_s | m) + beta KL(p_t | m) with m = (1-beta) p_s + beta p_t,
    "forward_kl" = KL(p_t | p_s) or "reverse_kl" = KL(p_s | p_t)."""
    beta: float = 0.5
    """Weight of the teacher in the JSD's mixture, in (0, 1)."""
    temperature: float = 1.0
    """Divides the logits; the loss is not multiplied by its square."""
    softcap: float | None = None
    """s of s·tanh(z / s), or None."""
    logit_scale: float = 1.0
    """Multiplies the logits before the soft cap."""
    is_clip: float | None = None
    """Upper bound of the importance ratio, or None."""
    support: str = "full"
    """"full" vocabulary, "topk", or "sampled" (score-function form of the reverse KL)."""
    top_k: int | None = None
    """Tokens kept by "topk"."""
    top_k_source: str = "student"
    """Whose largest they are: "student" or "teacher"."""
    top_k_tail: bool = True
    """Keep the rest of the mass as one more outcome; False renormalises over the kept tokens."""

    def __post_init__(self) -> None:
        choice("divergence", self.divergence, DIVERGENCE_CODES)
        choice("support", self.support, SUPPORTS)
        choice("top_k_source", self.top_k_source, ("student", "teacher"))
        if not torch.compiler.is_compiling():
            self._check_types()
        # Comparisons alone, which torch.compile traces for a number that varies; false for NaN too.
        for name, value, optional in (
            ("temperature", self.temperature, False),
            ("logit_scale", self.logit_scale, False),
            ("softcap", self.softcap, True),
            ("is_clip", self.is_clip, True),
        ):
            if value is None and optional:
                continue
            if value is None or not 0 < value < math.inf:
                remedy = ", or None to switch it off" if optional else ""
                raise ValueError(f"{name} must be a finite number above 0{remedy}; got {value}.")
        if self.divergence == "jsd" and not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta must lie between 0 and 1, got {self.beta}: at the ends the JSD is 0 for any "
                "student. For what other libraries call beta=0 and beta=1 use "
                "divergence='forward_kl' and 'reverse_kl'."
            )
        if self.support == "sampled" and self.divergence != "reverse_kl":
            raise ValueError(
                "support='sampled' estimates the reverse KL from the sampled token: pass "
                f"divergence='reverse_kl'; got divergence={str(self.divergence)!r}."
            )
        if self.top_k is not None and (self.support != "topk" or self.top_k < 1):
            raise ValueError(
                f"top_k={self.top_k} belongs to support='topk' and must be at least 1; got "
                f"support={str(self.support)!r}."
            )

    def _check_types(self) -> None:
        for name in ("temperature", "logit_scale", "softcap", "is_clip", "beta", "top_k"):
            value = getattr(self, name)
            kind, what = (Integral, "an integer") if name == "top_k" else (Real, "a number")
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be {what}, got {value!r} ({type(value).__name__}).")

    @property
    def code(self) -> int:
        """The number by which row kernels know the divergence."""
        return DIVERGENCE_CODES[self.divergence]


def choice(name: str, value: Any, expected: Collection[str]) -> None:
    """Raise ValueError unless `value` is among those expected."""
    if value not in tuple(expected):  # which asks for no hash
        raise ValueError(f"{name} must be one of {', '.join(map(repr, expected))}; got {value!r}.")


@dataclass(frozen=True)
class KernelOptions:
    """How the loss is computed; no option changes its definition.

    Raises:
        ValueError: a number below 1.
    """

    tile_rows: int | None = None
    """Rows of logits held at once; None chooses by device and vocabulary."""
    tile_columns: int | None = None
    """Columns of the vocabulary held at once; None holds all. Fewer than all take less memory and
    twice the products (8 instead of 4), and gradients are formed in the backward pass."""
    memory_budget: int | None = None
    """Bytes beyond inputs and gradients: the largest tile that fits, of whole rows if possible."""
    max_active_rows: int | None = None
    """Upper bound on the rows of non-zero weight.

    On CUDA it lets masked rows be dropped before the GEMMs without a device synchronisation; a
    bound that proves too small makes the loss NaN there. On CPU rows are always dropped and the
    bound is only checked.
    """
    validate: bool = False
    """Check values too (NaN weights, ids out of range); on CUDA that is a synchronisation."""
    process_group: ProcessGroup | None = None
    """Tensor parallelism over the vocabulary: each member passes its shard of the head (and bias),
    all of the same size, in the order of their ranks; `vocab_size` counts the real tokens of all
    shards, target ids are those of the whole vocabulary, hidden states and weights of rows are the
    same on all members. Loss and the hidden states' gradient come out whole on each."""

    def __post_init__(self) -> None:
        for name in ("tile_rows", "tile_columns", "max_active_rows", "memory_budget"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise TypeError(
                    f"{name} must be an integer, got {value!r} ({type(value).__name__})."
                )
            if value < 1:
                raise ValueError(
                    f"{name} must be at least 1, or None to leave it open; got {value}."
                )
        if self.memory_budget is not None and (self.tile_rows or self.tile_columns):
            raise ValueError(
                "memory_budget chooses the tile: leave tile_rows and tile_columns None, or leave "
                f"memory_budget None; got {self.tile_rows}, {self.tile_columns} and "
                f"{self.memory_budget}."
            )


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
