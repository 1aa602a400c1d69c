"""What the pipeline asks of a sampler, whatever engine serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(kw_only=True, frozen=True, slots=True)
class Sampling:
    """How to sample; the same seed, prompts and weights give the same ids."""

    max_tokens: int
    seed: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0


@dataclass(kw_only=True, slots=True)
class Completion:
    """One sampled answer."""

    ids: list[int]
    """With the stop token, unless the answer was cut off by `max_tokens`."""
    logprobs: list[float]
    """log p of each id at the sampling temperature (greedy: at 1), before nucleus truncation."""
    finished: bool
    """False if `max_tokens` cut it off."""


class Generator(Protocol):
    """A sampling engine."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """One completion a prompt, in order."""
        ...
