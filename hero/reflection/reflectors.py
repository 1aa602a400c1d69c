"""Who diagnoses a finished episode: a model that reads it whole, or the environment's rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from hero.config import ReflectionConfig
from hero.envs.border import EnvironmentFault, stop_if_failed
from hero.prompts import Prompts
from hero.reflection.base import Reflections, collect
from hero.reflection.filters import HintFilter
from hero.reflection.models import ChatModel
from hero.reflection.parse import parse_diagnoses, says_faultless
from hero.renderer import Renderer
from hero.sampling import Wanted
from hero.types import Diagnosis, Trajectory

RULES_TOKENS = 400
"""The environment's system prompt is shortened to this in a reflection prompt."""


class ModelReflector:
    """One request for each episode to a language model.

    Args:
        model: which one.
        config: temperature, lengths, retries and filters.
        prompts: the wording of the request.
        renderer: tokens of the student, by which lengths and leaks are measured.
        rules: the environment's system prompt.
        shared: words of the actions of every task, for the leak filter.
        max_prompt_tokens: longest request in the student's tokens, chat template included; actions
            and observations are shortened further until it fits. None for no limit.
    """

    def __init__(
        self,
        model: ChatModel,
        config: ReflectionConfig,
        prompts: Prompts,
        renderer: Renderer,
        *,
        rules: str,
        shared: str = "",
        max_prompt_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.prompts = prompts
        self.renderer = renderer
        self.hint_filter = HintFilter(renderer, config, f"{rules}\n{shared}")
        self.rules = renderer.clip(rules, RULES_TOKENS)
        self.max_prompt_tokens = max_prompt_tokens
        # Greedy decoding would write the same text again.
        self.retries = config.retries if config.temperature > 0 else 0

    def reflect(self, trajectories: Sequence[Trajectory], seed: int) -> Reflections:
        """Diagnose the trajectories; a turn of which nothing was written has no hint.

        Raises:
            ValueError: an episode cannot be fitted into `max_prompt_tokens`.
        """
        started = time.perf_counter()
        found: list[list[Diagnosis]] = [[] for _ in trajectories]
        retried = generated_tokens = 0
        unread = {i: self._request(t) for i, t in enumerate(trajectories) if self._asks(t)}
        asked = len(unread)
        for attempt in range(1 + self.retries):
            if not unread:
                break
            retried += len(unread) if attempt else 0
            answers = self.model.answer(list(unread.values()), seed + attempt)
            for i, answer in zip(list(unread), answers, strict=True):
                generated_tokens += answer.num_tokens
                found[i] = parse_diagnoses(answer.text, len(trajectories[i].turns))
                if found[i] or says_faultless(answer.text):
                    del unread[i]
        return collect(
            trajectories,
            found,
            source=self.config.reflector,
            hint_filter=self.hint_filter,
            started=started,
            asked=asked,
            read=asked - len(unread),
            retried=retried,
            generated_tokens=generated_tokens,
        )

    def early(self, trajectory: Trajectory, seed: int) -> Wanted | None:
        """Begin with an episode that is over while others go on; `reflect` gets the same seed."""
        return self.model.early(self._request(trajectory), seed) if self._asks(trajectory) else None

    def _asks(self, trajectory: Trajectory) -> bool:
        """Whether there is something to read, and `reflection.episodes` wants it read."""
        if not trajectory.turns or trajectory.failed:
            return False
        return self.config.episodes == "all" or not _is_perfect(trajectory)

    def _request(self, trajectory: Trajectory) -> str:
        """The request for one episode, short enough for `max_prompt_tokens`."""
        limit = self.config.max_observation_tokens
        while True:
            clip = partial(self.renderer.clip, max_tokens=limit)
            request = self.prompts.reflection(trajectory, self.rules, clip)
            if self.max_prompt_tokens is None:
                return request
            num_tokens = len(self.renderer.start([{"role": "user", "content": request}]))
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


def _is_perfect(trajectory: Trajectory) -> bool:
    """Succeeded, with the full reward of 1 and without a turn that the environment refused."""
    refused = any(turn.is_error or not turn.parse_ok for turn in trajectory.turns)
    return trajectory.success and trajectory.reward >= 1 and not refused


class RuleReflector:
    """The environment's own diagnosis: deterministic, and for models too small to reflect."""

    def __init__(
        self,
        diagnose: Callable[[Trajectory], list[Diagnosis]],
        renderer: Renderer,
        config: ReflectionConfig,
        shared: str = "",
    ) -> None:
        self.diagnose = diagnose
        self.hint_filter = HintFilter(renderer, config, shared)

    def reflect(self, trajectories: Sequence[Trajectory], seed: int) -> Reflections:
        """Diagnose every turn of every trajectory; `seed` changes nothing.

        A trajectory whose diagnosis fails is marked as failed.

        Raises:
            EnvironmentFault: there is no other.
        """
        started = time.perf_counter()
        found: list[list[Diagnosis]] = [[] for _ in trajectories]
        for i, trajectory in enumerate(trajectories):
            if not trajectory.failed:
                try:
                    found[i] = self.diagnose(trajectory)
                except EnvironmentFault as fault:
                    trajectory.fail(fault)
        stop_if_failed(trajectories)
        return collect(
            trajectories, found, source="rules", hint_filter=self.hint_filter, started=started
        )
