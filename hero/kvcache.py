"""The key-value cache of many sequences that grow apart: row r, column c holds token c of row r.

Rows are as long as they are, with nothing on their left. A forward pass reads some rows, each from
its own column on; what a row held before stays, so a prompt that begins as the last one did is read
from where they part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

COLUMNS = 64
"""Columns come in multiples of this."""


class RowCache(Cache):
    """Keys and values of `rows` sequences; `aim` says where the next forward pass reads."""

    def __init__(self, rows: int) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self._kept: list[tuple[Tensor, Tensor]] = []
        """Of each layer, [rows, heads, columns, head size] each."""
        self._chosen: Tensor | slice = slice(0)
        self._columns = torch.zeros(0)
        self._width = 0

    def aim(
        self, rows: list[int], starts: list[int], lengths: list[int], device: Any
    ) -> dict[str, Any]:
        """Let the next pass read ids [len(rows), max(lengths)], a row's from its `start` on.

        What is beyond a row's length is padding.

        Returns:
            `position_ids`, `attention_mask` and the cache, for the model.
        """
        first = torch.tensor(starts, device=device)[:, None]
        ends = first + torch.tensor(lengths, device=device)[:, None]
        self._columns = first + torch.arange(max(lengths), device=device)
        self._width = max(starts) + max(lengths)
        in_order = rows == list(range(len(rows)))  # a slice is not copied
        self._chosen = slice(len(rows)) if in_order else torch.tensor(rows, device=device)
        self._index = torch.tensor(rows, device=device)[:, None]
        seen = torch.arange(self._width, device=device) <= self._columns[:, :, None]
        return {
            # Padding has the last position: beyond it a learned table may have ended.
            "position_ids": self._columns.minimum((ends - 1).clamp_min(0)),
            "attention_mask": seen[:, None],
            "past_key_values": self, "use_cache": True,
        }  # fmt: skip

    def copy(self, source: int, targets: list[int], columns: int) -> None:
        """What a row holds in its first columns, to others."""
        for kept in self._kept:
            for tensor in kept:
                tensor[targets, :, :columns] = tensor[source, :, :columns].clone()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep [B, heads, num_ids, size] of a layer; returns all that its rows hold so far."""
        new = (key_states, value_states)
        if layer_idx == len(self._kept):
            self._kept.append((_empty(key_states, self.rows), _empty(value_states, self.rows)))
        if self._kept[layer_idx][0].shape[2] < self._width:
            grown = tuple(_grown(tensor, self._width) for tensor in self._kept[layer_idx])
            self._kept[layer_idx] = (grown[0], grown[1])
        for tensor, states in zip(self._kept[layer_idx], new, strict=True):
            tensor[self._index, :, self._columns] = states.transpose(1, 2)
        keys, values = (tensor[self._chosen, :, : self._width] for tensor in self._kept[layer_idx])
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that the next pass sees."""
        return self._width


def _empty(states: Tensor, rows: int) -> Tensor:
    return states.new_zeros(rows, states.shape[1], 0, states.shape[3])


def _grown(tensor: Tensor, width: int) -> Tensor:
    """With room for `width` columns and half as many more: zeros, as masked NaN would spread."""
    columns = -(-width * 3 // 2 // COLUMNS) * COLUMNS
    return torch.nn.functional.pad(tensor, (0, 0, 0, columns - tensor.shape[2]))
