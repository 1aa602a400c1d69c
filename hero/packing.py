"""Samples to tensors: several turns of an episode in one forward pass.

Turn k's prompt extends turn k-1's prompt and action, so the student needs one row for a whole
episode, the *trunk*. The teacher re-scores each action behind a privileged context of its own, in a
*branch* that leaves the trunk where that context is spliced in and sees the trunk up to there and
itself. With two turns (p prompt, a action, o observation, h hindsight, g generation prompt; the
trunk's last action is not needed):

    tokens    p0 g0 a0 o1 g1 | h0 g0 a0 | h1 g1 a1        trunk, branch of turn 0, branch of turn 1
    sees      causal         | p0 + own | p0 g0 a0 o1 + own
    position  0 1 2 3 4      | 1 2 3    | 4 5 6

so a teacher's logits equal those of the same turn scored alone. Padding is at the right and never
seen; rows are computed with others of similar length (`Packed.parts`).

Rows are planned once for each trajectory (`plan_rows`), grouped by their sizes (`micro_batches`)
and only then turned into tensors (`pack`). Action tokens keep one order all the way, that of the
samples: a row takes its samples in order, and rows follow each other in the order of their samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hero.types import Sample

MAX_PADDING = 1.1
"""Tokens of a forward pass, padding included, by those that are real."""


class Branch(NamedTuple):
    """What stands beside a trunk: hindsight, generation prompt and action of one turn."""

    leaves_at: int
    """Length of the trunk that it continues, and sees."""
    ids: list[int]
    num_actions: int
    """Its last so many tokens are the action."""


@dataclass(kw_only=True, slots=True)
class Row:
    """One sequence to be: a trunk, then its branches."""

    trunk: list[int] = field(default_factory=list)
    actions: list[tuple[int, int]] = field(default_factory=list)
    """(start, end) of each action in the trunk."""
    observations: list[tuple[int, int]] = field(default_factory=list)
    """(start, end) of each observation in the trunk that is predicted."""
    branches: list[Branch] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.trunk) + sum(len(branch.ids) for branch in self.branches)


@dataclass(kw_only=True, slots=True)
class Weighted:
    """A sample with the coefficients of its tokens, which hold the minibatch's denominator."""

    sample: Sample
    distill: Tensor
    """[len(action_ids)] of the divergence."""
    pg: Tensor
    """[len(action_ids)] of the policy-gradient loss."""
    observation: float = 0.0
    """Of the cross-entropy of each token of the observation that followed."""
    kl_to_start: float = 0.0
    """Of the divergence from the starting weights, each action token."""

    @property
    def losses(self) -> tuple[str, ...]:
        """The terms of the loss that train this turn, as `loss.TERMS` names them."""
        trained = {
            "distillation": bool(self.distill.any()),
            "policy gradient": self.sample.advantage != 0 and bool(self.pg.any()),
            "observation": self.observation != 0 and self.sample.num_observed > 0,
            "KL to the start": self.kl_to_start != 0,
        }
        return tuple(term for term, trains in trained.items() if trains)


@dataclass(kw_only=True, slots=True)
class Rows:
    """The planned rows of one or more whole trajectories."""

    samples: list[Weighted]
    student: list[Row]
    teacher: list[Row]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.student + self.teacher))

    @property
    def height(self) -> int:
        """Rows of the larger forward pass."""
        return max(len(self.student), len(self.teacher))


@dataclass(kw_only=True, slots=True)
class Packed:
    """Rows as tensors, and where the hidden state that predicts each action token stands."""

    input_ids: Tensor
    """[B, T]"""
    position_ids: Tensor
    """[B, T]"""
    lengths: list[int]
    """Tokens of each row, [B]; the rest is padding."""
    seen: list[list[tuple[int, int, int]]] | None
    """Of each row: tokens start:end see the trunk up to the first number, and themselves causally.
    None where plain causal attention is right."""
    index: Tensor
    """[N] flat positions in B*T, one for each action token, samples in order."""
    observed: Tensor
    """[O] flat positions in B*T of what predicts each observation token, samples in order."""

    def parts(self) -> list[list[int]]:
        """Rows that are computed together: so alike in length that padding is at most a tenth."""
        parts, tokens = list[list[int]](), 0
        for row in sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row]):
            tokens += self.lengths[row]
            if parts and self.lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= MAX_PADDING * tokens:
                parts[-1].append(row)
            else:
                parts.append([row])
                tokens = self.lengths[row]
        return parts

    def inputs(self, rows: list[int] | None = None) -> dict[str, Tensor]:
        """Keyword arguments of the trunk, for some rows or all; causal ones need ids alone."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        width = max(self.lengths[row] for row in rows)
        inputs = {"input_ids": self.input_ids[rows, :width]}
        if self.seen is not None:
            mask = torch.zeros(len(rows), 1, width, width, dtype=torch.bool)
            for place, row in enumerate(rows):
                _fill_mask(mask[place, 0], self.seen[row])
            inputs["position_ids"] = self.position_ids[rows, :width]
            inputs["attention_mask"] = mask.to(self.input_ids.device)
        return inputs

    def states(self, hidden: Callable[..., Tensor]) -> Tensor:
        """[B*T, H] of a model's `hidden` states, part by part; those of padding say nothing."""
        parts = self.parts()
        computed = [hidden(**self.inputs(part)) for part in parts]
        states = computed[0].new_zeros(*self.input_ids.shape, computed[0].shape[-1])
        for part, of_part in zip(parts, computed, strict=True):
            states[part, : of_part.shape[1]] = of_part
        return states.flatten(0, 1)


@dataclass(kw_only=True, slots=True)
class PackedBatch:
    """One micro-batch, token by token: N action tokens, samples in order."""

    samples: list[Weighted]
    student: Packed
    teacher: Packed | None
    """Rows of the M <= N tokens whose sample has a teacher; None if there are none."""
    target_ids: Tensor
    """[N] the sampled ids."""
    sampled_logprobs: Tensor
    """[N] float32"""
    distill_weights: Tensor
    """[N] float32: coefficients of the divergence."""
    pg_weights: Tensor
    """[N] float32: coefficients of the policy-gradient loss."""
    advantages: Tensor
    """[N] float32"""
    distill_index: Tensor
    """[M] which of the N tokens have a teacher."""
    observed_ids: Tensor
    """[O] the tokens of the observations that followed."""
    observation_weight: float
    """Coefficient of each of them."""
    kl_to_start: float
    """Coefficient of each action token's divergence from the starting weights."""


def student_rows(samples: Sequence[Sample]) -> list[Row]:
    """One trunk for each run of samples whose prompts extend the last prompt and action."""
    rows: list[Row] = []
    for i, sample in enumerate(samples):
        if not (_same_trajectory(samples, i) and _extends(sample.prompt_ids, rows[-1].trunk)):
            rows.append(Row())
        rows[-1].trunk = sample.prompt_ids + sample.action_ids
        rows[-1].actions.append((len(sample.prompt_ids), len(rows[-1].trunk)))
        if sample.num_observed:
            rows[-1].trunk += sample.following_ids
            end = len(rows[-1].trunk)
            rows[-1].observations.append((end - sample.num_observed, end))
    return rows


def teacher_rows(samples: Sequence[Sample], packing: str = "tree") -> list[Row]:
    """Of the samples with a teacher: a trunk with branches (`tree`) or a row each (`separate`)."""
    rows: list[Row] = []
    scored = [sample for sample in samples if sample.has_teacher]
    for i, sample in enumerate(scored):
        if packing == "separate":
            whole = sample.teacher_prompt_ids + sample.action_ids
            rows.append(Row(trunk=whole, actions=[(len(sample.teacher_prompt_ids), len(whole))]))
            continue
        trunk = sample.prompt_ids[: sample.branch_at]
        own = sample.privileged_ids + sample.prompt_ids[sample.branch_at :] + sample.action_ids
        if not (_same_trajectory(scored, i) and _extends(trunk, rows[-1].trunk)):
            rows.append(Row())
        rows[-1].trunk = trunk  # longer than before: earlier branches still leave where they did
        rows[-1].branches.append(Branch(len(trunk), own, len(sample.action_ids)))
    return rows


def _extends(longer: list[int], shorter: list[int]) -> bool:
    return len(longer) >= len(shorter) and longer[: len(shorter)] == shorter


def _same_trajectory(samples: Sequence[Sample], i: int) -> bool:
    return i > 0 and samples[i - 1].trajectory == samples[i].trajectory


def plan_rows(samples: Sequence[Weighted], packing: str) -> list[Rows]:
    """The rows of each trajectory.

    Args:
        samples: turns, those of one trajectory together and in order.
        packing: "tree" or "separate", for the teacher.
    """
    plans = []
    for _, group in itertools.groupby(samples, key=lambda weighted: weighted.sample.trajectory):
        own = list(group)
        turns = [weighted.sample for weighted in own]
        plans.append(
            Rows(samples=own, student=student_rows(turns), teacher=teacher_rows(turns, packing))
        )
    return plans


def micro_batches(plans: Sequence[Rows], max_tokens: int) -> Iterator[Rows]:
    """Join trajectories so that no padded forward pass exceeds `max_tokens`.

    A single trajectory that is larger goes alone.
    """
    batch = Rows(samples=[], student=[], teacher=[])
    for plan in sorted(plans, key=lambda plan: (plan.width, plan.height)):
        # Ascending, so the newest trajectory is the widest.
        if batch.samples and plan.width * (batch.height + plan.height) > max_tokens:
            yield batch
            batch = Rows(samples=[], student=[], teacher=[])
        batch.samples += plan.samples
        batch.student += plan.student
        batch.teacher += plan.teacher
    if batch.samples:
        yield batch


def pack(rows: Rows, device: torch.device) -> PackedBatch:
    """Tensors of one micro-batch.

    Raises:
        AssertionError: the packed ids are not the sampled ids (tokens in, tokens out).
    """
    samples = [weighted.sample for weighted in rows.samples]
    lengths = torch.tensor([len(sample.action_ids) for sample in samples])
    seen = [s.following_ids[-s.num_observed :] for s in samples if s.num_observed]
    observed = [token for ids in seen for token in ids]

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(lengths).to(device)

    batch = PackedBatch(
        samples=rows.samples,
        student=to_tensors(rows.student, device),
        teacher=to_tensors(rows.teacher, device) if rows.teacher else None,
        target_ids=torch.tensor([token for s in samples for token in s.action_ids]).to(device),
        sampled_logprobs=torch.tensor([x for s in samples for x in s.sampled_logprobs]).to(device),
        distill_weights=torch.cat([weighted.distill for weighted in rows.samples]).to(device),
        pg_weights=torch.cat([weighted.pg for weighted in rows.samples]).to(device),
        advantages=per_token([sample.advantage for sample in samples]),
        distill_index=per_token([float(s.has_teacher) for s in samples]).nonzero().squeeze(1),
        observed_ids=torch.tensor(observed, dtype=torch.long).to(device),
        observation_weight=rows.samples[0].observation,
        kl_to_start=rows.samples[0].kl_to_start,
    )
    guard_ids(batch)
    return batch


def to_tensors(rows: Sequence[Row], device: torch.device) -> Packed:
    """Pad to the longest row, and note what each row's tokens see where there are branches."""
    shape = (len(rows), max(map(len, rows)))
    input_ids = torch.zeros(shape, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    all_seen = []
    index, observed = list[Tensor](), list[Tensor]()
    for r, row in enumerate(rows):
        ids, positions, actions = list(row.trunk), list(range(len(row.trunk))), list(row.actions)
        seen = [(0, 0, len(ids))]  # tokens start:end see the trunk up to the first number
        for branch in row.branches:
            start, end = len(ids), len(ids) + len(branch.ids)
            ids += branch.ids
            positions += range(branch.leaves_at, branch.leaves_at + len(branch.ids))
            actions.append((end - branch.num_actions, end))
            seen.append((branch.leaves_at, start, end))
        input_ids[r, : len(ids)] = torch.tensor(ids)
        position_ids[r, : len(ids)] = torch.tensor(positions)
        for places, spans in ((index, actions), (observed, row.observations)):
            for start, end in spans:  # the state before a token predicts it
                places.append(torch.arange(r * shape[1] + start - 1, r * shape[1] + end - 1))
        all_seen.append(seen)
    return Packed(
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        lengths=[len(row) for row in rows],
        seen=all_seen if any(row.branches for row in rows) else None,
        index=torch.cat(index).to(device),
        observed=torch.cat([*observed, torch.zeros(0, dtype=torch.long)]).to(device),
    )


def _fill_mask(mask: Tensor, seen: Sequence[tuple[int, int, int]]) -> None:
    """Let tokens start:end see the row's first `trunk` tokens, and themselves causally.

    Rows of `mask` [T, T] are the tokens that look, columns what they see.
    """
    mask.fill_diagonal_(True)  # padding sees itself, so that no softmax is empty
    for trunk, start, end in seen:
        mask[start:end, :trunk] = True
        mask[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()


def guard_ids(batch: PackedBatch) -> None:
    """Trained ids are the sampled ids, for student and teacher alike."""
    for packed, targets in (
        (batch.student, batch.target_ids),
        (batch.teacher, batch.target_ids[batch.distill_index]),
    ):
        if packed is not None:
            ids = packed.input_ids.flatten()[packed.index + 1]
            assert torch.equal(ids, targets), "packed action ids differ from the sampled ids"
    seen = batch.student.input_ids.flatten()[batch.student.observed + 1]
    assert torch.equal(seen, batch.observed_ids), "packed observations differ from those seen"
