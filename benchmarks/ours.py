"""The ways in which this package computes the loss that are measured and checked.

What a build or a machine lacks is refused by the package itself, with a reason; nothing here has to
know what there is. All options of the package that benchmarks set are named in this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hero_kernels import KernelOptions, explain, fused_linear_divergence

if TYPE_CHECKING:
    from benchmarks.problem import Problem

SPLIT_COLUMNS = 8192
"""Columns of the vocabulary held at once by a variant that splits it."""


@dataclass(frozen=True)
class Variant:
    """What is fixed; "auto" leaves it to the package."""

    impl: str = "auto"
    splits: bool = False
    """Hold some columns of the vocabulary at once, not whole rows."""
    own_head: bool = False
    """Pass the teacher's head too, as for a teacher that is another model."""

    def options(
        self,
        vocab: int,
        *,
        tile_rows: int | None = None,
        tile_columns: int | None = None,
        max_active_rows: int | None = None,
    ) -> KernelOptions:
        """For a head of `vocab` rows; a variant that splits takes the columns, others the rows."""
        if self.splits:
            columns = min(tile_columns or SPLIT_COLUMNS, vocab)
            return KernelOptions(tile_columns=columns, max_active_rows=max_active_rows)
        return KernelOptions(tile_rows=tile_rows, max_active_rows=max_active_rows)

    def plan(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: str,
        options: KernelOptions,
        *,
        shared_head: bool = True,
        trainable_head: bool = True,
    ) -> str:
        """Implementation and tile of a call with these options, in the words of `explain`.

        Args:
            shape: rows that count, hidden size, vocabulary.
            dtype: of hidden states and head.
            device: "cpu" or "cuda".
            options: of the call.
            shared_head: whether the teacher has the student's head.
            trainable_head: whether the student's head requires grad.

        Raises:
            ValueError: this variant cannot serve; the message says why.
        """
        text = explain(
            *shape,
            device=device,
            dtype=dtype,
            shared_head=shared_head,
            trainable_head=trainable_head,
            impl=self.impl,
            options=options,
        )
        said = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        words = (said[key].split(" (")[0] for key in ("implementation", "tile") if key in said)
        return ", ".join(words)

    def loss(self, problem: Problem, beta: float, options: KernelOptions) -> Tensor:
        """The mean divergence of a problem."""
        loss = fused_linear_divergence(
            problem.student_hidden,
            problem.weight,
            problem.teacher_hidden,
            problem.teacher_weight if self.own_head else None,
            divergence=problem.divergence,
            beta=beta,
            token_weights=problem.active,
            impl=self.impl,
            options=options,
        )
        assert isinstance(loss, Tensor)
        return loss


VARIANTS = {
    "hero": Variant(),
    "hero-own-head": Variant(own_head=True),
    "hero-triton": Variant("triton"),
    "hero-cuda": Variant("cuda"),
    "hero-split": Variant(splits=True),
}
"""Contestants of the benchmarks."""
ALWAYS = ("hero", "hero-own-head")
"""Those that serve every case on every machine."""
ON_REQUEST = tuple(name for name in VARIANTS if name not in ALWAYS)
"""Ways that "hero" could have taken, to compare them; entered by --contestants only."""

SUBJECTS = {
    "triton": Variant("triton"),
    "triton-split": Variant("triton", splits=True),
    "cuda": Variant("cuda"),
    "cpu": Variant("cpu"),
    "torch": Variant("torch"),
    "torch-split": Variant("torch", splits=True),
}
"""What first_look.py and gpu_check.py look at."""
SUBJECTS_OF = {
    "cuda": ("triton", "triton-split", "cuda"),
    "cpu": ("cpu", "torch", "torch-split"),
}
"""Those that are looked at if none is named, by device."""
