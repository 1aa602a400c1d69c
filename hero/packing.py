"""Samples to tensors: several turns of an episode in one forward pass.

Turn k's prompt extends turn k-1's prompt and action, so the student needs one row for a whole
episode, the *trunk*. The teacher re-scores each action behind a privileged context of its own, in a
*branch* that leaves the trunk where that context is spliced in and sees the trunk up to there and
itself. With two turns (p prompt, a action, o observation, h hindsight, g generation prompt; the
trunk's last action is not needed):

    tokens    p0 g0 a0 o1 g1 | h0 g0 a0 | h1 g1 a1        trunk, branch of turn 0, branch of turn 1
    sees      causal         | p0 + own | p0 g0 a0 o1 + own
    position  0 1 2 3 4      | 1 2 3    | 4 5 6

so a teacher's logits equal those of the same turn scored alone. All rows of a micro-batch follow
each other in one sequence without padding, and attention is told who sees what (attention.py). A
model that cannot be told, or whose layers do not see all, takes trunks and branches one by one.

Rows are planned once for each trajectory (`plan_rows`), grouped by their sizes (`micro_batches`)
and only then turned into tensors (`pack`). Action tokens keep one order all the way, that of the
samples: a row takes its samples in order, and rows follow each other in the order of their samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hero.attention import Span, as_mask
from hero.types import Sample


class HasStates(Protocol):
    """What packing asks of a policy."""

    def takes_spans(self, length: int) -> bool:
        """Whether rows can be computed in one sequence, tokens that see up to so many others."""

    def hidden(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """[B, T, H]"""


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
    def tokens(self) -> tuple[int, int]:
        """Of the student's and of the teacher's forward pass."""
        return sum(map(len, self.student)), sum(map(len, self.teacher))


@dataclass(kw_only=True, slots=True)
class Packed:
    """Rows as one sequence of T tokens, and where the state that predicts each action token is."""

    input_ids: Tensor
    """[T]"""
    position_ids: Tensor
    """[T] of each token within its row, as it would be without the branches before it."""
    lengths: list[int]
    """Tokens of each row."""
    spans: list[Span]
    """Which tokens see which; a row without branches is one span."""
    index: Tensor
    """[N] positions, one for each action token, samples in order."""
    observed: Tensor
    """[O] positions of what predicts each observation token, samples in order."""

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a trunk that takes spans."""
        return {
            "input_ids": self.input_ids[None],
            "position_ids": self.position_ids[None],
            "attention_mask": as_mask(self.spans),
        }

    def states(self, policy: HasStates) -> Tensor:
        """[T, H] the last hidden states of a model; of one that takes no spans, span by span."""
        if policy.takes_spans(max(span.sees for span in self.spans)):
            return policy.hidden(**self.inputs())[0]
        states = []
        for first, last, start, end in self.spans:
            ids = torch.cat([self.input_ids[first:last], self.input_ids[start:end]])
            states.append(policy.hidden(input_ids=ids[None])[0, last - first :])
        return torch.cat(states)


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


def teacher_rows(samples: Sequence[Sample]) -> list[Row]:
    """Of the samples with a teacher: trunks, with a branch for each turn."""
    rows: list[Row] = []
    scored = [sample for sample in samples if sample.has_teacher]
    for i, sample in enumerate(scored):
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


def plan_rows(samples: Sequence[Weighted]) -> list[Rows]:
    """The rows of each trajectory; `samples` are turns, those of one together and in order."""
    plans = []
    for _, group in itertools.groupby(samples, key=lambda weighted: weighted.sample.trajectory):
        own = list(group)
        turns = [weighted.sample for weighted in own]
        plans.append(Rows(samples=own, student=student_rows(turns), teacher=teacher_rows(turns)))
    return plans


def micro_batches(plans: Sequence[Rows], max_tokens: int) -> Iterator[Rows]:
    """Join trajectories so that no forward pass exceeds `max_tokens`, the shortest first.

    A single trajectory that is larger goes alone.
    """
    ordered = sorted(plans, key=lambda plan: max(plan.tokens))
    for group in in_groups([plan.tokens for plan in ordered], max_tokens):
        own = [ordered[i] for i in group]
        yield Rows(
            samples=[sample for plan in own for sample in plan.samples],
            student=[row for plan in own for row in plan.student],
            teacher=[row for plan in own for row in plan.teacher],
        )


def in_groups(sizes: Sequence[tuple[int, ...]], most: int) -> Iterator[list[int]]:
    """Indices in order, together while no sum of their sizes exceeds `most`."""
    group = list[int]()
    sums: tuple[int, ...] = ()
    for i, size in enumerate(sizes):
        joined = tuple(map(sum, zip(sums, size, strict=True))) if group else size
        if group and max(joined) > most:
            yield group
            group, joined = [], size
        group.append(i)
        sums = joined
    if group:
        yield group


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
    """The rows one after the other."""
    ids, positions = list[int](), list[int]()
    spans = list[Span]()
    index, observed = list[int](), list[int]()
    for row in rows:
        first, actions = len(ids), list(row.actions)
        ids += row.trunk
        positions += range(len(row.trunk))
        spans.append(Span(first, first, first, len(ids)))
        for branch in row.branches:
            start = len(ids)
            ids += branch.ids
            positions += range(branch.leaves_at, branch.leaves_at + len(branch.ids))
            spans.append(Span(first, first + branch.leaves_at, start, len(ids)))
            actions.append((len(ids) - branch.num_actions - first, len(ids) - first))
        for places, found in ((index, actions), (observed, row.observations)):
            for start, end in found:  # the state before a token predicts it
                places += range(first + start - 1, first + end - 1)
    return Packed(
        input_ids=torch.tensor(ids, device=device),
        position_ids=torch.tensor(positions, device=device),
        lengths=[len(row) for row in rows],
        spans=spans,
        index=torch.tensor(index, dtype=torch.long, device=device),
        observed=torch.tensor(observed, dtype=torch.long, device=device),
    )


def guard_ids(batch: PackedBatch) -> None:
    """Trained ids are the sampled ids, for student and teacher alike."""
    for packed, targets in (
        (batch.student, batch.target_ids),
        (batch.teacher, batch.target_ids[batch.distill_index]),
    ):
        if packed is not None:
            ids = packed.input_ids[packed.index + 1]
            assert torch.equal(ids, targets), "packed action ids differ from the sampled ids"
    seen = batch.student.input_ids[batch.student.observed + 1]
    assert torch.equal(seen, batch.observed_ids), "packed observations differ from those seen"
