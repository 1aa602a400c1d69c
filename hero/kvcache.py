"""The key-value cache of many sequences that grow apart: row r, column c holds token c of row r.

Rows are as long as they are. A forward pass reads the next tokens of some rows, one row after the
other in one sequence without padding. What a row held before stays, so a prompt that begins as the
last one did is read from where they part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hero.attention import Read, as_mask

COLUMNS = 64
"""Columns come in multiples of this."""


class RowCache(Cache):
    """Keys and values of `rows` sequences, kept in `dtype`; `aim` says what the next pass reads."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        self.rows, self.dtype, self.columns = rows, dtype, 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        """Of each layer, [rows, heads, columns, head size] each."""
        self._places = (torch.zeros(0), torch.zeros(0))
        """Row and column [T] of each token of the next pass."""

    def aim(self, reads: Sequence[Read], device: Any) -> dict[str, Any]:
        """Let the next pass read ids [1, T], the tokens of each of `reads` after those before.

        Returns:
            `position_ids`, `attention_mask` and the cache, for the model.
        """
        self._grow(max(read.sees for read in reads))
        at = [c for read in reads for c in range(read.sees - read.tokens, read.sees)]
        positions = torch.tensor(at)
        counts = torch.tensor([read.tokens for read in reads])
        rows = torch.tensor([read.row for read in reads]).repeat_interleave(counts)
        self._places = (rows.to(device), positions.to(device))
        return {
            "position_ids": self._places[1][None], "attention_mask": as_mask(reads),
            "past_key_values": self, "use_cache": True,
        }  # fmt: skip

    def _grow(self, width: int) -> None:
        """Room for `width` columns and half as many more: zeros, as masked NaN would spread."""
        if width <= self.columns:
            return
        wider = -(-width * 3 // 2 // COLUMNS) * COLUMNS
        pad = (0, 0, 0, wider - self.columns)
        for layer, (keys, values) in enumerate(self._kept):
            self._kept[layer] = (
                torch.nn.functional.pad(keys, pad), torch.nn.functional.pad(values, pad)
            )  # fmt: skip
        self.columns = wider

    def copy(self, source: int, targets: list[int], columns: int) -> None:
        """What a row holds in its first columns, to others."""
        for kept in self._kept:
            for tensor in kept:
                tensor[targets, :, :columns] = tensor[source, :, :columns]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep [1, heads, T, size] of a layer; returns all rows, [rows, heads, columns, size]."""
        if layer_idx == len(self._kept):
            self._kept.append((self._empty(key_states), self._empty(value_states)))
        rows, columns = self._places
        for tensor, states in zip(self._kept[layer_idx], (key_states, value_states), strict=True):
            tensor[rows, :, columns] = states[0].transpose(0, 1).to(self.dtype)
        return self._kept[layer_idx]

    def _empty(self, states: Tensor) -> Tensor:
        shape = (self.rows, states.shape[1], self.columns, states.shape[3])
        return states.new_zeros(shape, dtype=self.dtype)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns
