"""A learner with few settings, its gradients, and the textbook's loss."""

from __future__ import annotations

import torch

from hero.config import LossConfig, OptimConfig, RolloutConfig, TeacherConfig, TrainConfig
from hero.learner import Learner
from hero.packing import PackedBatch, Weighted, micro_batches, pack, plan_rows
from hero.policy import Policy
from hero.teacher import TeacherWeights
from hero.types import Sample


def packed(samples: list[Sample]) -> PackedBatch:
    """All in one micro-batch, with weight 1 for every token."""
    ones = [torch.ones(len(sample.action_ids)) for sample in samples]
    items = [Weighted(sample=s, distill=w, pg=w) for s, w in zip(samples, ones, strict=True)]
    [rows] = micro_batches(plan_rows(items), 10**9)
    return pack(rows, torch.device("cpu"))


def config(mode: str = "hero", **optim: object) -> TrainConfig:
    settings = {"learning_rate": 1e-2, "warmup_steps": 1, **optim}
    return TrainConfig(
        mode=mode,  # type: ignore[arg-type]
        rollout=RolloutConfig(group_size=2),
        optim=OptimConfig(**settings),  # type: ignore[arg-type]
        loss=LossConfig(loss_aggregation="token"),
    )


def learner(policy: Policy, settings: TrainConfig, weights: str = "ema") -> Learner:
    teacher = TeacherWeights(policy, TeacherConfig(weights=weights))  # type: ignore[arg-type]
    return Learner(policy, teacher, settings)


def gradients(
    policy: Policy, settings: TrainConfig, samples: list[Sample]
) -> dict[str, torch.Tensor]:
    policy.model.zero_grad(set_to_none=True)
    learner(policy, settings)._accumulate(samples)
    return {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}


def textbook_jsd(
    policy: Policy, samples: list[Sample], ratio_clip: float, teacher_policy: Policy | None = None
) -> torch.Tensor:
    """Σ over action tokens of min(ratio, clip)·JSD over their number; a forward pass a turn."""
    old = teacher_policy or policy
    total, count = torch.zeros((), dtype=torch.float64), 0
    for s in samples:

        def logprobs(policy: Policy, prompt: list[int], s: Sample = s) -> torch.Tensor:
            logits = policy.model(torch.tensor([prompt + s.action_ids])).logits[0]
            return logits[len(prompt) - 1 : -1].double().log_softmax(-1)

        student = logprobs(policy, s.prompt_ids)
        with torch.no_grad():
            teacher = logprobs(old, s.teacher_prompt_ids)
        mixed = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0))
        jsd = 0.5 * (student.exp() * (student - mixed) + teacher.exp() * (teacher - mixed)).sum(-1)
        own = student.gather(1, torch.tensor(s.action_ids)[:, None]).squeeze(1)
        ratio = (own - torch.tensor(s.sampled_logprobs)).exp().clamp(max=ratio_clip).detach()
        total, count = total + (ratio * jsd).sum(), count + len(s.action_ids)
    return total / count
