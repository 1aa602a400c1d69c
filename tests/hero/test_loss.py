"""Loss, optimiser step and teacher weights against textbook formulas in plain torch."""

from __future__ import annotations

import random

import pytest
import torch
from loss_helpers import config, gradients, learner, packed, textbook_jsd

from hero.algorithms import MODES, Experience
from hero.config import (
    LossConfig,
    TeacherConfig,
)
from hero.learner import split
from hero.loss import compute_loss
from hero.policy import Policy
from hero.teacher import TeacherContext, TeacherWeights
from hero.types import Sample, Trajectory


def test_loss_and_gradient_equal_the_textbook(fresh_policy: Policy, samples: list[Sample]) -> None:
    for sample in samples:  # off-policy by up to a factor of e^0.8, so that the clip bites
        noise = random.Random(sample.turn)
        sample.sampled_logprobs = [x - noise.uniform(-0.8, 1.6) for x in sample.sampled_logprobs]
    # The shared head gets no gradient through the teacher: textbook_jsd detaches it as well.
    expected = textbook_jsd(fresh_policy, samples, 2.0)
    expected.backward()
    truth = {n: p.grad.clone() for n, p in fresh_policy.trainable().items()}
    fresh_policy.model.zero_grad(set_to_none=True)
    outputs = learner(fresh_policy, config())._accumulate(samples)
    loss = float(sum(o.loss.detach() for _, o in outputs))
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, parameter in fresh_policy.trainable().items():
        torch.testing.assert_close(parameter.grad, truth[name], atol=2e-6, rtol=1e-3)


def test_gradients_do_not_depend_on_micro_batches(
    fresh_policy: Policy, samples: list[Sample]
) -> None:
    whole = gradients(fresh_policy, config(micro_batch_tokens=10**6), samples)
    parts = gradients(fresh_policy, config(micro_batch_tokens=1), samples)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_model_without_spans_has_the_same_gradient(
    fresh_policy: Policy, samples: list[Sample]
) -> None:
    first = gradients(fresh_policy, config(), samples)
    fresh_policy.model.set_attn_implementation("sdpa")
    assert not fresh_policy.takes_spans(1)
    for name, gradient in gradients(fresh_policy, config(), samples).items():
        torch.testing.assert_close(first[name], gradient, atol=1e-5, rtol=1e-3)


def test_a_teacher_without_hindsight_gives_exactly_zero(
    fresh_policy: Policy, samples: list[Sample]
) -> None:
    """The classic mistake, a teacher that sees the student's own context: nothing is learnt."""
    for sample in samples:
        sample.privileged_ids = []
    fresh_policy.model.set_attn_implementation("sdpa")  # both sides in the same products
    grads = gradients(fresh_policy, config(), samples)
    assert all(float(g.abs().max()) < 1e-7 for g in grads.values())


def test_masked_turns_have_exactly_no_gradient(fresh_policy: Policy, samples: list[Sample]) -> None:
    kept = [s for s in samples if s.turn == 0]
    for sample in samples:
        sample.distill_weight = float(sample.turn == 0)
    first = gradients(fresh_policy, config(), samples)
    for sample in samples:
        if sample.turn:
            sample.sampled_logprobs = [-9.0] * len(sample.action_ids)
    second = gradients(fresh_policy, config(), samples)
    alone = gradients(fresh_policy, config(), kept)
    assert first.keys() == alone.keys()
    for name in first:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], atol=1e-7, rtol=1e-5)


def test_observation_tokens_are_never_trained(
    fresh_policy: Policy, samples: list[Sample], played: list[Trajectory]
) -> None:
    batch = packed(samples)
    order = list(dict.fromkeys(item.sample.trajectory for item in batch.samples))
    places = [
        (row, column)
        for row, length in zip(order, batch.student.lengths, strict=True)
        for column in range(length)
    ]
    trained = {places[int(i) + 1] for i in batch.student.index}
    for row in range(len(played)):
        for turn in played[row].turns:
            start, end = len(turn.prompt_ids), len(turn.prompt_ids) + len(turn.action_ids)
            previous = [t for t in played[row].turns if len(t.prompt_ids) < start]
            begin = len(previous[-1].prompt_ids) + len(previous[-1].action_ids) if previous else 0
            assert not any((row, column) in trained for column in range(begin, start))
            expected = turn is not played[row].turns[1]  # the middle turns have no hint
            assert all(((row, column) in trained) == expected for column in range(start, end))


def test_on_policy_importance_ratio_is_one(fresh_policy: Policy, samples: list[Sample]) -> None:
    def total(clip: float) -> float:
        batch = packed(samples)
        teacher = TeacherWeights(fresh_policy, TeacherConfig(weights="live"))
        loss = LossConfig(is_clip=clip)
        return float(compute_loss(fresh_policy, teacher, batch, loss, 1.0).loss)

    assert total(2.0) == pytest.approx(total(0.0), rel=1e-4)


def test_no_samples_is_no_step_and_no_ema(fresh_policy: Policy) -> None:
    learn = learner(fresh_policy, config())
    before = {n: p.detach().clone() for n, p in fresh_policy.trainable().items()}
    teacher = {n: p.clone() for n, p in learn.teacher.state_dict().items()}
    learned = learn.learn([], seed=0)
    assert learned.steps == 0 and learned.loss == 0.0 and learn.steps_taken == 0
    assert all(torch.equal(p, before[n]) for n, p in fresh_policy.trainable().items())
    assert all(torch.equal(p, teacher[n]) for n, p in learn.teacher.state_dict().items())


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(
    fresh_policy: Policy, samples: list[Sample]
) -> None:
    next(iter(fresh_policy.trainable().values())).register_hook(lambda g: g * float("nan"))
    learn = learner(fresh_policy, config())
    before = {n: p.detach().clone() for n, p in fresh_policy.trainable().items()}
    learned = learn.learn(samples, seed=0)
    assert (learned.steps, learned.skipped_steps, learn.steps_taken) == (0, 1, 0)
    assert all(torch.equal(p, before[n]) for n, p in fresh_policy.trainable().items())


def test_training_moves_the_student_towards_its_teacher(
    fresh_policy: Policy, samples: list[Sample]
) -> None:
    settings = config(learning_rate=3e-3)
    settings.engine.max_drift = 10.0  # the same samples, again and again
    learn = learner(fresh_policy, settings, weights="frozen")
    losses = [learn.learn(samples, seed=step).loss for step in range(15)]
    assert losses[-1] < 0.5 * losses[0]


def test_grpo_gradient_is_the_policy_gradient(
    fresh_policy: Policy, experience: Experience, context: TeacherContext
) -> None:
    samples = MODES["grpo"](context).annotate(experience)
    total, count = torch.zeros(()), 0
    for s in samples:
        logits = fresh_policy.model(torch.tensor([s.prompt_ids + s.action_ids])).logits[0]
        logprobs = logits[len(s.prompt_ids) - 1 : -1].log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(s.action_ids)[:, None])
        total, count = total - s.advantage * own.sum(), count + len(s.action_ids)
    (total / count).backward()
    truth = {n: p.grad.clone() for n, p in fresh_policy.trainable().items()}
    for name, gradient in gradients(fresh_policy, config("grpo"), samples).items():
        torch.testing.assert_close(gradient, truth[name], atol=2e-6, rtol=2e-3)


def test_imitation_is_the_cross_entropy_of_corrected_actions(
    fresh_policy: Policy, experience: Experience, context: TeacherContext
) -> None:
    for row in experience.diagnoses:
        row[0].corrected_action = "look"
    samples = MODES["imitation"](context).annotate(experience)
    ids = [*context.renderer.encode("look"), context.renderer.end_id]
    assert [(s.trajectory, s.turn, s.action_ids) for s in samples] == [
        (t, 0, ids) for t in range(4)
    ]
    total = torch.zeros(())
    for s in samples:
        logits = fresh_policy.model(torch.tensor([s.prompt_ids + ids])).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits[len(s.prompt_ids) - 1 : -1], torch.tensor(ids), reduction="sum"
        )
    (total / (4 * len(ids))).backward()
    truth = {n: p.grad.clone() for n, p in fresh_policy.trainable().items()}
    for name, gradient in gradients(fresh_policy, config("imitation"), samples).items():
        torch.testing.assert_close(gradient, truth[name], atol=2e-6, rtol=2e-3)


def test_grpo_without_variance_does_nothing(
    fresh_policy: Policy, experience: Experience, context: TeacherContext
) -> None:
    for trajectory in experience.trajectories:
        trajectory.reward = 0.5
    samples = MODES["grpo"](context).annotate(experience)
    assert learner(fresh_policy, config("grpo")).learn(samples, seed=0).steps == 0


def test_what_is_recorded_as_trained_had_a_gradient(
    fresh_policy: Policy, experience: Experience, context: TeacherContext
) -> None:
    """hero+grpo trains turns without a hint too: by their advantage, unless that is 0."""
    experience.trajectories[2].reward = experience.trajectories[3].reward  # no variance: group g1
    samples = MODES["hero+grpo"](context, LossConfig(turns="hinted")).annotate(experience)
    moving = set()
    for sample in samples:  # the oracle: does this turn alone give a gradient?
        alone = gradients(fresh_policy, config("hero+grpo"), [sample]).values()
        if any(bool(gradient.any()) for gradient in alone):
            moving.add((sample.trajectory, sample.turn))
    trained = learner(fresh_policy, config("hero+grpo")).learn(samples, seed=0).trained
    both = ("distillation", "policy gradient")
    assert trained == {
        **{(t, k): both for t in (0, 1) for k in (0, 2)},
        **{(t, 1): ("policy gradient",) for t in (0, 1)},
        **{(t, k): ("distillation",) for t in (2, 3) for k in (0, 2)},
    }
    assert set(trained) == moving


def test_a_skipped_step_trained_nothing(fresh_policy: Policy, samples: list[Sample]) -> None:
    next(iter(fresh_policy.trainable().values())).register_hook(lambda g: g * float("nan"))
    learned = learner(fresh_policy, config()).learn(samples, seed=0)
    assert learned.trained == {} and learned.divergence


def test_minibatches_keep_episodes_whole(samples: list[Sample]) -> None:
    parts = split(samples, 2, random.Random(0))
    assert sorted(len(part) for part in parts) == [4, 4]
    owners = [{s.trajectory for s in part} for part in parts]
    assert not owners[0] & owners[1]
