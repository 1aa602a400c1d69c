"""Terms that hold what is right: clean turns, observations, KL to the start.

Oracles: dense float64 log-softmax over one forward pass a turn, and sums by hand.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hero.algorithms import MODES, Experience
from hero.checks import check, from_dict
from hero.config import LossConfig, ModelConfig, OptimConfig, TeacherConfig, TrainConfig
from hero.learner import Learner
from hero.policy import Policy
from hero.prompts import make_prompts
from hero.teacher import TeacherContext, TeacherWeights
from hero.types import Diagnosis, Sample, Trajectory


def samples_of(
    mode: str, context: TeacherContext, played: list[Trajectory], hints: Any, **loss: Any
) -> list[Sample]:
    experience = Experience(trajectories=played, diagnoses=hints, gold={})
    choice = LossConfig(**{"turns": "hinted"} | loss)
    return MODES[mode](context, choice).samples(experience)


def learner(policy: Policy, mode: str, micro_batch_tokens: int = 10**6, **loss: Any) -> Learner:
    settings = TrainConfig(
        mode=mode,
        loss=LossConfig(**loss),
        optim=OptimConfig(micro_batch_tokens=micro_batch_tokens, warmup_steps=1),
        teacher=TeacherConfig(weights="frozen"),
    )
    return Learner(policy, TeacherWeights(policy, settings.teacher), settings)


def gradients(learn: Learner, samples: list[Sample]) -> dict[str, torch.Tensor]:
    learn.policy.model.zero_grad(set_to_none=True)
    learn._accumulate(samples)
    return {n: p.grad.clone() for n, p in learn.policy.trainable().items() if p.grad is not None}


def dense(policy: Policy, ids: list[int]) -> torch.Tensor:
    """[T, V] float64 log-probabilities of the token after each of `ids`."""
    return policy.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def observation_entropy(policy: Policy, played: list[Trajectory]) -> torch.Tensor:
    """Mean -log p of every character of each observation that another turn follows."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for trajectory in played:
        for k, turn in enumerate(trajectory.turns[:-1]):
            ids = trajectory.turns[k + 1].prompt_ids
            text = policy.renderer.encode(turn.observation or "")
            starts = [
                i for i in range(len(turn.prompt_ids), len(ids)) if ids[i : i + len(text)] == text
            ]
            start = starts[-1]  # an action may hold the same words before it
            logprobs = dense(policy, ids)[start - 1 : start - 1 + len(text)]
            total = total - logprobs.gather(1, torch.tensor(text)[:, None]).sum()
            count += len(text)
    assert count == sum(len(t.observation or "") for p in played for t in p.turns[:-1])
    return total / count


@pytest.mark.parametrize("micro_batch_tokens", [1, 700, 10**6])
def test_observation_cross_entropy_equals_the_dense_one(
    fresh_policy: Policy, context: TeacherContext, played: list[Trajectory], micro_batch_tokens: int
) -> None:
    """GRPO with equal rewards trains nothing else, so the whole loss is λ times this."""
    played = copy.deepcopy(played)
    for trajectory in played:
        trajectory.reward = 1.0
    truth = 0.1 * observation_entropy(fresh_policy, played)
    truth.backward()  # type: ignore[no-untyped-call]
    expected = {
        n: p.grad.clone() for n, p in fresh_policy.trainable().items() if p.grad is not None
    }
    samples = samples_of("grpo", context, played, [], observation_weight=0.1)
    learn = learner(fresh_policy, "grpo", micro_batch_tokens, observation_weight=0.1)
    for name, gradient in gradients(learn, samples).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-3)
    learned = learn.learn(samples, seed=0)
    assert learned.loss == pytest.approx(float(truth.detach()), rel=1e-5)
    assert learned.terms == {"observation": pytest.approx(float(truth.detach()), rel=1e-5)}
    assert set(learned.trained) == {(t, k) for t in range(4) for k in (0, 1)}
    assert set(learned.trained.values()) == {("observation",)}


def test_terms_add_up(
    fresh_policy: Policy, context: TeacherContext, played: list[Trajectory],
    hints: list[list[Diagnosis]],
) -> None:  # fmt: skip
    """Distillation alone and observations alone sum to both in one pass, whatever is hinted."""
    alone = gradients(learner(fresh_policy, "hero"), samples_of("hero", context, played, hints))
    none = [[Diagnosis(turn=k) for k in range(3)] for _ in played]
    weight = {"observation_weight": 0.2}
    seen = gradients(
        learner(fresh_policy, "hero", **weight),
        samples_of("hero", context, played, none, **weight),
    )
    both = gradients(
        learner(fresh_policy, "hero", 700, **weight),
        samples_of("hero", context, played, hints, **weight),
    )
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, alone[name] + seen[name], atol=1e-6, rtol=1e-3)


def test_prompts_that_do_not_go_on_have_no_observation(
    context: TeacherContext, played: list[Trajectory], hints: list[list[Diagnosis]]
) -> None:
    windowed = copy.deepcopy(played)
    for trajectory in windowed:
        trajectory.turns[1].prompt_ids = trajectory.turns[1].prompt_ids[3:]
    samples = samples_of("hero", context, windowed, hints, observation_weight=0.1)
    assert [s.num_observed for s in samples[:3]] == [0, 0, 0]


def start_kl(policy: Policy, start: Policy, played: list[Trajectory]) -> torch.Tensor:
    """Mean KL(student, start) over all action tokens."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for trajectory in played:
        for turn in trajectory.turns:
            ids = turn.prompt_ids + turn.action_ids
            own = dense(policy, ids)[len(turn.prompt_ids) - 1 : -1]
            with torch.no_grad():
                old = dense(start, ids)[len(turn.prompt_ids) - 1 : -1]
            total, count = total + (own.exp() * (own - old)).sum(), count + len(turn.action_ids)
    return total / count


@pytest.mark.parametrize("model", [{}, {"lora_rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 10**6])
def test_kl_to_the_start_equals_the_dense_one(
    policy: Policy, context: TeacherContext, played: list[Trajectory],
    hints: list[list[Diagnosis]], micro_batch_tokens: int, model: dict[str, int],
) -> None:  # fmt: skip
    if model:
        pytest.importorskip("peft", reason="LoRA needs peft")
    own = Policy(
        copy.deepcopy(policy.model),
        policy.tokenizer,
        ModelConfig(device="cpu", **model),  # type: ignore[arg-type]
    )
    none = [[Diagnosis(turn=k) for k in range(3)] for _ in hints]
    learn = learner(own, "hero", micro_batch_tokens, kl_to_start=0.5)
    samples = samples_of("hero", context, played, none, kl_to_start=0.5)
    assert all(float(g.abs().max()) < 1e-6 for g in gradients(learn, samples).values())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # move away: zero at the start, whatever is measured
        for parameter in own.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    own.model.zero_grad(set_to_none=True)
    truth = 0.5 * start_kl(own, policy, played)
    truth.backward()  # type: ignore[no-untyped-call]
    expected = {n: p.grad.clone() for n, p in own.trainable().items() if p.grad is not None}
    for name, gradient in gradients(learn, samples).items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=2e-3)
    assert learn.learn(samples, seed=0).loss == pytest.approx(float(truth.detach()), rel=1e-4)


@pytest.mark.parametrize(
    ("turns", "clean"), [("hinted", []), ("from_first_fault", [3]), ("all", [0, 1, 3])]
)
def test_which_clean_turns_join(
    renderer: Any, context: TeacherContext, episode: Any, turns: str, clean: list[int]
) -> None:
    """Turns 2 and 4 of five have a hint; the last turn of all was never answered."""
    trajectory = episode(["s"] * 6)
    trajectory.turns[5].observation = None
    row = [Diagnosis(turn=k, hint="look" if k in (2, 4) else "") for k in range(6)]
    samples = samples_of("hero", context, [trajectory], [row], turns=turns, clean_turn_weight=0.25)
    weights = {sample.turn: sample.distill_weight for sample in samples}
    assert weights == {2: 1.0, 4: 1.0, **dict.fromkeys(clean, 0.25)}
    for sample in samples:
        text = renderer.decode(sample.privileged_ids)
        assert f"obs {sample.turn}" in text and "final reward" in text
        assert ("look" in text) == (sample.turn in (2, 4))
    both = samples_of("hero+grpo", context, [trajectory], [row], turns=turns)
    assert {s.turn for s in both if s.distill_weight} == set(weights)


@pytest.mark.parametrize(
    ("hidden", "clean"),
    [({"observation"}, [0, 1, 3]), ({"reward"}, [0, 1, 3]), ({"observation", "reward"}, [])],
)
def test_clean_turns_join_behind_what_is_shown(
    renderer: Any, episode: Any, hidden: set[str], clean: list[int]
) -> None:
    """Two of five turns have a hint; the last turn of all was never answered."""
    trajectory = episode(["s"] * 6)
    trajectory.turns[5].observation = None
    row = [Diagnosis(turn=k, hint="look" if k in (2, 4) else "") for k in range(6)]
    config = TeacherConfig(**dict.fromkeys(hidden, False))
    context = TeacherContext(config, renderer, make_prompts("standard"))
    samples = samples_of("hero", context, [trajectory], [row], turns="all")
    assert [s.turn for s in samples] == sorted([2, 4, *clean])
    for sample in samples:
        text = renderer.decode(sample.privileged_ids)
        assert (f"obs {sample.turn}" in text) == ("observation" not in hidden)
        assert ("final reward" in text) == ("reward" not in hidden)


def test_clean_turns_count_by_their_weight(
    fresh_policy: Policy, context: TeacherContext, played: list[Trajectory],
    hints: list[list[Diagnosis]],
) -> None:  # fmt: skip
    """The loss is (Σ hinted + w Σ clean) / (hinted tokens + w clean tokens)."""
    choice = {"turns": "all", "clean_turn_weight": 0.25}
    samples = samples_of("hero", context, played, hints, **choice)
    learned = learner(fresh_policy, "hero", is_clip=0.0, **choice).learn(samples, seed=0)
    total = count = 0.0
    for (_, k), values in learned.divergence.items():
        weight = 0.25 if k == 1 else 1.0
        total, count = total + weight * sum(values), count + weight * len(values)
    assert len(learned.divergence) == 12
    assert learned.loss == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("mode", ["env_only", "grpo", "reflection_only"])
def test_modes_that_choose_no_turns_refuse_the_choice(mode: str) -> None:
    config = from_dict(
        {"mode": mode, "loss": {"turns": "from_first_fault"}, "rollout": {"group_size": 2}}
    )
    with pytest.raises(ValueError, match=r"loss.turns=from_first_fault .*hero, hero\+grpo"):
        check(config)
