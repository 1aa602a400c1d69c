"""Tensor parallelism over the vocabulary: what the ranks of a process group exchange.

Each rank holds a shard of the head, [V/P, H], and computes with the columns of its shard: its
statistics of every row are gathered and merged, its values gathered and added (in the order of the
ranks, so that all have the same bits), its summand of the hidden states' gradient all-reduced once
a call. The head's gradient stays where the shard is. P·N·16 numbers a call and the [N, H] gradient
travel.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hero_kernels import phases, rows
from hero_kernels.options import Objective
from hero_kernels.phases import Scaling

if TYPE_CHECKING:
    from types import ModuleType

    from hero_kernels.chunked import LogitChunk
    from hero_kernels.divergence_loop import RowTensors


class Shards(NamedTuple):
    """The pieces of the vocabulary and this process' place among them; without a group, one."""

    group: Any = None
    rank: int = 0
    size: int = 1

    @classmethod
    def named(cls, name: str) -> Shards:
        """Those of the process group of that name; "" for none."""
        if not name:
            return cls()
        from torch.distributed.distributed_c10d import _resolve_process_group

        group = _resolve_process_group(name)  # type: ignore[arg-type]
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def place(self, shard_rows: int, vocab_size: int) -> tuple[int, int]:
        """First column of this shard in the vocabulary, and how many of its columns are real."""
        first = self.rank * shard_rows
        return first, min(max(vocab_size - first, 0), shard_rows)

    def merged(self, statistics: Tensor, kernels: ModuleType) -> Tensor:
        """Statistics [R, 12] of all columns from those of this shard's."""
        parts = self._gathered(statistics)
        merged: Tensor = statistics if parts is None else kernels.merge_statistics(parts)
        return merged

    def total(self, values: Tensor) -> Tensor:
        """Sum over the shards of values [R, 4]."""
        parts = self._gathered(values)
        return values if parts is None else parts.sum(0)

    def add_up(self, summand: Tensor) -> Tensor:
        """Sum over the shards, in place."""
        if self.size > 1 and summand.numel():
            dist.all_reduce(summand, group=self.group)
        return summand

    def _gathered(self, tensor: Tensor) -> Tensor | None:
        """[P, R, K] from [R, K] of each rank; None where there is nothing to gather."""
        if self.size == 1 or tensor.numel() == 0:
            return None
        parts = tensor.new_empty(self.size * tensor.shape[0], tensor.shape[1])
        dist.all_gather_into_tensor(parts, tensor.contiguous(), group=self.group)
        return parts.view(self.size, *tensor.shape)


def phase_arguments(
    objective: Objective,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    delta: bool,
    first_column: int,
) -> dict[str, Any]:
    """What all three phases are told of some columns; biases of these columns."""
    return {
        "delta": delta,
        "scaling": Scaling(
            1.0 / objective.temperature,
            objective.softcap,
            objective.logit_scale,
            student_bias,
            teacher_bias,
        ),
        "first_column": first_column,
        "vocab_size": objective.vocab_size,
    }


def divergence_of_shard(
    chunk: LogitChunk,
    row_tensors: RowTensors,
    objective: Objective,
    kernels: ModuleType,
    shards: Shards,
    first_column: int,
    delta: bool,
    with_stats: bool,
) -> Tensor:
    """The row kernel of a chunk whose columns are those of this rank's shard.

    Args:
        chunk: R rows of logits.
        row_tensors: of the same rows.
        objective: what to compute.
        kernels: the three phases.
        shards: who has the other columns.
        first_column: place of the chunk's first column in the vocabulary.
        delta: whether the student's logits are a difference.
        with_stats: compute entropies and agreement.

    Returns:
        [R, 8] statistics, the same on all ranks; `chunk.grad` is filled.
    """
    assert chunk.teacher is not None  # support="full" has a teacher with logits
    if chunk.absolute_rows is not None:
        subtract_teacher(chunk.student, chunk.teacher, chunk.absolute_rows)
    logits = chunk.student, chunk.teacher
    common = phase_arguments(objective, chunk.student_bias, chunk.teacher_bias, delta, first_column)
    kind = {"divergence": objective.divergence, "beta": objective.beta}
    local = for_columns(chunk.student.shape[1], kernels)
    part = local.row_statistics(*logits, target_ids=row_tensors.target_ids, **common)
    statistics = shards.merged(part, kernels)
    values = shards.total(
        local.row_values(*logits, statistics, with_stats=with_stats, **kind, **common)
    )
    stats = finished(statistics, values, row_tensors, objective, with_stats)
    if chunk.grad is not None:
        sums = (statistics, values, row_scales(row_tensors.weights, stats))
        local.row_gradient(*logits, chunk.grad, *sums, **kind, **common)
    return stats


def for_columns(columns: int, kernels: ModuleType) -> ModuleType:
    """`kernels`, or those in torch for a shard of padding: compiled ones take no empty matrix."""
    return kernels if columns else phases


def finished(
    statistics: Tensor,
    values: Tensor,
    row_tensors: RowTensors,
    objective: Objective,
    with_stats: bool,
) -> Tensor:
    """[R, 8] as a row kernel returns them, from the sums of all columns."""
    stats = phases.finish(
        statistics, values, row_tensors.target_ids, row_tensors.old_logprobs, objective.is_clip
    )
    if not with_stats:
        stats[:, rows.STUDENT_ENTROPY :] = 0
    return stats


def subtract_teacher(student: Tensor, teacher: Tensor, absolute_rows: Tensor) -> None:
    """Make raw_s - raw_t of all rows [R, C], where those of `absolute_rows` hold raw_s."""
    student.addcmul_(teacher, absolute_rows[:, None].to(teacher.dtype), value=-1.0)


def row_scales(weights: Tensor, stats: Tensor) -> Tensor:
    """[R] weight · importance ratio; 0 for a masked row, whose ratio may be anything."""
    return (weights * stats[:, rows.RATIO]).where(weights != 0, 0.0)


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
    """What `Shards.named` finds it by; "" for None."""
    return "" if group is None else str(group.group_name)


_agreed: weakref.WeakKeyDictionary[Any, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()
"""What the members of a group have been found to agree on."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_shards(
    group: Any,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_weight: Tensor | None,
    vocab_size: int,
    always: bool,
) -> None:
    """Raise ValueError, on all ranks, unless all pass shards and rows of the same size and type.

    One small gather, on CUDA a synchronisation, for every combination of these that is new to this
    rank, or `always`. Not always, a combination seen before is not compared again, so that a rank
    which alone departs from it is noticed by the collectives only: they fail or wait.

    Args:
        group: of size above 1.
        student_hidden: [..., H].
        student_weight: [V/P, H].
        teacher_weight: [V/P, H_t] or None.
        vocab_size: real tokens of the whole vocabulary.
        always: compare even what was compared before.
    """
    teacher = [0, 0] if teacher_weight is None else list(teacher_weight.shape)
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
