"""Weights of the teacher: a moving average, frozen, or the student's own."""

from __future__ import annotations

import copy

import pytest
import torch
from loss_helpers import config, learner, packed, textbook_jsd

from hero.config import LossConfig, ModelConfig, TeacherConfig
from hero.loss import compute_loss
from hero.policy import Policy
from hero.teacher import TeacherWeights
from hero.types import Sample


def test_ema_formula(fresh_policy: Policy, samples: list[Sample]) -> None:
    learn = learner(fresh_policy, config())
    start = {n: p.clone() for n, p in learn.teacher.state_dict().items()}
    learn.learn(samples, seed=0)
    assert learn.steps_taken == 1
    for name, value in learn.teacher.state_dict().items():
        student = fresh_policy.trainable()[name].detach()
        torch.testing.assert_close(value, 0.95 * start[name] + 0.05 * student)
        assert not torch.equal(value, start[name])


def test_frozen_teacher_stays_and_the_swap_undoes_itself(
    fresh_policy: Policy, samples: list[Sample]
) -> None:
    learn = learner(fresh_policy, config(), weights="frozen")
    prompt = torch.tensor([samples[0].prompt_ids])
    before = fresh_policy.model(prompt).logits.detach()
    learn.learn(samples, seed=0)
    student = {n: p.detach().clone() for n, p in fresh_policy.trainable().items()}
    with learn.teacher.applied(), torch.no_grad():
        assert torch.equal(fresh_policy.model(prompt).logits, before)  # head and embedding as well
        assert torch.equal(fresh_policy.logits(fresh_policy.hidden(prompt)), before)
    assert all(torch.equal(p, student[n]) for n, p in fresh_policy.trainable().items())
    assert not torch.allclose(fresh_policy.model(prompt).logits, before)
    with pytest.raises(RuntimeError, match="inside"), learn.teacher.applied():
        raise RuntimeError("inside")
    assert all(torch.equal(p, student[n]) for n, p in fresh_policy.trainable().items())


def test_a_frozen_teacher_scores_with_its_own_head(
    fresh_policy: Policy, samples: list[Sample]
) -> None:
    start = Policy(copy.deepcopy(fresh_policy.model), fresh_policy.tokenizer, ModelConfig())
    learn = learner(fresh_policy, config(), weights="frozen")
    with torch.no_grad():
        fresh_policy.head.weight.mul_(1.5)
    batch = packed(samples)
    length = len(batch.target_ids)
    batch.distill_weights = torch.full_like(batch.distill_weights, 1 / length)
    loss = compute_loss(fresh_policy, learn.teacher, batch, LossConfig(), 1.0).loss
    expected = textbook_jsd(fresh_policy, samples, 2.0, teacher_policy=start)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("weights", ["frozen", "ema", "live"])
@pytest.mark.parametrize("model", [{}, {"train_head": False}, {"lora_rank": 2}])
def test_the_head_is_shared_exactly_where_nobody_trains_it(
    policy: Policy, weights: str, model: dict[str, object]
) -> None:
    if "lora_rank" in model:
        pytest.importorskip("peft", reason="LoRA needs peft")
    own = Policy(
        copy.deepcopy(policy.model),
        policy.tokenizer,
        ModelConfig(device="cpu", **model),  # type: ignore[arg-type]
    )
    teacher = TeacherWeights(own, TeacherConfig(weights=weights))  # type: ignore[arg-type]
    assert bool(teacher.own_head()) == (not model and weights != "live")
