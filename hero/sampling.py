"""The protocol of sampling: ids in, ids and log-probabilities out, whatever engine serves it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable


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


@dataclass(kw_only=True, frozen=True, slots=True)
class Wanted:
    """A completion that is wanted while episodes go on."""

    prompt: list[int]
    seed: int
    sampling: Sampling
    """Its own seed does not count."""
    done: Callable[[Completion], None]


class Sampler(Protocol):
    """A sampling engine."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """One completion for each prompt, in order."""
        ...


class Stream(Protocol):
    """A sampling engine that takes prompts at any time; each goes under a number below `rows`."""

    def submit(self, row: int, prompt: list[int], seed: int) -> None:
        """Ask for a completion. It depends on prompt, seed and weights, not on what else runs."""
        ...

    def step(self) -> list[tuple[int, Completion]]:
        """Go on a little; returns what has come to its end, by its number."""
        ...


@runtime_checkable
class Mixing(Stream, Protocol):
    """Streams that take prompts with another sampling among theirs."""

    def submit_other(self, row: int, wanted: Wanted) -> None:
        """Ask for a completion by its own sampling; whoever calls `step` passes it on."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """Samplers that have such an engine of their own."""

    def stream(self, rows: int, sampling: Sampling, longest: int) -> Stream:
        """One for so many prompts at once, none longer than `longest` with its completion."""
        ...


def stream_of(sampler: Sampler, rows: int, sampling: Sampling, longest: int) -> Stream:
    """The sampler's own stream, or one that waits for each batch."""
    if isinstance(sampler, Streaming):
        return sampler.stream(rows, sampling, longest)
    return Batches(
        lambda prompts, seeds: sampler.generate(prompts, replace(sampling, seed=seeds[0]))
    )


def complete_all(
    stream: Stream, rows: int, prompts: Sequence[list[int]], own: Sequence[int], seed: int
) -> list[Completion]:
    """Completions of the prompts with the numbers `own`, in their order, up to `rows` at once.

    Prompt i is completed by the seed's stream i, whichever others are.
    """
    order = deque(sorted(own, key=lambda i: -len(prompts[i])))
    owners: dict[int, int] = {}
    found: dict[int, Completion] = {}

    def next_prompt(row: int) -> None:
        if order:
            owners[row] = order.popleft()
            drawn = random.Random(f"{seed}/{owners[row]}").getrandbits(63)
            stream.submit(row, prompts[owners[row]], drawn)

    for row in range(min(rows, len(own))):
        next_prompt(row)
    while len(found) < len(own):
        for row, completion in stream.step():
            found[owners[row]] = completion
            next_prompt(row)
    return [found[i] for i in own]


class Batches:
    """A stream of an engine without one: what was submitted is completed in one call."""

    def __init__(self, complete: Callable[[list[list[int]], list[int]], list[Completion]]) -> None:
        """`complete` gets prompts and seeds."""
        self.complete = complete
        self.waiting: dict[int, tuple[list[int], int]] = {}

    def submit(self, row: int, prompt: list[int], seed: int) -> None:
        self.waiting[row] = (prompt, seed)

    def step(self) -> list[tuple[int, Completion]]:
        waiting, self.waiting = self.waiting, {}
        if not waiting:
            return []
        prompts, seeds = zip(*waiting.values(), strict=True)
        return list(zip(waiting, self.complete(list(prompts), list(seeds)), strict=True))
