"""Models that can be asked to reflect: the student itself, or its teacher."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from hero.config import ReflectionConfig
from hero.renderer import Renderer
from hero.sampler import HFSampler
from hero.sampling import Completion, Sampler, Sampling, Wanted


@dataclass(kw_only=True, slots=True)
class Answer:
    """What a model wrote to one request."""

    text: str
    num_tokens: int


class ChatModel(Protocol):
    """A model that answers requests."""

    def answer(self, requests: Sequence[str], seed: int) -> list[Answer]:
        """One answer for each request, in order; another seed gives other answers."""
        ...

    def early(self, request: str, seed: int) -> Wanted | None:
        """Begin to answer what will be asked with this seed, while episodes go on.

        Returns what the engine that plays them has to sample for it, if it does.
        """
        ...


class OwnModel:
    """The model that is trained: all requests that were not answered early in one call.

    Args:
        sampler: samples from its present weights.
        renderer: its tokens.
        config: length and temperature of an answer.
        weights: makes a context in which `sampler` samples from other weights, the teacher's.
    """

    def __init__(
        self,
        sampler: Sampler,
        renderer: Renderer,
        config: ReflectionConfig,
        weights: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.sampler = sampler
        self.renderer = renderer
        self.config = config
        self.weights = weights
        self._early: dict[tuple[str, int], Completion] = {}

    def answer(self, requests: Sequence[str], seed: int) -> list[Answer]:
        early, self._early = self._early, {}
        prompts = [self._prompt(r) for r in requests if (r, seed) not in early]
        with self.weights():
            others = iter(self.sampler.generate(prompts, self._sampling(seed)))
        found = [early.get((request, seed)) or next(others) for request in requests]
        return [Answer(text=self.renderer.decode(c.ids), num_tokens=len(c.ids)) for c in found]

    def early(self, request: str, seed: int) -> Wanted | None:
        """On the rows of the rollout, if it is the student that is asked, and by its own engine."""
        prompt, sampling = self._prompt(request), self._sampling(seed)
        if self.weights is not nullcontext or not isinstance(self.sampler, HFSampler):
            return None
        if not self.sampler.policy.sees_all(len(prompt) + sampling.max_tokens):
            return None

        def done(completion: Completion) -> None:
            self._early[request, seed] = completion

        own = random.Random(f"{seed}/{request}").getrandbits(63)
        return Wanted(prompt=prompt, seed=own, sampling=sampling, done=done)

    def _prompt(self, request: str) -> list[int]:
        return self.renderer.start([{"role": "user", "content": request}])

    def _sampling(self, seed: int) -> Sampling:
        config = self.config
        return Sampling(max_tokens=config.max_tokens, seed=seed, temperature=config.temperature)
