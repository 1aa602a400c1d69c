"""Samples to tensors: several turns of an episode in one forward pass.

Turn k's prompt extends turn k-1's prompt and action, so the student needs one row for a whole
episode, the *trunk*. The teacher re-scores each action behind a block of its own, a *branch* that
leaves the trunk where the block is spliced in and sees the trunk up to there and itself. With two
turns (p prompt, a action, o observation, b block, g generation prompt; the trunk's last action is
not needed):

    tokens    p0 g0 a0 o1 g1 | b0 g0 a0 | b1 g1 a1        trunk, branch of turn 0, branch of turn 1
    sees      causal         | p0 + own | p0 g0 a0 o1 + own
    position  0 1 2 3 4      | 1 2 3    | 4 5 6

so a teacher's logits equal those of the same turn scored alone. Padding is at the right and never
seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hero.types import Sample


@dataclass(kw_only=True, slots=True)
class Row:
    """One sequence to be: ids, positions, branches and where each sample's action is."""

    ids: list[int]
    positions: list[int]
    branches: list[tuple[int, int, int]] = field(default_factory=list)
    """(trunk length that is seen, start, end) of each branch, in row coordinates."""
    actions: list[tuple[int, int]] = field(default_factory=list)
    """(index of the sample in the batch, row coordinate of its first action token)."""


@dataclass(kw_only=True, slots=True)
class Packed:
    """Rows as tensors, and where the hidden state that predicts each action token stands."""

    input_ids: Tensor
    """[B, T]"""
    position_ids: Tensor
    """[B, T]"""
    attention_mask: Tensor | None
    """[B, 1, T, T] bool, True = seen; None where plain causal attention is right."""
    index: Tensor
    """[N] flat positions in B*T, one for each action token, samples in order."""

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the trunk; plain causal rows need neither positions nor a mask."""
        if self.attention_mask is None:
            return {"input_ids": self.input_ids}
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
        }


@dataclass(kw_only=True, slots=True)
class PackedBatch:
    """One micro-batch: all that the loss needs, token by token (N action tokens, samples in
    order)."""

    samples: list[Sample]
    student: Packed
    teacher: Packed | None
    """Rows of the M <= N tokens whose sample is distilled; None if there are none."""
    target_ids: Tensor
    """[N] the sampled ids."""
    sampled_logprobs: Tensor
    """[N] float32"""
    distill_weights: Tensor
    """[N] float32: token weights of the divergence; they already hold the batch's denominator."""
    policy_weights: Tensor
    """[N] float32: token weights of the policy-gradient loss, likewise."""
    advantages: Tensor
    """[N] float32"""
    distill_index: Tensor
    """[M] which of the N tokens have a teacher."""


def student_rows(samples: Sequence[Sample]) -> list[Row]:
    """One trunk for each run of samples in which every prompt extends the last prompt and
    action."""
    rows: list[Row] = []
    for i, sample in enumerate(samples):
        sequence = sample.prompt_ids + sample.action_ids
        if not (rows and _extends(sample.prompt_ids, rows[-1].ids) and _same_episode(samples, i)):
            rows.append(Row(ids=[], positions=[]))
        rows[-1].ids = sequence
        rows[-1].actions.append((i, len(sample.prompt_ids)))
    for row in rows:
        row.positions = list(range(len(row.ids)))
    return rows


def teacher_rows(samples: Sequence[Sample], packing: str = "tree") -> list[Row]:
    """Trunk and branches (`tree`), or a row for each turn (`separate`), of the distilled
    samples."""
    rows: list[Row] = []
    for i, sample in enumerate(samples):
        if sample.distill_weight == 0:
            continue
        own = sample.block_ids + sample.prompt_ids[sample.branch_at :] + sample.action_ids
        trunk = sample.prompt_ids[: sample.branch_at]
        if packing == "separate":
            ids = trunk + own
            row = Row(ids=ids, positions=list(range(len(ids))))
            row.actions.append((i, len(ids) - len(sample.action_ids)))
            rows.append(row)
            continue
        if not (rows and _same_episode(samples, i) and _extends(trunk, _trunk(rows[-1]))):
            rows.append(Row(ids=[], positions=[]))
        _grow(rows[-1], trunk)
        row = rows[-1]
        start = len(row.ids)
        row.branches.append((len(trunk), start, start + len(own)))
        row.actions.append((i, start + len(own) - len(sample.action_ids)))
        row.ids = row.ids + own
        row.positions = row.positions + list(range(len(trunk), len(trunk) + len(own)))
    return rows


def _trunk(row: Row) -> list[int]:
    return row.ids[: row.branches[0][1]] if row.branches else row.ids


def _grow(row: Row, trunk: list[int]) -> None:
    """Lengthen the row's trunk; branches that are there move to the right."""
    old = len(_trunk(row))
    added = len(trunk) - old
    row.ids = trunk + row.ids[old:]
    row.positions = list(range(len(trunk))) + row.positions[old:]
    row.branches = [(seen, start + added, end + added) for seen, start, end in row.branches]
    row.actions = [(i, start + added) for i, start in row.actions]


def _extends(longer: list[int], shorter: list[int]) -> bool:
    return len(longer) >= len(shorter) and longer[: len(shorter)] == shorter


def _same_episode(samples: Sequence[Sample], i: int) -> bool:
    return i > 0 and samples[i - 1].trajectory == samples[i].trajectory


def to_tensors(rows: Sequence[Row], samples: Sequence[Sample], device: torch.device) -> Packed:
    """Pad to the longest row and build the block-sparse mask where there are branches."""
    width = max(len(row.ids) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = None
    if any(row.branches for row in rows):
        mask = torch.zeros(len(rows), 1, width, width, dtype=torch.bool)
    index: dict[int, Tensor] = {}
    for r, row in enumerate(rows):
        length = len(row.ids)
        input_ids[r, :length] = torch.tensor(row.ids)
        position_ids[r, :length] = torch.tensor(row.positions)
        if mask is not None:
            _fill_mask(mask[r, 0], row)
        for i, start in row.actions:
            first = r * width + start - 1  # the state before a token predicts it
            index[i] = torch.arange(first, first + len(samples[i].action_ids))
    return Packed(
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        attention_mask=None if mask is None else mask.to(device),
        index=torch.cat([index[i] for i in sorted(index)]).to(device),
    )


def _fill_mask(mask: Tensor, row: Row) -> None:
    mask.fill_diagonal_(True)  # padding sees itself, so that no softmax is empty
    trunk = len(_trunk(row))
    mask[:trunk, :trunk] = True
    for seen, start, end in row.branches:
        mask[start:end, :seen] = True
        mask[start:end, start:end] = True
    mask[: len(row.ids), : len(row.ids)].tril_()


def pack(
    samples: Sequence[Sample],
    distill_weights: Sequence[Tensor],
    policy_weights: Sequence[Tensor],
    *,
    packing: str,
    device: torch.device,
) -> PackedBatch:
    """Tensors of one micro-batch.

    Args:
        samples: turns, those of one trajectory together and in order.
        distill_weights: for each sample, token weights [len(action_ids)] of the divergence.
        policy_weights: likewise of the policy-gradient loss.
        packing: "tree" or "separate", for the teacher.
        device: of the tensors.

    Raises:
        AssertionError: the packed ids are not the sampled ids (tokens in, tokens out).
    """
    student = to_tensors(student_rows(samples), samples, device)
    rows = teacher_rows(samples, packing)
    teacher = to_tensors(rows, samples, device) if rows else None
    target_ids = torch.cat([torch.tensor(s.action_ids) for s in samples]).to(device)
    lengths = torch.tensor([len(s.action_ids) for s in samples])
    distilled = torch.tensor([s.distill_weight != 0 for s in samples]).repeat_interleave(lengths)
    batch = PackedBatch(
        samples=list(samples),
        student=student,
        teacher=teacher,
        target_ids=target_ids,
        sampled_logprobs=torch.cat([torch.tensor(s.sampled_logprobs) for s in samples]).to(device),
        distill_weights=torch.cat(list(distill_weights)).to(device),
        policy_weights=torch.cat(list(policy_weights)).to(device),
        advantages=torch.tensor([s.advantage for s in samples])
        .repeat_interleave(lengths)
        .to(device),
        distill_index=distilled.nonzero().squeeze(1).to(device),
    )
    guard_ids(batch)
    return batch


def guard_ids(batch: PackedBatch) -> None:
    """Trained ids are the sampled ids, for student and teacher alike."""
    for packed, targets in (
        (batch.student, batch.target_ids),
        (batch.teacher, batch.target_ids[batch.distill_index]),
    ):
        if packed is not None:
            ids = packed.input_ids.flatten()[packed.index + 1]
            assert torch.equal(ids, targets), "packed action ids differ from the sampled ids"


def micro_batches(samples: Sequence[Sample], max_tokens: int, packing: str) -> Iterator[list[int]]:
    """Split a batch at trajectory borders so that no padded forward pass exceeds `max_tokens`.

    A single trajectory that is larger goes alone. Yields indices into `samples`.
    """
    episodes: list[list[int]] = []
    for i in range(len(samples)):
        if not _same_episode(samples, i):
            episodes.append([])
        episodes[-1].append(i)
    sizes = []
    for episode in episodes:
        own = [samples[i] for i in episode]
        rows = [student_rows(own), teacher_rows(own, packing)]
        sizes.append(
            (
                max((len(row.ids) for kind in rows for row in kind), default=0),
                max(len(r) for r in rows),
            )
        )
    order = sorted(range(len(episodes)), key=lambda e: sizes[e])
    batch: list[int] = []
    num_rows = 0
    for e in order:
        width, height = sizes[e]  # ascending: the newest is the widest
        if batch and width * (num_rows + height) > max_tokens:
            yield batch
            batch, num_rows = [], 0
        batch = batch + episodes[e]
        num_rows += height
    if batch:
        yield batch
