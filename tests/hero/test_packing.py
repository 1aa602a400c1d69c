"""Packed scoring against scoring each turn alone in a forward pass of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hero.algorithms import MODES, Experience
from hero.config import ModelConfig
from hero.packing import (
    PackedBatch,
    Weighted,
    guard_ids,
    micro_batches,
    pack,
    plan_rows,
    student_rows,
    teacher_rows,
    to_tensors,
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


def packed(samples: list[Sample]) -> PackedBatch:
    [rows] = micro_batches(plan_rows(weighted(samples)), 10**9)
    return pack(rows, torch.device("cpu"))


@pytest.mark.parametrize("implementation", ["spans", "sdpa", "eager"])
@torch.no_grad()
def test_packed_states_equal_separate_scoring(
    fresh_policy: Policy, samples: list[Sample], implementation: str
) -> None:
    policy = fresh_policy
    if implementation != "spans":
        policy.model.set_attn_implementation(implementation)
    assert policy.takes_spans(1000) == (implementation == "spans")
    batch = packed(samples)
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
    tree = teacher_rows(samples)
    assert [len(row.branches) for row in tree] == [3, 3, 3, 3]
    separate = sum(len(s.teacher_prompt_ids) + len(s.action_ids) for s in samples)
    assert sum(map(len, tree)) < separate


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
    batches = list(micro_batches(plan_rows(weighted(samples)), 1200))
    turns = [(item.sample.trajectory, item.sample.turn) for b in batches for item in b.samples]
    assert sorted(turns) == [(s.trajectory, s.turn) for s in samples]
    assert len(batches) > 1
    for batch in batches:
        episodes = {item.sample.trajectory for item in batch.samples}
        assert len(batch.samples) == 3 * len(episodes)
        rows = teacher_rows([item.sample for item in batch.samples])
        assert rows == batch.teacher
        assert len(rows) == 1 or sum(map(len, rows)) <= 1200


@pytest.mark.parametrize("window", [24, 64])
@torch.no_grad()
def test_a_row_longer_than_the_window_that_no_context_reaches(
    tiny_tokenizer: Any, window: int
) -> None:
    """The longest context has 21 tokens, the row with its branches 37. Oracle: each turn alone."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mistral", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=window, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    policy = Policy(model, tiny_tokenizer, ModelConfig(device="cpu"))
    ids = torch.randint(3, 60, (60,)).tolist()
    samples = [
        Sample(
            trajectory=0, turn=k, prompt_ids=ids[: 4 + 5 * k],
            action_ids=ids[4 + 5 * k : 7 + 5 * k], sampled_logprobs=[0.0] * 3,
            privileged_ids=ids[40 + 4 * k : 44 + 4 * k],
            branch_at=3 + 5 * k, distill_weight=1.0,
        )
        for k in range(3)
    ]  # fmt: skip
    rows = to_tensors(teacher_rows(samples), policy.device)
    assert rows.lengths == [37] and max(span.sees for span in rows.spans) == 21
    alone = [states_alone(policy, s.teacher_prompt_ids, s.action_ids) for s in samples]
    torch.testing.assert_close(rows.states(policy)[rows.index], torch.cat(alone), atol=1e-4, rtol=0)
