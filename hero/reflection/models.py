"""Models that can be asked to reflect: the student itself, or its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from hero.config import ReflectionConfig
from hero.renderer import Renderer
from hero.sampling import Sampler, Sampling


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


class OwnModel:
    """The model that is trained: all requests of a batch in one call of the sampler.

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

    def answer(self, requests: Sequence[str], seed: int) -> list[Answer]:
        prompts = [self.renderer.start([{"role": "user", "content": r}]) for r in requests]
        sampling = Sampling(
            max_tokens=self.config.max_tokens, seed=seed, temperature=self.config.temperature
        )
        with self.weights():
            completions = self.sampler.generate(prompts, sampling)
        return [
            Answer(text=self.renderer.decode(c.ids), num_tokens=len(c.ids)) for c in completions
        ]
