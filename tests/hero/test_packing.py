"""Packed scoring against scoring each turn alone in a forward pass of its own."""

from __future__ import annotations

import pytest
import torch

from hero.algorithms import Episodes, make_algorithm
from hero.packing import guard_ids, micro_batches, pack, student_rows, teacher_rows
from hero.policy import Policy
from hero.teacher import TeacherContext
from hero.types import Diagnosis, Sample, Trajectory


@pytest.fixture
def samples(
    played: list[Trajectory], hints: list[list[Diagnosis]], context: TeacherContext
) -> list[Sample]:
    for row in hints:  # all turns, so that the tree has three branches
        row[1].hint = "go on"
    return make_algorithm("hero", context).annotate(
        Episodes(trajectories=played, diagnoses=hints, gold={})
    )


def states_alone(policy: Policy, prompt_ids: list[int], action_ids: list[int]) -> torch.Tensor:
    hidden = policy.hidden(torch.tensor([prompt_ids + action_ids]))[0]
    return hidden[len(prompt_ids) - 1 : -1]


def weights(samples: list[Sample]) -> list[torch.Tensor]:
    return [torch.ones(len(sample.action_ids)) for sample in samples]


@pytest.mark.parametrize("packing", ["tree", "separate"])
@torch.no_grad()
def test_packed_states_equal_separate_scoring(
    policy: Policy, samples: list[Sample], packing: str
) -> None:
    batch = pack(samples, weights(samples), weights(samples), packing=packing, device=policy.device)
    assert batch.teacher is not None
    for packed, prompts in (
        (batch.student, [s.prompt_ids for s in samples]),
        (batch.teacher, [s.teacher_prompt_ids for s in samples]),
    ):
        states = policy.hidden(**packed.inputs()).flatten(0, 1)[packed.index]
        alone = [
            states_alone(policy, p, s.action_ids) for p, s in zip(prompts, samples, strict=True)
        ]
        torch.testing.assert_close(states, torch.cat(alone), atol=1e-4, rtol=0)


def test_one_trunk_an_episode(samples: list[Sample]) -> None:
    assert [len(row.actions) for row in student_rows(samples)] == [3, 3, 3, 3]
    tree = teacher_rows(samples, "tree")
    assert [len(row.branches) for row in tree] == [3, 3, 3, 3]
    separate = teacher_rows(samples, "separate")
    assert len(separate) == 12
    assert sum(len(r.ids) for r in tree) < sum(len(r.ids) for r in separate)


def test_prompts_that_do_not_extend_get_rows_of_their_own(samples: list[Sample]) -> None:
    first, second = samples[0], samples[1]
    second.prompt_ids = second.prompt_ids[3:]  # a windowed history
    second.branch_at -= 3
    assert len(student_rows([first, second])) == 2
    assert len(teacher_rows([first, second])) == 2


def test_teacher_and_student_share_the_exact_action_ids(samples: list[Sample]) -> None:
    batch = pack(
        samples, weights(samples), weights(samples), packing="tree", device=torch.device("cpu")
    )
    guard_ids(batch)
    assert batch.teacher is not None
    batch.teacher.input_ids.flatten()[batch.teacher.index[4] + 1] += 1
    with pytest.raises(AssertionError, match="differ from the sampled ids"):
        guard_ids(batch)


def test_teacher_context_differs_from_the_students_only_by_the_block(samples: list[Sample]) -> None:
    for sample in samples:
        teacher = sample.teacher_prompt_ids
        assert teacher != sample.prompt_ids and sample.block_ids
        at, block = sample.branch_at, len(sample.block_ids)
        assert teacher[:at] + teacher[at + block :] == sample.prompt_ids


def test_masked_turns_cost_no_teacher_pass(samples: list[Sample]) -> None:
    for sample in samples:
        sample.distill_weight = 0.0
    batch = pack(
        samples, weights(samples), weights(samples), packing="tree", device=torch.device("cpu")
    )
    assert batch.teacher is None and batch.distill_index.numel() == 0


def test_micro_batches_keep_episodes_whole_and_bounded(samples: list[Sample]) -> None:
    batches = list(micro_batches(samples, 1200, "tree"))
    assert sorted(i for batch in batches for i in batch) == list(range(len(samples)))
    assert len(batches) > 1
    for batch in batches:
        episodes = {samples[i].trajectory for i in batch}
        assert len(batch) == 3 * len(episodes)
        rows = teacher_rows([samples[i] for i in batch])
        assert len(rows) == 1 or max(len(r.ids) for r in rows) * len(rows) <= 1200
