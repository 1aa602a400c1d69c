"""From annotated samples to optimiser steps: packing, loss, accumulation, clipping, EMA."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hero.config import TrainConfig
from hero.loss import LossOutput, compute_loss, token_weights
from hero.packing import PackedBatch, micro_batches, pack
from hero.policy import Policy
from hero.teacher import TeacherWeights
from hero.types import Sample


@dataclass(kw_only=True, slots=True)
class Learned:
    """What a batch of samples did."""

    steps: int = 0
    skipped_steps: int = 0
    """Steps left out because the gradient was not finite."""
    loss: float = 0.0
    """Mean over steps."""
    grad_norm: float = 0.0
    """Mean over steps, before clipping."""
    entropy: float = 0.0
    """Mean over the tokens looked at, nats."""
    divergence: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """Per-token divergence of each distilled (trajectory, turn), in nats, of the first pass."""
    logprob_gap: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """log T(y) - log S(y), likewise."""


class Learner:
    """AdamW with warm-up; one optimiser step a minibatch, one denominator for all its
    micro-batches."""

    def __init__(self, policy: Policy, teacher: TeacherWeights, config: TrainConfig) -> None:
        self.policy = policy
        self.teacher = teacher
        self.config = config
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            policy.trainable().values(),
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            weight_decay=optim.weight_decay,
        )
        self.steps_taken = 0

    @property
    def learning_rate(self) -> float:
        """Of the next step: linear warm-up, then constant."""
        warmup = self.config.optim.warmup_steps
        return self.config.optim.learning_rate * min(1.0, (self.steps_taken + 1) / max(1, warmup))

    def learn(self, samples: Sequence[Sample], seed: int) -> Learned:
        """Go over a batch `inner_epochs` times in `minibatches` steps; no samples, no step."""
        learned = Learned()
        entropies: list[Tensor] = []
        order = random.Random(seed)
        for epoch in range(self.config.optim.inner_epochs):
            for minibatch in split(samples, self.config.optim.minibatches, order):
                outputs = self._accumulate(minibatch)
                if not outputs:
                    continue
                self._step(learned, outputs)
                entropies += [output.entropy for _, output in outputs]
                if epoch == 0:
                    for batch, output in outputs:
                        _record(learned, batch, output)
        done = max(1, learned.steps + learned.skipped_steps)
        learned.loss /= done
        learned.grad_norm /= max(1, learned.steps)
        if entropies and (tokens := torch.cat(entropies)).numel():
            learned.entropy = float(tokens.mean())
        return learned

    def _accumulate(self, samples: Sequence[Sample]) -> list[tuple[PackedBatch, LossOutput]]:
        """Gradients of one step; [] if no token has weight."""
        loss_config = self.config.loss
        distill = token_weights(
            samples, [s.distill_weight for s in samples], loss_config.loss_aggregation,
            loss_config.skip_first_token,
        )  # fmt: skip
        policy = token_weights(
            samples, [s.policy_weight for s in samples], loss_config.loss_aggregation
        )
        scale = loss_config.policy_weight if self.config.mode == "hero+grpo" else 1.0
        kept = [
            i
            for i, sample in enumerate(samples)
            if bool(distill[i].any()) or (sample.advantage != 0 and bool(policy[i].any()))
        ]
        outputs = []
        chosen = [samples[i] for i in kept]
        packing = self.config.teacher.packing
        for indices in micro_batches(chosen, self.config.optim.micro_batch_tokens, packing):
            batch = pack(
                [chosen[i] for i in indices],
                [distill[kept[i]] for i in indices],
                [policy[kept[i]] * scale for i in indices],
                packing=packing,
                device=self.policy.device,
            )
            with self.policy.recomputing():
                output = compute_loss(
                    self.policy, self.teacher, batch, loss_config, self.config.rollout.temperature
                )
                output.loss.backward()  # type: ignore[no-untyped-call]
            outputs.append((batch, output))
        return outputs

    def _step(self, learned: Learned, outputs: Sequence[tuple[PackedBatch, LossOutput]]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.trainable().values(), self.config.optim.max_grad_norm
        )
        learned.loss += float(sum(output.loss.detach() for _, output in outputs))
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
            self.teacher.update()
            self.steps_taken += 1
            learned.steps += 1
            learned.grad_norm += float(norm)
        else:
            learned.skipped_steps += 1
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any], steps_taken: int) -> None:
        self.optimizer.load_state_dict(state)
        self.steps_taken = steps_taken


def split(samples: Sequence[Sample], minibatches: int, order: random.Random) -> list[list[Sample]]:
    """Shuffle whole trajectories into `minibatches` parts; turns of a trajectory stay together, in
    order."""
    if minibatches == 1:
        return [list(samples)]
    episodes: dict[int, list[Sample]] = {}
    for sample in samples:
        episodes.setdefault(sample.trajectory, []).append(sample)
    shuffled = list(episodes.values())
    order.shuffle(shuffled)
    parts: list[list[Sample]] = [[] for _ in range(minibatches)]
    for i, episode in enumerate(shuffled):
        parts[i % minibatches] += episode
    return parts


def _record(learned: Learned, batch: PackedBatch, output: LossOutput) -> None:
    distilled = [sample for sample in batch.samples if sample.distill_weight]
    lengths = [len(sample.action_ids) for sample in distilled]
    for values, target in (
        (output.divergence, learned.divergence),
        (output.logprob_gap, learned.logprob_gap),
    ):
        for sample, part in zip(distilled, values.cpu().split(lengths), strict=True):
            target[sample.trajectory, sample.turn] = part.tolist()
