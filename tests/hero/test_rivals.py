"""The rivals: what their teachers see, and their losses against dense float64 sums by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hero.algorithms import MODES, Experience
from hero.algorithms.rivals import grsd_gate, sdar_gate
from hero.config import LossConfig, TeacherConfig, TrainConfig
from hero.learner import Learner
from hero.policy import Policy
from hero.teacher import TeacherContext, TeacherWeights
from hero.types import Diagnosis, Sample, Trajectory


def annotate(
    mode: str, context: TeacherContext, played: list[Trajectory], hints: list[list[Diagnosis]]
) -> list[Sample]:
    experience = Experience(trajectories=played, diagnoses=hints, gold={})
    return MODES[mode](context).samples(experience)


def test_hint_sd_trains_the_flagged_turns_of_failed_episodes(
    context: TeacherContext, played: list[Trajectory], hints: list[list[Diagnosis]]
) -> None:
    samples = annotate("hint_sd", context, played, hints)
    assert [(s.trajectory, s.turn) for s in samples] == [(0, 0), (0, 2), (2, 0), (2, 2)]
    text = context.renderer.decode(samples[0].privileged_ids)
    assert "look first" in text and "seen" not in text and "reward" not in text


@pytest.mark.parametrize("mode", ["skill_sd", "sdar"])
def test_a_skill_is_what_the_group_has_taught(
    mode: str, context: TeacherContext, played: list[Trajectory], hints: list[list[Diagnosis]]
) -> None:
    hints[1][1].hint = "pay last"
    samples = annotate(mode, context, played, hints)
    texts = [context.renderer.decode(sample.privileged_ids) for sample in samples]
    assert len(samples) == 12 and all(s.distill_weight == s.pg_weight == 1 for s in samples)
    assert all("Advice: look first stop here pay last\n" in text for text in texts[:6])
    assert all("Advice: look first stop here\n" in text for text in texts[6:])
    assert [s.advantage for s in samples[::3]] == pytest.approx([-1, 1, -1, 1])


def test_grsd_needs_both_outcomes(
    context: TeacherContext, played: list[Trajectory], hints: list[list[Diagnosis]]
) -> None:
    samples = annotate("grsd", context, [*played[:2], played[3]], hints[:3])
    assert [s.has_teacher for s in samples] == [True] * 6 + [False] * 3
    text = context.renderer.decode(samples[3].privileged_ids)  # of the episode that succeeded
    assert f"{played[1].turns[2].action_text}\n-> seen 2" in text and "look first" in text


def test_gates_by_hand() -> None:
    gap = torch.tensor([0.0, math.log(1.1), 5.0, -5.0])
    assert sdar_gate(gap)[:2].tolist() == pytest.approx([0.005, 0.01 / (1 + 1.1**-5)])
    assert grsd_gate(1.0, gap).tolist() == pytest.approx([1.0, 1.05, 1.1, 0.9])
    assert grsd_gate(-1.0, gap).tolist() == pytest.approx([1.0, 1 - 0.5 * (1 - 1 / 1.1), 0.9, 1.1])


def loss_of(policy: Policy, samples: list[Sample], micro_batch_tokens: int) -> float:
    config = TrainConfig(loss=LossConfig(divergence="reverse_kl"))
    config.teacher = TeacherConfig(weights="frozen")
    config.optim.micro_batch_tokens = micro_batch_tokens
    learn = Learner(policy, TeacherWeights(policy, config.teacher), config)
    return sum(float(output.loss) for _, output in learn._accumulate(samples))


@torch.no_grad()
def by_hand(policy: Policy, samples: list[Sample], mode: str) -> float:
    """Sums over tokens of a forward pass a turn, in float64; on policy the ratio is 1."""

    def rows(prompt: list[int], action: list[int]) -> Any:
        logits = policy.model(torch.tensor([prompt + action])).logits[0]
        return logits[len(prompt) - 1 : -1].double().log_softmax(-1)

    divergence = gain = 0.0
    for sample in samples:
        own = rows(sample.prompt_ids, sample.action_ids)
        teacher = rows(sample.teacher_prompt_ids, sample.action_ids)
        for k, token in enumerate(sample.action_ids):
            gap = float(teacher[k, token] - own[k, token])
            if mode == "grsd":
                sign = math.copysign(1, sample.advantage)
                bounded = max(-0.2, min(0.2, math.exp(sign * gap) - 1))
                gain += sample.advantage * (1 + 0.5 * bounded)
            else:
                gate = 0.01 / (1 + math.exp(-5 * gap)) if mode == "sdar" else 1.0
                divergence += gate * float((own[k].exp() * (own[k] - teacher[k])).sum())
                gain += sample.advantage
    tokens = sum(len(sample.action_ids) for sample in samples)
    return (divergence - gain) / tokens


@pytest.mark.parametrize("micro_batch_tokens", [1, 10**6])
@pytest.mark.parametrize("mode", ["skill_sd", "sdar", "grsd"])
def test_loss_by_hand(
    mode: str, micro_batch_tokens: int, fresh_policy: Policy, context: TeacherContext,
    played: list[Trajectory], hints: list[list[Diagnosis]],
) -> None:  # fmt: skip
    samples = annotate(mode, context, played, hints)
    found = loss_of(fresh_policy, samples, micro_batch_tokens)
    assert found == pytest.approx(by_hand(fresh_policy, samples, mode), abs=1e-5)
