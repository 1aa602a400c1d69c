"""Batched sampling from the policy's own weights, with key-value caches that are kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from hero.attention import Read
from hero.kvcache import RowCache
from hero.packing import in_groups
from hero.policy import Policy
from hero.ranks import Ranks
from hero.sampling import Batches, Completion, Sampling, Stream, Wanted, complete_all

READ_TOKENS = 8192
"""Tokens of one forward pass, unless one prompt has more: bounds its activations."""
READ_TOKENS_CPU = 1024
"""The same on a CPU: activations of small models stay in its cache."""

MIN_SHARED = 32
"""Tokens that many prompts begin with, from which on they are read by themselves."""


class HFSampler:
    """Samples from the policy's present weights.

    Sampler and trainer are one engine, so log-probabilities agree up to rounding. At most
    `batch_size` prompts are decoded together; one that has ended makes room for the next. `ranks`
    share the prompts of a call; a stream is this process' own.
    """

    def __init__(self, policy: Policy, batch_size: int = 64, ranks: Ranks | None = None) -> None:
        self.policy = policy
        self.batch_size = batch_size
        self.ranks = ranks or Ranks()

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """One completion for each prompt, in order; of prompt i by the seed's stream i."""
        if any(not prompt for prompt in prompts):
            raise ValueError("A prompt is empty: the sampler needs at least one token.")
        if not prompts:
            return []
        longest = max(map(len, prompts)) + sampling.max_tokens

        def complete(own: Sequence[int]) -> list[Completion]:
            stream = self.stream(min(self.batch_size, len(own)), sampling, longest)
            return complete_all(stream, self.batch_size, prompts, own, sampling.seed)

        return self.ranks.shared(range(len(prompts)), complete)

    @property
    def version(self) -> int:
        return self.policy.version

    @property
    def context(self) -> int:
        return self.policy.context

    def rest(self) -> None:
        """Its weights are the trainer's, and caches end with their stream."""

    def stream(self, rows: int, sampling: Sampling, longest: int) -> Stream:
        """A stream of the present weights: it must end before they change."""
        if self.policy.takes_spans(longest):
            return _Rows(self.policy, rows, sampling)
        return Batches(partial(_complete_padded, self.policy, sampling))


@dataclass(slots=True)
class _Row:
    """One sequence of the cache and the completion under way on it."""

    sampling: Sampling
    held: list[int] = field(default_factory=list)
    """Ids whose keys and values are in the cache."""
    new: list[int] = field(default_factory=list)
    """Ids to read next: the rest of a prompt, or the last token; [] if nothing is under way."""
    completion: Completion = field(default_factory=lambda: Completion(ids=[], logprobs=[]))
    random: random.Random = field(default_factory=random.Random)


class _Rows:
    """Continuous batching: each row reads its prompt and decodes at its own pace.

    What all rows read next is one sequence without padding.

    A row keeps what it has read. The next prompt on it, the same episode's next turn or another
    episode with the same rules, is read from the first id that differs.
    """

    def __init__(self, policy: Policy, rows: int, sampling: Sampling) -> None:
        self.policy, self.sampling = policy, sampling
        self.rows = [_Row(sampling) for _ in range(rows)]
        self.cache = RowCache(rows, policy.dtype)

    def submit(self, row: int, prompt: list[int], seed: int) -> None:
        self._submit(row, prompt, seed, self.sampling)

    def submit_other(self, row: int, wanted: Wanted) -> None:
        self._submit(row, wanted.prompt, wanted.seed, wanted.sampling)

    def _submit(self, row: int, prompt: list[int], seed: int, sampling: Sampling) -> None:
        at = self.rows[row]
        at.sampling = sampling
        shared = _common(at.held, prompt[:-1])  # the last one is read in any case
        at.held, at.new = prompt[:shared], prompt[shared:]
        at.completion, at.random = Completion(ids=[], logprobs=[]), random.Random(seed)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Completion]]:
        """Decode a token of every row that has begun, and read the new prompts."""
        new = [i for i, row in enumerate(self.rows) if row.new]
        fresh = [i for i in new if not self.rows[i].completion.ids]
        self._share([i for i in fresh if not self.rows[i].held])
        order = [i for i in new if self.rows[i].completion.ids] + fresh
        most = READ_TOKENS_CPU if self.policy.device.type == "cpu" else READ_TOKENS
        for part in in_groups([(len(self.rows[i].new),) for i in order], most):
            self._forward([order[k] for k in part])
        return [(i, self.rows[i].completion) for i in order if not self.rows[i].new]

    def _share(self, empty: list[int]) -> None:
        """Read what the prompts of empty rows begin with, such as the rules, once for all."""
        if len(empty) < 2:
            return
        first = self.rows[empty[0]].new
        shared = min(_common(first, self.rows[i].new[:-1]) for i in empty)
        if shared < MIN_SHARED:
            return
        inputs = self.cache.aim([Read(empty[0], shared, shared)], self.policy.device)
        self.policy.trunk(torch.tensor([first[:shared]], device=self.policy.device), **inputs)
        self.cache.copy(empty[0], empty[1:], shared)
        for row in (self.rows[i] for i in empty):
            row.held, row.new = row.new[:shared], row.new[shared:]

    def _forward(self, chosen: list[int]) -> None:
        """Read what is new of some rows and sample the next token of each."""
        policy, rows = self.policy, [self.rows[i] for i in chosen]
        reads = [
            Read(i, len(row.held) + len(row.new), len(row.new))
            for i, row in zip(chosen, rows, strict=True)
        ]
        ids = torch.tensor([[token for row in rows for token in row.new]])
        last = torch.tensor([read.tokens for read in reads]).cumsum(0) - 1
        uniform = torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
        inputs = self.cache.aim(reads, policy.device)
        states = policy.trunk(ids.to(policy.device), **inputs)[0, last.to(policy.device)]
        drawn = _draw(policy.logits(states), rows, uniform.to(policy.device))
        for row, (token, logprob) in zip(rows, drawn, strict=True):
            row.held += row.new
            row.completion.ids.append(token)
            row.completion.logprobs.append(logprob)
            ended = token in policy.renderer.stop_ids
            ended |= len(row.completion.ids) == row.sampling.max_tokens
            row.new = [] if ended else [token]


def _draw(logits: Tensor, rows: list[_Row], uniform: Tensor) -> list[tuple[int, float]]:
    """`draw_tokens` by the sampling of each row."""
    drawn = [(0, 0.0)] * len(rows)
    for sampling in {row.sampling for row in rows}:
        some = [i for i, row in enumerate(rows) if row.sampling == sampling]
        part = some if len(some) < len(rows) else slice(None)
        found = draw_tokens(logits[part], sampling, uniform[part])
        for i, token, logprob in zip(some, *(values.tolist() for values in found), strict=True):
            drawn[i] = (token, logprob)
    return drawn


def _common(one: list[int], other: list[int]) -> int:
    """Ids that both begin with."""
    if one == other[: len(one)]:
        return len(one)
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


@torch.inference_mode()
def _complete_padded(
    policy: Policy, sampling: Sampling, prompts: list[list[int]], seeds: list[int]
) -> list[Completion]:
    """For layers that do not see all of a sequence, or an attention that cannot be told what to.

    Their cache is their own affair.

    Prompts are padded on the left, and one that has stopped is dropped.
    """
    completions = [Completion(ids=[], logprobs=[]) for _ in prompts]
    active = list(zip(completions, map(random.Random, seeds), strict=True))
    stop = torch.tensor(policy.renderer.stop_ids, device=policy.device)
    input_ids, mask = _left_pad(prompts, policy.renderer.end_id, policy.device)
    cache = DynamicCache(config=policy.model.config)
    for step in range(sampling.max_tokens):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        states = policy.trunk(
            input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        logits = policy.logits(states[:, -1])
        uniform = torch.tensor([stream.random() for _, stream in active], dtype=torch.float64)
        tokens, logprobs = draw_tokens(logits, sampling, uniform.to(policy.device))
        for (row, _), token, logprob in zip(
            active, tokens.tolist(), logprobs.tolist(), strict=True
        ):
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
    return completions


def draw_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row from logits [B, V]; returns tokens [B] and their log-probabilities [B].

    A row takes the token at which its cumulated probability passes its number in `uniform` [B]
    (float64, 0 <= u < 1). The log-probability is that of the whole distribution at the sampling
    temperature (greedy: at 1), so it is what the trainer recomputes; nucleus truncation changes the
    draw only.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    logprobs = (logits / sampling.temperature).log_softmax(-1)
    probabilities = logprobs.double().exp()
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered[before >= sampling.top_p] = 0  # the token that passes top_p stays in
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
    cumulated = probabilities.cumsum(-1)
    tokens = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
    tokens = tokens.clamp_max(logits.shape[-1] - 1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def _left_pad(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask
