"""Batched sampling: ids in, ids and log-probabilities out.

`Sampler` is what the pipeline asks for, whatever engine serves it; `HFSampler` is a transformers
model with its key-value cache, on CPU and GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from hero.policy import Policy


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


class Sampler(Protocol):
    """A sampling engine."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """One completion for each prompt, in order."""
        ...


class HFSampler:
    """Samples from the policy's present weights.

    Sampler and trainer are one engine, so log-probabilities agree up to rounding. Prompts are
    decoded in batches of `batch_size`, longest first, so that the rows of a batch have similar
    lengths. Rows are padded on the left, and a row that has stopped is dropped.
    """

    def __init__(self, policy: Policy, batch_size: int = 64) -> None:
        self.policy = policy
        self.batch_size = batch_size

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """One completion for each prompt, in order."""
        if any(not prompt for prompt in prompts):
            raise ValueError("A prompt is empty: the sampler needs at least one token.")
        random = torch.Generator(self.policy.device).manual_seed(sampling.seed)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        completions = [Completion(ids=[], logprobs=[]) for _ in prompts]
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            self._decode(
                [prompts[i] for i in rows], [completions[i] for i in rows], sampling, random
            )
        return completions

    def _decode(
        self,
        prompts: list[list[int]],
        completions: list[Completion],
        sampling: Sampling,
        random: torch.Generator,
    ) -> None:
        """Fill in the completions of one batch."""
        policy = self.policy
        stop = torch.tensor(policy.renderer.stop_ids, device=policy.device)
        input_ids, mask = _left_pad(prompts, policy.renderer.end_id, policy.device)
        active = completions
        cache = DynamicCache(config=policy.model.config)
        for step in range(sampling.max_tokens):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
            output = policy.trunk(
                input_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = policy.logits(output.last_hidden_state[:, -1].to(policy.dtype))
            tokens, logprobs = draw_tokens(logits, sampling, random)
            for row, token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
                row.ids.append(token)
                row.logprobs.append(logprob)
            keep = (~torch.isin(tokens, stop)).nonzero().squeeze(1)
            if keep.numel() == 0 or step + 1 == sampling.max_tokens:
                break
            if keep.numel() < len(active):
                active = [active[k] for k in keep.tolist()]
                cache.batch_select_indices(keep)
                tokens, mask = tokens[keep], mask[keep]
            input_ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)


def draw_tokens(
    logits: Tensor, sampling: Sampling, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one token a row from logits [B, V]; returns tokens [B] and their log-probabilities [B].

    The log-probability is that of the whole distribution at the sampling temperature (greedy: at
    1), so it is what the trainer recomputes; nucleus truncation changes the draw only.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    logprobs = (logits / sampling.temperature).log_softmax(-1)
    probabilities = logprobs.exp()
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered[before >= sampling.top_p] = 0  # the token that passes top_p stays in
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
    tokens = torch.multinomial(probabilities, 1, generator=random)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def _left_pad(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask
