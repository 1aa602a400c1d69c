"""Attention over packed sequences: many rows in one, and branches that see a part of a trunk.

A *span* is a run of tokens that see an earlier run, the *prefix*, and themselves causally. Each is
one call of torch's scaled dot-product attention on the keys that it sees, so nothing is computed
for padding or between rows, and memory grows with tokens x (longest prefix), never with their
square: on CUDA torch runs its flash kernels, with the causal mask aligned at the lower right.

Spans travel as the attention mask, an integer tensor in place of a boolean one: that is what every
family of transformers hands to its layers as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def as_mask(spans: Sequence[Span]) -> Tensor:
    """What a model takes as its `attention_mask`: [1, 1, spans, 4], on the CPU."""
    return torch.tensor(spans, dtype=torch.int64)[None, None]


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
    pieces = []
    # Splits, not slices: the gradient of a slice is a tensor as large as the whole.
    own = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    for (first, last, _, _), (q, k, v) in zip(spans, own, strict=True):
        if last > first:
            k = torch.cat([key[:, :, first:last], k], dim=2)
            v = torch.cat([value[:, :, first:last], v], dim=2)
        pieces.append(
            scaled_dot_product_attention(
                q, k, v,
                attn_mask=causal_lower_right(q.shape[2], k.shape[2]) if last > first else None,
                is_causal=last == first and q.shape[2] > 1,
                scale=scale, enable_gqa=q.shape[1] != k.shape[1],
            )
        )  # fmt: skip
    return torch.cat(pieces, dim=2)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`attend` where the mask holds spans, else transformers' own attention ("sdpa")."""
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
    return _attend(query, key, value, attention_mask, scale), None


@torch.compiler.disable  # how many spans there are stands in their numbers
def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    spans = [Span(*numbers) for numbers in mask[0, 0].tolist()]
    return attend(query, key, value, spans, scale).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: PreTrainedModel) -> None:
    """Let a model that was loaded with "sdpa" take spans too; it is the same for all else."""
    model.set_attn_implementation(NAME)
