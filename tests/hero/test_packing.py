"""Packed scoring against scoring each turn alone in a forward pass of its own."""

from __future__ import annotations

import pytest
import torch

from hero.algorithms import MODES, Experience
from hero.packing import (
    PackedBatch,
    Weighted,
    guard_ids,
    micro_batches,
    pack,
    plan_rows,
    student_rows,
    teacher_rows,
)
from hero.policy import Policy
from hero.teacher import TeacherContext
from hero.types import Diagnosis, Sample, Trajectory


@pytest.fixture
def samples(
    played: list[Trajectory], hints: list[list[Diagnosis]], context: TeacherContext
) -> list[Sample]:
    for row in hints:  # all turns, so that the tree has three branches
        row[1].hint = "go on"
    return MODES["hero"](context).annotate(
        Experience(trajectories=played, diagnoses=hints, gold={})
    )


def states_alone(policy: Policy, prompt_ids: list[int], action_ids: list[int]) -> torch.Tensor:
    hidden = policy.hidden(torch.tensor([prompt_ids + action_ids]))[0]
    return hidden[len(prompt_ids) - 1 : -1]


def weighted(samples: list[Sample]) -> list[Weighted]:
    ones = [torch.ones(len(sample.action_ids)) for sample in samples]
    return [Weighted(sample=s, distill=w, pg=w) for s, w in zip(samples, ones, strict=True)]


def packed(samples: list[Sample], packing: str = "tree") -> PackedBatch:
    [rows] = micro_batches(plan_rows(weighted(samples), packing), 10**9)
    return pack(rows, torch.device("cpu"))


@pytest.mark.parametrize("packing", ["tree", "separate"])
@torch.no_grad()
def test_packed_states_equal_separate_scoring(
    policy: Policy, samples: list[Sample], packing: str
) -> None:
    batch = packed(samples, packing)
    assert batch.teacher is not None
    ordered = [item.sample for item in batch.samples]
    for rows, prompts in (
        (batch.student, [s.prompt_ids for s in ordered]),
        (batch.teacher, [s.teacher_prompt_ids for s in ordered]),
    ):
        states = rows.states(policy)[rows.index]
        alone = [
            states_alone(policy, p, s.action_ids) for p, s in zip(prompts, ordered, strict=True)
        ]
        torch.testing.assert_close(states, torch.cat(alone), atol=1e-4, rtol=0)


def test_one_trunk_an_episode(samples: list[Sample]) -> None:
    assert [len(row.actions) for row in student_rows(samples)] == [3, 3, 3, 3]
    tree = teacher_rows(samples, "tree")
    assert [len(row.branches) for row in tree] == [3, 3, 3, 3]
    separate = teacher_rows(samples, "separate")
    assert len(separate) == 12
    assert sum(map(len, tree)) < sum(map(len, separate))


def test_prompts_that_do_not_extend_get_rows_of_their_own(samples: list[Sample]) -> None:
    first, second = samples[0], samples[1]
    second.prompt_ids = second.prompt_ids[3:]  # a windowed history
    second.branch_at -= 3
    assert len(student_rows([first, second])) == 2
    assert len(teacher_rows([first, second])) == 2


def test_teacher_and_student_share_the_exact_action_ids(samples: list[Sample]) -> None:
    batch = packed(samples)
    guard_ids(batch)
    assert batch.teacher is not None
    batch.teacher.input_ids[batch.teacher.index[4] + 1] += 1
    with pytest.raises(AssertionError, match="differ from the sampled ids"):
        guard_ids(batch)


def test_teacher_context_is_the_students_with_hindsight_spliced_in(samples: list[Sample]) -> None:
    for sample in samples:
        teacher = sample.teacher_prompt_ids
        assert teacher != sample.prompt_ids and sample.privileged_ids
        start, end = sample.branch_at, sample.branch_at + len(sample.privileged_ids)
        assert teacher[:start] + teacher[end:] == sample.prompt_ids


def test_masked_turns_cost_no_teacher_pass(samples: list[Sample]) -> None:
    for sample in samples:
        sample.distill_weight = 0.0
    batch = packed(samples)
    assert batch.teacher is None and batch.distill_index.numel() == 0


def test_micro_batches_keep_episodes_whole_and_bounded(samples: list[Sample]) -> None:
    batches = list(micro_batches(plan_rows(weighted(samples), "tree"), 1200))
    turns = [(item.sample.trajectory, item.sample.turn) for b in batches for item in b.samples]
    assert sorted(turns) == [(s.trajectory, s.turn) for s in samples]
    assert len(batches) > 1
    for batch in batches:
        episodes = {item.sample.trajectory for item in batch.samples}
        assert len(batch.samples) == 3 * len(episodes)
        rows = teacher_rows([item.sample for item in batch.samples])
        assert rows == batch.teacher
        assert len(rows) == 1 or sum(map(len, rows)) <= 1200


@torch.no_grad()
def test_a_model_that_does_not_see_all_takes_rows_one_by_one(
    fresh_policy: Policy, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = packed(samples, "separate")
    expected = batch.student.states(fresh_policy)
    monkeypatch.setattr(fresh_policy.model.config, "sliding_window", 16, raising=False)
    given: list[tuple[int, ...]] = []
    hidden = fresh_policy.hidden

    def noted(input_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        given.append(tuple(input_ids.shape))
        assert not inputs
        return hidden(input_ids)

    monkeypatch.setattr(fresh_policy, "hidden", noted)
    states = batch.student.states(fresh_policy)
    assert given == [(1, length) for length in batch.student.lengths]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
