"""Tensor parallelism over the vocabulary: what the ranks of a process group exchange.

Each rank holds a shard of the head, [V/P, H], and computes with the columns of its shard: its
statistics of every row are gathered and merged, its values gathered and added (in the order of the
ranks, so that all have the same bits), its summand of the hidden states' gradient all-reduced once
a call. The head's gradient stays where the shard is. P·N·15 numbers a call and the [N, H] gradient
travel.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hero_kernels import checks
from hero_kernels.objective import KernelOptions


class Shards(NamedTuple):
    """The ranks that share the vocabulary, and this process' place; one rank without a group."""

    group: Any = None
    rank: int = 0
    size: int = 1

    @classmethod
    def named(cls, name: str) -> Shards:
        """Those of the process group of that name."""
        from torch.distributed.distributed_c10d import _resolve_process_group

        group = _resolve_process_group(name)  # type: ignore[arg-type]
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def place(self, shard_rows: int, vocab_size: int) -> tuple[int, int]:
        """First column of this shard in the vocabulary, and how many of its columns are real."""
        first = self.rank * shard_rows
        return first, min(max(vocab_size - first, 0), shard_rows)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the shards of values [R, 4]."""
        parts = self.gathered(values)
        return values if parts is None else parts.sum(0)

    def add_up(self, summand: Tensor) -> Tensor:
        """Sum over the shards, in place."""
        if self.size > 1 and summand.numel():
            dist.all_reduce(summand, group=self.group)
        return summand

    def gathered(self, tensor: Tensor) -> Tensor | None:
        """[P, R, K] from [R, K] of each rank; None where there is nothing to gather."""
        if self.size == 1 or tensor.numel() == 0:
            return None
        parts = tensor.new_empty(self.size * tensor.shape[0], tensor.shape[1])
        dist.all_gather_into_tensor(parts, tensor.contiguous(), group=self.group)
        return parts.view(self.size, *tensor.shape)


def group_size(group: Any) -> int:
    """Number of members of `options.process_group`, 1 for None.

    Raises:
        ValueError: torch.distributed is not initialised, or this process is not a member.
        TypeError: it is no process group.
    """
    if group is None:
        return 1
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "options.process_group is given, but torch.distributed is not initialised: call "
            "torch.distributed.init_process_group first, or leave process_group None."
        )
    outside: Any = dist.GroupMember.NON_GROUP_MEMBER
    if group != outside and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"options.process_group must be a ProcessGroup, got {type(group).__name__}: of a "
            "DeviceMesh pass mesh.get_group()."
        )
    if group == outside or dist.get_rank(group) < 0:
        raise ValueError(
            f"rank {dist.get_rank()} is not a member of options.process_group: call the loss on "
            "its members only, or pass the group that this rank belongs to."
        )
    return dist.get_world_size(group)


def group_name(group: Any) -> str:
    """What `Shards.named` finds it by."""
    return str(group.group_name)


_agreed: weakref.WeakKeyDictionary[Any, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()
"""What the members of a group have been found to agree on."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_shards(
    options: KernelOptions, student_hidden: Tensor, heads: tuple[Tensor, ...], vocab_size: int
) -> None:
    """Raise ValueError, on all ranks, unless all pass shards and rows of the same size and type.

    One small gather, on CUDA a synchronisation, for every combination of these that is new to this
    rank; on CPU and with `validate` always. Elsewhere a combination seen before is not compared
    again: a rank which alone departs from it is noticed by the collectives only, which fail or
    wait.

    Args:
        options: with a group of size above 1.
        student_hidden: [..., H].
        heads: the student's weight [V/P, H], and the teacher's own [V/P, H_t] if it has one.
        vocab_size: real tokens of the whole vocabulary.
    """
    student_weight = heads[0]
    teacher = [0, 0] if len(heads) == 1 else list(heads[1].shape)
    group, always = (
        options.process_group,
        checks.values_readable(student_hidden, options.validate),
    )
    facts = (
        *student_weight.shape,
        student_hidden.shape[:-1].numel(),
        _DTYPES.index(student_weight.dtype),
        *teacher,
        vocab_size,
        int(torch.is_grad_enabled() and student_hidden.requires_grad),
    )
    agreed = _agreed.setdefault(group, set())
    if facts in agreed and not always:
        return
    mine = torch.tensor(facts, dtype=torch.int64, device=student_hidden.device)
    everyone = mine.new_empty(dist.get_world_size(group) * len(facts))
    dist.all_gather_into_tensor(everyone, mine, group=group)
    by_rank = everyone.view(-1, len(facts)).tolist()
    for rank, theirs in enumerate(by_rank):
        if theirs != by_rank[0]:
            raise ValueError(
                "The ranks of options.process_group must pass shards of one size, and the same "
                f"rows: rank 0 has {_described(by_rank[0])}, rank {rank} has "
                f"{_described(theirs)}. Pad the vocabulary to a multiple of the number of ranks "
                "(vocab_size says how much is real) and give all ranks the same hidden states."
            )
    agreed.add(facts)


def _described(facts: list[int]) -> str:
    shard, hidden, num_rows, dtype, teacher_shard, teacher_hidden, vocab_size, trainable = facts
    teacher = f", teacher_weight {[teacher_shard, teacher_hidden]}" if teacher_shard else ""
    return (
        f"student_weight {[shard, hidden]} {str(_DTYPES[dtype]).removeprefix('torch.')}{teacher}, "
        f"{num_rows} rows{'' if trainable else ' without gradient'}, vocab_size {vocab_size}"
    )
