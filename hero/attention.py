"""Attention over packed sequences: many rows in one, and branches that see a part of a trunk.

A *span* is a run of tokens that see an earlier run, the *prefix*, and themselves causally. Each is
one call of torch's scaled dot-product attention on the keys that it sees, so nothing is computed
for padding or between rows, and memory grows with tokens x (longest prefix), never with their
square: on CUDA torch runs its flash kernels, with the causal mask aligned at the lower right.

A *read* is a run of tokens whose earlier ones are in a cache (kvcache.py). Rows of the cache that
read one token each, as they do while they decode, share a call.

Both travel as the attention mask, an integer tensor in place of a boolean one: that is what every
family of transformers hands to its layers as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hero_spans"
"""Of this implementation, for transformers."""
MASK_ROWS, COLUMNS = 256, 256
"""Of the mask that is kept on a CPU: most rows, and what columns come in multiples of."""
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some families add to attention, and spans do not have."""


class Span(NamedTuple):
    """Tokens start:end see prefix_start:prefix_end and themselves, causally."""

    prefix_start: int
    prefix_end: int
    start: int
    end: int

    @property
    def sees(self) -> int:
        """Tokens that its last one sees."""
        return self.prefix_end - self.prefix_start + self.end - self.start


class Read(NamedTuple):
    """The next tokens of a pass: the last ones of what a row of a cache holds."""

    row: int
    sees: int
    """Tokens of the row, these included."""
    tokens: int


def as_mask(runs: Sequence[Span] | Sequence[Read]) -> Tensor:
    """What a model takes as its `attention_mask`: [1, 1, runs, 4 or 3], on the CPU."""
    return torch.tensor(runs, dtype=torch.int64)[None, None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scale: float
) -> Tensor:
    """Attention [1, heads, T, D] of spans that follow each other and cover all T tokens.

    Args:
        query: [1, heads, T, D].
        key: [1, heads or a divisor of them, T, D].
        value: like `key`.
        spans: in order; a prefix lies before its span.
        scale: of the products of queries and keys.
    """
    lengths = [span.end - span.start for span in spans]
    widest, pieces = max(span.sees for span in spans), []
    # Splits, not slices: the gradient of a slice is a tensor as large as the whole.
    own = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    for (first, last, _, _), (q, k, v) in zip(spans, own, strict=True):
        if last > first:
            k = torch.cat([key[:, :, first:last], k], dim=2)
            v = torch.cat([value[:, :, first:last], v], dim=2)
        pieces += _causal(q, k, v, widest, scale)
    return torch.cat(pieces, dim=2)


def attend_cached(
    query: Tensor, key: Tensor, value: Tensor, reads: Sequence[Read], scale: float
) -> Tensor:
    """Attention [1, heads, T, D] of reads that follow each other and cover all T tokens.

    Args:
        query: [1, heads, T, D].
        key: [rows, heads or a divisor of them, columns, D], those of the T tokens included.
        value: like `key`.
        reads: in order.
        scale: of the products of queries and keys.
    """
    widest = max(read.sees for read in reads)
    decoding, first, pieces = _decoding(tuple(reads), query.device, query.dtype), 0, []
    if decoding is not None:
        first, rows, width = len(decoding.places), decoding.rows, decoding.mask.shape[-1]
        # Heads that share keys, as tokens of one head: on CUDA no kernel knows them beside a mask.
        of_rows = query[0].transpose(0, 1)[decoding.tokens].unflatten(1, (key.shape[1], -1))
        found = scaled_dot_product_attention(
            of_rows, key[rows, :, :width], value[rows, :, :width], attn_mask=decoding.mask,
            scale=scale,
        )  # fmt: skip
        pieces.append(found.flatten(1, 2)[decoding.places].transpose(0, 1)[None])
    for row, sees, tokens in reads[first:]:
        k, v = key[row, None, :, :sees], value[row, None, :, :sees]
        pieces += _causal(query[:, :, first : first + tokens], k, v, widest, scale)
        first += tokens
    return torch.cat(pieces, dim=2)


class _Decoding(NamedTuple):
    """The reads of one token with which a pass begins, as one call on B rows of a cache."""

    rows: slice | Tensor
    """A slice is not copied, so a few rows that are idle go along."""
    tokens: Tensor
    """[B] the token that each row reads; the first one, if it is idle."""
    places: Tensor
    """[tokens] where among the B the row of each is."""
    mask: Tensor
    """[B, 1, 1, columns] added to the scores."""


@lru_cache(maxsize=1)
def _decoding(
    reads: tuple[Read, ...], device: torch.device, dtype: torch.dtype
) -> _Decoding | None:
    """The same for all layers of a pass; None if it begins otherwise."""
    ones = list(itertools.takewhile(lambda read: read.tokens == 1, reads))
    if not ones:
        return None
    numbers, seen = (torch.tensor(of_read) for of_read in list(zip(*ones, strict=True))[:2])
    low, high = int(numbers.min()), int(numbers.max()) + 1
    dense = high - low <= 2 * len(ones)
    places = numbers - low if dense else torch.arange(len(ones))
    tokens = torch.zeros(high - low if dense else len(ones), dtype=torch.long)
    tokens[places] = torch.arange(len(ones))
    beyond = torch.arange(int(seen.max())) >= seen[tokens, None, None, None]
    mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)
    rows = slice(low, high) if dense else numbers.to(device)
    return _Decoding(rows, tokens.to(device), places.to(device), mask.to(device))


def _causal(q: Tensor, k: Tensor, v: Tensor, widest: int, scale: float) -> list[Tensor]:
    """Attention of the last tokens of those that there are keys of, at most `widest`, in parts."""
    tokens, sees, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if groups > 1 and q.device.type != "cpu" and q.dtype == torch.float32:
        # Only flash kernels know heads that share keys, and they want 16 bits.
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    options: dict[str, Any] = {"scale": scale, "enable_gqa": groups > 1}
    if tokens == 1 or tokens == sees:
        return [scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, **options)]
    if q.device.type != "cpu":
        bias = causal_lower_right(tokens, sees)
        return [scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)]
    # There torch makes a mask for each call. All are parts of one that is kept.
    width, found = -(-widest // COLUMNS) * COLUMNS, []
    for part in q.split(MASK_ROWS, dim=2):
        height, sees_part = part.shape[2], sees - tokens + part.shape[2]
        tokens -= height
        whole = _triangle(min(MASK_ROWS, -(-height // 32) * 32), width, q.dtype)
        mask = whole[:height, width + height - sees_part : width + height]
        k_part, v_part = k[:, :, :sees_part], v[:, :, :sees_part]
        found.append(scaled_dot_product_attention(part, k_part, v_part, attn_mask=mask, **options))
    return found


@lru_cache(maxsize=4)
def _triangle(height: int, width: int, dtype: torch.dtype) -> Tensor:
    """[height, width + height] zeros up to `width` after the diagonal, -inf beyond it.

    The mask of the last n <= height of m <= width tokens is a part of it.
    """
    with torch.inference_mode(False):  # it may come to be used where there are gradients
        beyond = torch.ones(height, width + height, dtype=torch.bool).triu(width + 1)
        return torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`attend` where the mask holds spans or reads, else transformers' own attention ("sdpa")."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    for name in UNKNOWN:
        if options.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} wants {name!r} in its attention, which spans do not have."
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(kind := query.device.type):
        # Rotations leave float32, and torch looks at types before autocast where it has a mask.
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return _attend(query, key, value, attention_mask, scale), None


@torch.compiler.disable  # how many runs there are stands in their numbers
def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    numbers = mask[0, 0].tolist()
    if mask.shape[-1] == len(Read._fields):
        out = attend_cached(query, key, value, [Read(*of_run) for of_run in numbers], scale)
    else:
        out = attend(query, key, value, [Span(*of_run) for of_run in numbers], scale)
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: PreTrainedModel) -> None:
    """Let a model that was loaded with "sdpa" take spans too; it is the same for all else."""
    model.set_attn_implementation(NAME)
