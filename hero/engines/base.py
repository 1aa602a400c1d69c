"""What training asks of an engine, and what engines with weights of their own have in common."""

from __future__ import annotations

import random
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from hero.config import TrainConfig
from hero.drift import Drift
from hero.policy import Policy
from hero.sampling import Completion, Sampler, Sampling, Stream, Streaming, complete_all


class Engine(Sampler, Streaming, Protocol):
    """Samples from the policy's present weights, wherever it keeps its own."""

    @property
    def version(self) -> int:
        """`Policy.version` of the weights it sampled from last."""
        ...

    @property
    def context(self) -> int:
        """Longest sequence it takes, prompt and completion."""
        ...

    def rest(self) -> None:
        """Leave the memory to training; whatever is sampled next wakes it."""
        ...


WAIT = 0.02
"""Seconds that `step` waits for an answer before it lets environments be looked after."""


class HandedWeights(ABC):
    """An engine that reads the policy's weights from a folder whenever they have changed.

    After that its log-probabilities are compared with the trainer's. The folders hold what
    transformers or peft write, and only the newest is kept.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy, self.config = policy, config
        self.version = -1
        parent = config.engine.weights_dir
        if parent:
            Path(parent).mkdir(parents=True, exist_ok=True)
        self._root = tempfile.TemporaryDirectory(prefix="hero-weights-", dir=parent or None)
        self._kept: Path | None = None

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        rows, numbers = self.config.rollout.batch_size, range(len(prompts))
        return complete_all(self.stream(rows, sampling, 0), rows, prompts, numbers, sampling.seed)

    def hand_over(self) -> None:
        """Let the engine have the policy's weights, unless it has them.

        Raises:
            DriftError: it has them, and says something else of what it samples.
        """
        if self.version == self.policy.version:
            return
        folder = Path(self._root.name) / f"version-{self.policy.version}"
        self.policy.save(folder)
        self._read(folder)
        if self._kept is not None and self._kept != folder:
            shutil.rmtree(self._kept, ignore_errors=True)
        self._kept = folder
        self.version = self.policy.version
        rollout, engine = self.config.rollout, self.config.engine
        try:
            check_same_model(self.policy, self, rollout.temperature, engine.max_drift, engine.kind)
        except BaseException:
            self.version = -1
            raise

    @abstractmethod
    def _read(self, folder: Path) -> None:
        """Let the engine read the weights in a folder."""

    @abstractmethod
    def stream(self, rows: int, sampling: Sampling, longest: int) -> Stream:
        """`Streaming.stream`, after `hand_over`."""


@torch.no_grad()
def check_same_model(
    policy: Policy, engine: Sampler, temperature: float, max_drift: float, kind: str
) -> None:
    """Compare what an engine says of 16 tokens it samples with what the policy says of them.

    Where `temperature`, the run's, is not 1, they are sampled at 2: log-probabilities that were not
    divided by it differ most among unlikely tokens.

    Raises:
        DriftError: it samples from other weights, or tells other log-probabilities.
    """
    # A prompt of any words leaves a model in doubt; where it is sure, other models are sure too.
    prompt = random.Random(0).choices(range(len(policy.tokenizer)), k=24)
    temperature = 1.0 if temperature == 1 else 2.0
    sampling = Sampling(max_tokens=16, seed=0, temperature=temperature)
    [done] = engine.generate([prompt], sampling)
    ids = torch.tensor(prompt + done.ids, device=policy.device)
    hidden = policy.hidden(ids[None])[0, len(prompt) - 1 : -1]
    own, _ = policy.logprobs(hidden, ids[len(prompt) :], temperature)
    drift = Drift.of(own.cpu() - torch.tensor(done.logprobs))
    assert drift is not None
    drift.demand(max_drift, kind)
