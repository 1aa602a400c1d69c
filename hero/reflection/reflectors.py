"""Who diagnoses a finished episode: a model that reads it whole, or the environment's rules."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from hero.config import ReflectionConfig
from hero.generation.base import Generator, Sampling
from hero.prompts import Prompts, TurnView
from hero.reflection.base import Reflections, collect
from hero.reflection.filters import HintFilter
from hero.reflection.parse import parse_diagnoses
from hero.renderer import Renderer
from hero.types import Diagnosis, Message, Trajectory

POLICY_TOKENS = 400
"""The environment's system prompt is shortened to this in a reflection prompt."""


@dataclass(kw_only=True, slots=True)
class Answer:
    """What a model wrote to one request."""

    text: str
    num_tokens: int


class PromptedReflector(ABC):
    """One request an episode to a language model; subclasses say which.

    Args:
        config: temperature, lengths, retries and filters.
        prompts: the wording of the request.
        renderer: tokens of the student, by which lengths and leaks are measured.
        source: `Diagnosis.source`.
        policy: the environment's system prompt.
        max_prompt_tokens: longest request in the student's tokens, chat template included; actions
            and observations are shortened further until it fits. None for no limit.
    """

    def __init__(
        self,
        config: ReflectionConfig,
        prompts: Prompts,
        renderer: Renderer,
        *,
        source: str,
        policy: str,
        max_prompt_tokens: int | None,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.renderer = renderer
        self.source = source
        self.policy = renderer.clip(policy, POLICY_TOKENS)
        self.max_prompt_tokens = max_prompt_tokens
        # Greedy decoding would write the same text again.
        self.retries = config.retries if config.temperature > 0 else 0

    @abstractmethod
    def _answer(self, requests: Sequence[str], seed: int) -> list[Answer]:
        """One answer a request, in order; another seed gives other answers."""

    def reflect(self, trajectories: Sequence[Trajectory], seed: int) -> Reflections:
        """Diagnose every turn of every trajectory.

        Raises:
            ValueError: an episode cannot be fitted into `max_prompt_tokens`.
        """
        started = time.perf_counter()
        texts = [""] * len(trajectories)
        found: list[list[Diagnosis]] = [[] for _ in trajectories]
        retried = generated_tokens = 0
        unread = {i: self._request(t) for i, t in enumerate(trajectories) if t.turns}
        for attempt in range(1 + self.retries):
            if not unread:
                break
            retried += len(unread) if attempt else 0
            answers = self._answer(list(unread.values()), seed + attempt)
            for i, answer in zip(unread, answers, strict=True):
                texts[i] = answer.text
                generated_tokens += answer.num_tokens
                found[i], _ = parse_diagnoses(answer.text, len(trajectories[i].turns))
            unread = {i: request for i, request in unread.items() if not found[i]}
        return collect(
            trajectories,
            found,
            source=self.source,
            hint_filter=make_filter(self.renderer, self.config),
            texts=texts,
            retried=retried,
            generated_tokens=generated_tokens,
            started=started,
        )

    def _request(self, trajectory: Trajectory) -> str:
        """The request for one episode, short enough for `max_prompt_tokens`."""
        limit = self.config.max_observation_tokens
        while True:
            request = self.prompts.reflection(
                trajectory.instruction,
                self.policy,
                [
                    TurnView(
                        action=self.renderer.clip(turn.action_text, limit),
                        observation=self.renderer.clip(turn.observation or "", limit),
                        feedback_kind=turn.feedback_kind,
                        parse_ok=turn.parse_ok,
                    )
                    for turn in trajectory.turns
                ],
                trajectory.reward,
                trajectory.stop_reason,
            )
            if self.max_prompt_tokens is None:
                return request
            num_tokens = len(self.renderer.start(_as_chat(request)))
            if num_tokens <= self.max_prompt_tokens:
                return request
            if limit == 0:
                raise ValueError(
                    f"The reflection prompt of {trajectory.id} ({len(trajectory.turns)} turns) has "
                    f"{num_tokens} tokens even without its actions and observations; at most "
                    f"{self.max_prompt_tokens} fit. Use a model with a longer context, or lower "
                    "--rollout.max-turns."
                )
            limit //= 2


class ModelReflector(PromptedReflector):
    """The student itself, or its teacher: all episodes of a batch in one call of the generator.

    Args:
        source: "self" or "teacher".
        weights: makes a context in which `generator` samples from the reflector's weights; the
            default leaves them as they are.
    """

    def __init__(
        self,
        generator: Generator,
        renderer: Renderer,
        prompts: Prompts,
        config: ReflectionConfig,
        *,
        source: Literal["self", "teacher"],
        policy: str,
        weights: Callable[[], AbstractContextManager[object]] = nullcontext,
        max_prompt_tokens: int | None = None,
    ) -> None:
        super().__init__(
            config,
            prompts,
            renderer,
            source=source,
            policy=policy,
            max_prompt_tokens=max_prompt_tokens,
        )
        self.generator = generator
        self.weights = weights

    def _answer(self, requests: Sequence[str], seed: int) -> list[Answer]:
        prompts = [self.renderer.start(_as_chat(request)) for request in requests]
        sampling = Sampling(
            max_tokens=self.config.max_tokens, seed=seed, temperature=self.config.temperature
        )
        with self.weights():
            completions = self.generator.generate(prompts, sampling)
        return [
            Answer(text=self.renderer.decode(c.ids), num_tokens=len(c.ids)) for c in completions
        ]


class RuleReflector:
    """The environment's own diagnosis: deterministic, and for models too small to reflect."""

    def __init__(
        self,
        diagnose: Callable[[Trajectory], list[Diagnosis]],
        renderer: Renderer,
        config: ReflectionConfig,
    ) -> None:
        self.diagnose = diagnose
        self.hint_filter = make_filter(renderer, config)

    def reflect(self, trajectories: Sequence[Trajectory], seed: int) -> Reflections:
        """Diagnose every turn of every trajectory; `seed` changes nothing.

        Raises:
            ValueError: the environment diagnosed a turn that does not exist.
        """
        started = time.perf_counter()
        found = [self.diagnose(trajectory) for trajectory in trajectories]
        for trajectory, diagnoses in zip(trajectories, found, strict=True):
            num_turns = len(trajectory.turns)
            if wrong := [d.turn for d in diagnoses if not 0 <= d.turn < num_turns]:
                raise ValueError(
                    f"diagnose() of the environment returned turns {wrong} for "
                    f"{trajectory.id}; expected 0-based turns below {num_turns}."
                )
        return collect(
            trajectories,
            found,
            source="rules",
            hint_filter=self.hint_filter,
            texts=[""] * len(trajectories),
            retried=0,
            generated_tokens=0,
            started=started,
        )


def make_filter(renderer: Renderer, config: ReflectionConfig) -> HintFilter:
    """The filters that `config` asks for, by the student's tokens."""
    return HintFilter(
        encode=renderer.encode,
        decode=renderer.decode,
        max_hint_tokens=config.max_hint_tokens,
        leak_filter=config.leak_filter,
    )


def _as_chat(request: str) -> list[Message]:
    return [{"role": "user", "content": request}]
