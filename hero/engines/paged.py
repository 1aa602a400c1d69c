"""Sampling by transformers' continuous batching, with attention over pages of keys and values.

The engine has a copy of the model in the compute type, as its attention and its cache are not those
of training; the weights that are trained are copied into it whenever they have changed.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from hero.config import TrainConfig
from hero.engines.base import WAIT
from hero.policy import Policy
from hero.sampling import Completion, Sampling, Stream, complete_all
from hero.types import Fault

PAGE = 64
"""Tokens of a page."""
READ_TOKENS = 4096
"""Most tokens of one forward pass."""


class PagedError(Fault):
    """transformers' continuous batching has given up."""


class PagedEngine:
    """Continuous batching of transformers; what it samples depends on what runs beside it."""

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy, self.rows = policy, config.rollout.batch_size
        self.model: Any = copy.deepcopy(policy.model).to(policy.dtype)  # type: ignore[arg-type]
        self.model.requires_grad_(False)
        self.model.set_attn_implementation("sdpa")
        self.own = dict(self.model.named_parameters())
        self.version = policy.version
        self.context = policy.context
        self.under_way: _Pages | None = None

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        longest = max(map(len, prompts), default=0) + sampling.max_tokens
        stream = self.stream(min(self.rows, len(prompts)), sampling, longest)
        return complete_all(stream, self.rows, prompts, range(len(prompts)), sampling.seed)

    @torch.no_grad()
    def stream(self, rows: int, sampling: Sampling, longest: int) -> Stream:
        self.rest()
        if self.version != self.policy.version:
            for name, parameter in self.policy.trainable().items():
                self.own[name].copy_(parameter)
            self.version = self.policy.version
        stops = list(self.policy.renderer.stop_ids)
        self.under_way = _Pages(self.model, stops, rows, sampling, min(longest, self.context))
        return self.under_way

    def rest(self) -> None:
        """Free the pages."""
        if self.under_way is not None:
            self.under_way.stop()
        self.under_way = None


class _Pages:
    """A stream of one manager of transformers, whose thread computes until it is stopped."""

    def __init__(
        self, model: Any, stops: list[int], rows: int, sampling: Sampling, longest: int
    ) -> None:
        self.sampling, self.numbers, self.under_way = sampling, dict[str, int](), 0
        plain = {"temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
        drawn = plain if sampling.temperature else {}
        how = GenerationConfig(
            max_new_tokens=sampling.max_tokens, eos_token_id=stops, pad_token_id=stops[0],
            do_sample=sampling.temperature > 0, **drawn,
        )  # fmt: skip
        cache = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=rows * (math.ceil(longest / PAGE) + 1),
            max_batch_tokens=READ_TOKENS, max_requests_per_batch=rows, return_logprobs=True,
            seed=sampling.seed % 2**63,
            auto_switch_to_flash=importlib.util.find_spec("flash_attn") is not None,
        )  # fmt: skip
        self.manager = model.init_continuous_batching(how, cache)
        # A thread that a daemon starts is a daemon: it does not hold up a program that has failed.
        starter = threading.Thread(target=self.manager.start, daemon=True)
        starter.start()
        starter.join()

    def submit(self, row: int, prompt: list[int], seed: int) -> None:
        """`seed` has no meaning: transformers draws for all requests from one generator."""
        name = self.manager.add_request(prompt, max_new_tokens=self.sampling.max_tokens)
        if name is None:
            raise PagedError("transformers' continuous batching takes no request any more.")
        self.numbers[name] = row
        self.under_way += 1

    def step(self) -> list[tuple[int, Completion]]:
        found: list[tuple[int, Completion]] = []
        while self.under_way:
            result = self.manager.get_result(timeout=0.0 if found else WAIT)
            if result is None and (found or self.manager.is_running()):
                break
            if result is None or result.error is not None:
                said = "its thread has ended" if result is None else result.error
                raise PagedError(
                    f"transformers' continuous batching failed: {said}. Lower "
                    "--rollout.batch-size, or set --engine.kind hero."
                )
            if not result.is_finished():
                continue
            self.under_way -= 1
            completion = Completion(ids=result.generated_tokens, logprobs=result.logprobs)
            found.append((self.numbers.pop(result.request_id), completion))
        return found

    def stop(self) -> None:
        self.manager.stop(block=True, hard_stop=True)
        self.manager.destroy()
