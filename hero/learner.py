"""From annotated samples to optimiser steps: packing, loss, accumulation, clipping, EMA."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hero.config import TeacherConfig, TrainConfig
from hero.drift import Drift
from hero.loss import LossOutput, compute_loss, weigh
from hero.packing import PackedBatch, micro_batches, pack, plan_rows
from hero.policy import Policy
from hero.shards import like, whole
from hero.teacher import Scorer, TeacherWeights
from hero.types import Sample
from hero.weights import make_optimizer

AVERAGED = 10
"""Updates over which `eval.select=averaged` averages."""

Place = tuple[int, int]
"""(trajectory, turn), as indices into the batch."""


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
    terms: dict[str, float] = field(default_factory=dict)
    """Each term of the loss, weight included; means over steps."""
    entropy: float = 0.0
    """Mean over the tokens looked at, nats."""
    trained: dict[Place, tuple[str, ...]] = field(default_factory=dict)
    """The terms of the loss that trained each turn; turns that none trained are left out."""
    divergence: dict[Place, list[float]] = field(default_factory=dict)
    """Per-token divergence of each distilled turn, in nats, of the first pass."""
    logprob_gap: dict[Place, list[float]] = field(default_factory=dict)
    """log T(y) - log S(y), likewise."""
    drift: Drift | None = None
    """Between sampler and trainer, over the tokens that the first step trained."""


class Learner:
    """AdamW with warm-up; a step for each minibatch, one denominator for its micro-batches.

    Several processes share the trajectories of each minibatch. All of them are given all samples,
    so each knows the denominators; gradients are summed.
    """

    def __init__(self, policy: Policy, teacher: TeacherWeights, config: TrainConfig) -> None:
        self.policy = policy
        self.ranks = policy.shards.ranks
        self.teacher = teacher
        self.config = config
        self.optimizer = make_optimizer(policy.to_train(), config.optim)
        self.start: TeacherWeights | None = None
        """The weights at the start, if the loss needs them; the teacher's, if they stay there."""
        if config.loss.kl_to_start:
            stays = teacher.policy is policy and teacher.kind == "frozen"
            stays &= config.teacher.refresh == "never"
            frozen = TeacherConfig(weights="frozen", offload=config.teacher.offload)
            self.start = teacher if stays else TeacherWeights(policy, frozen)
        self.average: TeacherWeights | None = None
        """Of the student's weights after each update, if `eval.select` asks for it."""
        if config.eval.select == "averaged":
            averaged = TeacherConfig(weights="ema", offload=config.teacher.offload)
            self.average = TeacherWeights(policy, averaged)
        self.averaged = 0
        """Updates in it."""
        self.steps_taken = 0
        self.halvings = 0
        """Of the learning rate, each after a collapse."""

    @property
    def learning_rate(self) -> float:
        """Of the next step: linear warm-up, then constant."""
        warmup = self.config.optim.warmup_steps
        rate = self.config.optim.learning_rate / 2**self.halvings
        return rate * min(1.0, (self.steps_taken + 1) / max(1, warmup))

    def learn(self, samples: Sequence[Sample], seed: int) -> Learned:
        """Go over a batch `inner_epochs` times in `minibatches` steps; no samples, no step.

        Raises:
            DriftError: sampler and trainer differ by more than `engine.max_drift`: no step then.
        """
        learned = Learned()
        entropies: list[Tensor] = []
        order = random.Random(seed)
        for epoch in range(self.config.optim.inner_epochs):
            for minibatch in split(samples, self.config.optim.minibatches, order):
                done = self._accumulate(minibatch)
                if done is None:
                    continue
                if not learned.steps + learned.skipped_steps:  # by the weights that sampled
                    learned.drift = self._drift([output for _, output in done])
                stepped = self._step(learned)
                for batch, output in done:
                    entropies.append(output.entropy)
                    _record(learned, batch, output, stepped, first_pass=epoch == 0)
        if learned.steps:
            self.take_into_average()
        seen = torch.cat(entropies) if entropies else torch.zeros(0)
        parts = self.ranks.all_gather(lambda: (learned, float(seen.sum()), len(seen)))
        learned = _joined([part for part, _, _ in parts])
        learned.entropy = sum(total for _, total, _ in parts) / max(1, sum(n for _, _, n in parts))
        tried = max(1, learned.steps + learned.skipped_steps)
        learned.loss /= tried
        learned.terms = {name: total / tried for name, total in learned.terms.items()}
        learned.grad_norm /= max(1, learned.steps)
        return learned

    def take_into_average(self) -> None:
        """The student's present weights: a plain mean, later one of about `AVERAGED` updates."""
        if self.average is not None:
            self.averaged += 1
            self.average.rate = 1 / min(self.averaged, AVERAGED)
            self.average.update()

    def _accumulate(self, samples: Sequence[Sample]) -> list[tuple[PackedBatch, LossOutput]] | None:
        """Gradients of one step, of this process' share; None if no token at all has weight."""
        plans = plan_rows(weigh(samples, self.config.loss))
        if not plans:
            return None
        device, most = self.policy.device, self.config.optim.micro_batch_tokens
        sizes = [3 * student + teacher for student, teacher in (plan.tokens for plan in plans)]
        own = [plans[i] for i in self.ranks.share(sizes)]
        batches = [pack(rows, device) for rows in micro_batches(own, most)]
        teachers: Sequence[Scorer] = [self.teacher for _ in batches]
        starts: Sequence[Scorer | None] = [None for _ in batches]
        if any(plan.teacher for plan in plans):
            teachers = self.teacher.scored([batch.teacher for batch in batches])
        if self.start is not None:
            starts = self.start.scored([batch.student for batch in batches])

        def pass_over() -> list[LossOutput]:
            return [
                self._pass(*of_batch) for of_batch in zip(batches, teachers, starts, strict=True)
            ]

        return list(zip(batches, self.ranks.apart(pass_over), strict=True))

    def _pass(self, batch: PackedBatch, teacher: Scorer, start: Scorer | None) -> LossOutput:
        with self.policy.learning():
            output = compute_loss(
                self.policy, teacher, batch, self.config.loss, self.config.rollout.temperature,
                start,
            )  # fmt: skip
            output.loss.backward()  # type: ignore[no-untyped-call]
        output.loss = output.loss.detach()
        return output

    def _drift(self, outputs: Sequence[LossOutput]) -> Drift | None:
        """Of the tokens of all ranks."""
        seen = torch.cat([output.drift for output in outputs]) if outputs else torch.zeros(0)
        drift = Drift.joined(self.ranks.all_gather(lambda: Drift.of(seen)))
        if drift is not None:
            engine = self.config.engine
            self.ranks.apart(partial(drift.demand, engine.max_drift, engine.kind))
        return drift

    def _step(self, learned: Learned) -> bool:
        """Take an optimiser step unless the gradient is not finite; returns whether it was."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.policy.shards.reduce()
        with self.policy.shards.resharded():
            norm = float(whole(torch.nn.utils.clip_grad_norm_(
                self.policy.trainable().values(), self.config.optim.max_grad_norm
            )))  # fmt: skip
            finite = math.isfinite(norm)
            if finite:
                self.optimizer.step()
                self.policy.version += 1
                self.teacher.update()
                self.steps_taken += 1
                learned.steps += 1
                learned.grad_norm += norm
            else:
                learned.skipped_steps += 1
            self.optimizer.zero_grad(set_to_none=True)
        return finite

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the student's weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "averaged": self.averaged,
        }

    def restart(self, best: Path) -> None:
        """Go back to saved weights, without momentum and with half the learning rate."""
        self.policy.restore(best)
        self.teacher.restart()
        self.optimizer.state.clear()
        self.halvings += 1
        self.averaged = 0

    def select(self, best: Path) -> None:
        """Put the weights that `eval.select` asks for into the policy; `best` holds the best."""
        if self.config.eval.select == "best":
            self.policy.restore(best)
        elif self.average and self.averaged:
            self.policy.take_over(self.average.state_dict(), best.parent)

    def load_state_dict(self, state: dict[str, Any], steps_taken: int) -> None:
        """Take over a `state_dict`.

        An average that it does not hold begins anew.
        """
        parameters = self.policy.to_train()
        of_parameters = {
            number: {name: like(value, parameters[number]) for name, value in moments.items()}
            for number, moments in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": of_parameters})
        for parameter, moments in self.optimizer.state.items():
            for name in moments.keys() & {"exp_avg", "exp_avg_sq", "state1", "state2"}:
                if moments[name].shape != parameter.shape:
                    raise ValueError(
                        f"the optimiser's {name} is {list(moments[name].shape)} for a parameter "
                        f"{list(parameter.shape)}"
                    )
        if self.average and state["average"]:
            self.average.load_state_dict(state["average"])
        self.averaged = state["averaged"]
        self.steps_taken = steps_taken


def _joined(parts: Sequence[Learned]) -> Learned:
    """What several processes did of the same steps."""
    learned = parts[0]
    for part in parts[1:]:
        learned.loss += part.loss
        for name, total in part.terms.items():
            learned.terms[name] = learned.terms.get(name, 0.0) + total
        learned.trained |= part.trained
        learned.divergence |= part.divergence
        learned.logprob_gap |= part.logprob_gap
    return learned


def split(samples: Sequence[Sample], minibatches: int, order: random.Random) -> list[list[Sample]]:
    """Shuffle whole trajectories into `minibatches` parts; their turns stay in order."""
    if minibatches == 1:
        return [list(samples)]
    trajectories: dict[int, list[Sample]] = {}
    for sample in samples:
        trajectories.setdefault(sample.trajectory, []).append(sample)
    shuffled = list(trajectories.values())
    order.shuffle(shuffled)
    parts: list[list[Sample]] = [[] for _ in range(minibatches)]
    for i, turns in enumerate(shuffled):
        parts[i % minibatches] += turns
    return parts


def _record(
    learned: Learned, batch: PackedBatch, output: LossOutput, stepped: bool, first_pass: bool
) -> None:
    """Write down what a micro-batch did: its loss, and by turns."""
    learned.loss += float(output.loss)
    for name, value in output.terms.items():
        learned.terms[name] = learned.terms.get(name, 0.0) + float(value)
    divergence, gap = output.divergence.tolist(), output.logprob_gap.tolist()
    for item in batch.samples:
        place = (item.sample.trajectory, item.sample.turn)
        if stepped:
            learned.trained[place] = item.losses
        if item.sample.distill_weight and first_pass:
            length = len(item.sample.action_ids)
            learned.divergence[place], divergence = divergence[:length], divergence[length:]
            learned.logprob_gap[place], gap = gap[:length], gap[length:]
