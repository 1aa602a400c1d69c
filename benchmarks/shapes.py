"""What is measured: the heads of real models, and the sets of cases."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch


@dataclass(frozen=True)
class Model:
    """The head of a language model."""

    name: str
    hidden: int
    vocab: int


MODELS = {
    model.name: model
    for model in (
        Model("tiny", 32, 512),
        Model("odd", 577, 32769),  # not a multiple of any tile
        Model("smollm2-135m", 576, 49152),
        Model("qwen3-0.6b", 1024, 151936),
        Model("qwen3-4b", 2560, 151936),
        Model("qwen3-8b", 4096, 151936),
        Model("llama3-8b", 4096, 128256),
    )
}
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
SWEEP = (*TOKENS, 65536, 131072)
"""Of one model: whether time is linear, and memory flat, in the number of tokens."""


@dataclass(frozen=True)
class Case:
    """One forward and backward pass of the loss."""

    model: str
    """Key of `MODELS`."""
    tokens: int
    """Rows of the hidden states, masked ones included."""
    dtype: str = "bfloat16"
    divergence: str = "jsd"
    action_share: float = 1.0
    """Share of the tokens that the loss counts; the others are observations of an agent."""
    trainable_head: bool = True

    @property
    def hidden(self) -> int:
        return MODELS[self.model].hidden

    @property
    def vocab(self) -> int:
        return MODELS[self.model].vocab

    @property
    def active_tokens(self) -> int:
        return round(self.tokens * self.action_share)

    @property
    def gradient_bytes(self) -> int:
        """Of dX and, unless the head is frozen, dW."""
        elements = self.tokens * self.hidden + self.vocab * self.hidden * self.trainable_head
        return elements * int(getattr(torch, self.dtype).itemsize)

    @property
    def id(self) -> str:
        """For example `smollm2-135m_2048_bfloat16_jsd_100_trained`."""
        head = "trained" if self.trainable_head else "frozen"
        share = f"{100 * self.action_share:.0f}"
        divergence = self.divergence.replace("_", "-")
        return "_".join((self.model, str(self.tokens), self.dtype, divergence, share, head))


def case_sets() -> dict[str, list[Case]]:
    """The sets that `pytest benchmarks/ --cases NAME` knows."""
    qwen = ("qwen3-0.6b", "qwen3-4b", "qwen3-8b")
    return {
        "dry-run": [Case("tiny", 64, "float32")],
        "dry-run-sweep": [Case("tiny", tokens) for tokens in (64, 128, 256)],
        "cpu": _small(512),
        "cpu-full": [
            *_small(2048),
            Case("smollm2-135m", 2048, divergence="forward_kl"),
            Case("smollm2-135m", 2048, trainable_head=False),
        ],
        "gpu": [
            *(Case(model, 8192) for model in (*qwen, "llama3-8b", "smollm2-135m")),
            *(Case(model, 8192, action_share=0.2) for model in qwen),
            *(Case(model, 8192, divergence="forward_kl") for model in qwen),
            Case("qwen3-4b", 8192, trainable_head=False),
        ],
        "comparison": [
            Case(model, 8192, divergence=divergence)
            for model, divergence in product(qwen, ("jsd", "forward_kl"))
        ],
        "sweep": [Case("qwen3-4b", tokens) for tokens in SWEEP],
        "gpu-full": [
            Case(model, tokens, dtype, divergence, share)
            for model, tokens, dtype, divergence, share in product(
                [name for name in MODELS if name not in ("tiny", "odd")],
                TOKENS,
                ("bfloat16", "float32"),
                ("jsd", "forward_kl", "reverse_kl"),
                (1.0, 0.2),
            )
        ],
    }


def _small(tokens: int) -> list[Case]:
    """Cases that take two CPU cores minutes, not hours; the quickest first."""
    return [
        Case("smollm2-135m", tokens, action_share=0.2),
        Case("smollm2-135m", tokens),
        Case("smollm2-135m", tokens, "float32"),
    ]
