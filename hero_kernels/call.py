"""How a call is carried out, and the one string in which a custom op takes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from hero_kernels.objective import Objective


@dataclass(frozen=True, slots=True)
class Call:
    """How a call is carried out, and what is asked of it beside the loss."""

    impl: str
    """Name of the implementation, not "auto"."""
    tile_rows: int
    """0 for all rows."""
    tile_columns: int
    """0 for whole rows."""
    vocab_size: int
    """Real tokens of the whole vocabulary."""
    max_active_rows: int = 0
    """0 for no bound."""
    need_hidden: bool = False
    need_weight: bool = False
    need_bias: bool = False
    with_stats: bool = False
    per_row: bool = False
    """Whether each row's loss is wanted, and not their sum."""
    group: str = ""
    """Name of the process group over whose ranks the vocabulary is sharded; "" for none."""

    def with_needs(self, needed: tuple[bool, bool, bool]) -> Call:
        """The call of a backward pass: these gradients of hidden states, weight and bias, the sum
        of the losses, no statistics."""
        hidden, weight, bias = needed
        return replace(
            self,
            need_hidden=hidden,
            need_weight=weight,
            need_bias=bias,
            with_stats=False,
            per_row=False,
        )

    @property
    def text(self) -> str:
        """What `decoded_call` reads."""
        numbers = (
            self.tile_rows,
            self.tile_columns,
            self.vocab_size,
            self.max_active_rows,
            *(int(flag) for flag in (self.need_hidden, self.need_weight, self.need_bias)),
            int(self.with_stats),
            int(self.per_row),
        )
        return "|".join([self.impl, *map(str, numbers), self.group])


def encoded(objective: Objective, call_text: str) -> str:
    """A call and what of its objective is no number, as one string; `torch.compile` can trace it.

    The numbers are arguments of their own (`numbers_of`), which torch.compile may carry as symbols.
    """
    return (
        f"{objective.divergence}|{objective.support}|{objective.top_k or 0}|"
        f"{objective.top_k_source}|{int(objective.top_k_tail)}|{call_text}"
    )


def numbers_of(objective: Objective) -> tuple[float, float, float, float, float]:
    """beta, temperature, softcap, logit_scale, is_clip; 0 for None."""
    return (
        objective.beta,
        objective.temperature,
        objective.softcap or 0.0,
        objective.logit_scale,
        objective.is_clip or 0.0,
    )


@lru_cache(maxsize=256)
def decoded_call(text: str) -> Call:
    """The call in what `encoded` returned."""
    impl, *numbers, group = text.split("|", 15)[5:]
    rows, columns, vocab_size, bound, *flags = map(int, numbers)
    hidden, weight, bias, with_stats, per_row = map(bool, flags)
    return Call(
        impl, rows, columns, vocab_size, bound, hidden, weight, bias, with_stats, per_row, group
    )


@lru_cache(maxsize=256)
def decoded_objective(text: str, *numbers: float) -> Objective:
    """The objective in what `encoded` returned, with the numbers of `numbers_of`."""
    divergence, support, top_k, source, tail, _ = text.split("|", 5)
    beta, temperature, softcap, logit_scale, is_clip = numbers
    return Objective(
        divergence,
        beta,
        temperature,
        softcap or None,
        logit_scale,
        is_clip or None,
        support,
        int(top_k) or None,
        source,
        bool(int(tail)),
    )
