"""From token and turn weights to the coefficient of each row, and from rows back to the result.

Sums over turns and trajectories are taken in fp64, and in the same order from run to run.
"""

from __future__ import annotations

import numbers
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from hero_kernels import checks
from hero_kernels import constants as c
from hero_kernels.objective import DivergenceOutput, choice

MOST_TURNS = 10_000_000
AGGREGATIONS = ("token", "turn", "trajectory")
"""What the mean is over: all tokens; token means in turns; these, then turn means in trajectories.
"""
REDUCTIONS = ("mean", "sum", "none")


class Weighting(NamedTuple):
    """How much each of N rows counts; a row whose turn or trajectory id is negative, nothing."""

    token_weights: Tensor | None = None  # [N]
    turn_ids: Tensor | None = None  # [N]
    turn_weights: Tensor | None = None  # [K]
    trajectory_ids: Tensor | None = None  # [N]
    loss_aggregation: str = "token"
    reduction: str = "mean"
    num_items: float | Tensor | None = None

    def check(self, reference_name: str, reference: Tensor, validate: bool) -> None:
        """Raise ValueError for tensors in the callers' shapes that do not fit `reference` [..., H],
        or settings that exclude each other."""
        if self.loss_aggregation not in AGGREGATIONS:
            choice("loss_aggregation", self.loss_aggregation, AGGREGATIONS)
        if self.reduction not in REDUCTIONS:
            choice("reduction", self.reduction, REDUCTIONS)
        named = zip(self._fields[:4], self[:4], strict=True)
        for name, tensor in named:
            if tensor is not None and name == "turn_weights":
                self._check_turn_weights(tensor)
            elif tensor is not None:
                checks.per_token(name, tensor, reference_name, reference, name.endswith("_ids"))
        if self.loss_aggregation == "turn" and self.turn_ids is None:
            raise ValueError("loss_aggregation='turn' needs turn_ids: the turn of each token.")
        if self.loss_aggregation == "trajectory" and self.trajectory_ids is None:
            raise ValueError(
                "loss_aggregation='trajectory' needs trajectory_ids: the trajectory of each token."
            )
        readable = checks.values_readable(reference, validate)
        if self.num_items is not None:
            self._check_num_items(readable)
        if readable and not (self.token_weights is None and self.turn_ids is None):
            self._check_values()

    def check_cuts(self, validate: bool) -> None:
        """A part of a batch cannot tell whether it cuts a turn: warn, with `validate` refuse."""
        if self.num_items is None or self.loss_aggregation == "token":
            return
        said = (
            f"num_items with loss_aggregation={str(self.loss_aggregation)!r} is wrong for turns "
            "and trajectories that a micro-batch cuts: pass parts of the whole batch's "
            "token_coefficients as token_weights with reduction='sum'. "
        )
        if validate:
            whole = "If every part holds whole ones, leave options.validate False."
            raise ValueError(said + whole)
        if not torch.compiler.is_compiling():
            warnings.warn(said + "Right only if every part holds whole ones.", stacklevel=4)

    def _check_turn_weights(self, value: Tensor) -> None:
        checks.is_tensor("turn_weights", value, "[K]")
        if self.turn_ids is None:
            raise ValueError("turn_weights needs turn_ids: the turn that each token belongs to.")
        if value.dim() != 1:
            raise ValueError(f"turn_weights is {list(value.shape)}; expected [K], one per turn.")
        checks.same_device("turn_weights", value, "turn_ids", self.turn_ids)
        checks.real("turn_weights", value)
        checks.no_grad_wanted("turn_weights", value, "turn_weights")

    def _check_num_items(self, readable: bool) -> None:
        value = self.num_items
        if self.reduction != "mean":
            raise ValueError(
                f"num_items is the divisor of a mean; got reduction={str(self.reduction)!r}: leave "
                "num_items None and divide yourself, or use reduction='mean'."
            )
        if not isinstance(value, Tensor | numbers.Real) or isinstance(value, bool):
            raise TypeError(
                "num_items must be a number or a tensor of one element, how many tokens, turns or "
                f"trajectories the mean is over; got {value!r} ({type(value).__name__})."
            )
        if isinstance(value, Tensor):
            checks.is_tensor("num_items", value, "of one element")
            checks.real("num_items", value)
            checks.no_grad_wanted("num_items", value, "num_items")
            if value.numel() != 1:
                raise ValueError(
                    f"num_items is {list(value.shape)}; expected a number or a tensor of one "
                    "element, the divisor of the mean: sum it first."
                )
        if isinstance(value, Tensor) and not (readable and value.device.type == "cpu"):
            return
        if not 0 <= float(value) < float("inf"):  # type: ignore[arg-type]
            raise ValueError(
                f"num_items must be a finite number, 0 or more (0 makes the loss 0); got {value}."
            )

    def _check_values(self) -> None:
        checks.finite("token_weights", self.token_weights)
        checks.finite("turn_weights", self.turn_weights)
        aggregation = self.loss_aggregation
        mean = self.reduction == "mean" and self.num_items is None
        for name, weights, group in (
            ("token_weights", self.token_weights, aggregation != "token"),
            ("turn_weights", self.turn_weights, aggregation == "trajectory"),
        ):
            if (mean or group) and weights is not None and bool((weights < 0).any()):
                own = f"loss_aggregation={aggregation!r}" if group else "the mean"
                raise ValueError(
                    f"{name} has negative entries, and {own} divides by the sum of weights, "
                    "which may be near 0. For advantages pass loss_aggregation='token' and "
                    "num_items (the divisor) or reduction='sum'."
                )
        if self.turn_weights is not None and self.turn_ids is not None and self.turn_ids.numel():
            highest, size = int(self.turn_ids.max()), len(self.turn_weights)
            if highest >= size:
                raise ValueError(
                    f"turn_ids must be less than {size}, the number of turn_weights (negative for "
                    f"none); got {highest}."
                )
        if self.loss_aggregation == "trajectory":
            self._check_turns_in_one_trajectory()

    def _check_turns_in_one_trajectory(self) -> None:
        turns, trajectories = self.turn_ids, self.trajectory_ids
        if turns is None or trajectories is None:
            return
        turns, trajectories = turns.reshape(-1).long(), trajectories.reshape(-1).long()
        counts = (turns >= 0) & (trajectories >= 0)
        pairs = torch.stack([turns, trajectories], 1)[counts].unique(dim=0)
        if len(pairs) > len(pairs[:, 0].unique()):
            repeated = pairs[:, 0].mode().values
            raise ValueError(
                f"turn_ids has {int(repeated)} in more than one trajectory: number the turns "
                "through the whole batch, not anew in each trajectory."
            )

    def flat(self) -> Weighting:
        """With tensors in [N], ids in int64."""
        tokens, turns, of_turns, trajectories = self[:4]
        return self._replace(
            token_weights=None if tokens is None else tokens.detach().reshape(-1),
            turn_ids=None if turns is None else turns.detach().reshape(-1).long(),
            turn_weights=None if of_turns is None else of_turns.detach(),
            trajectory_ids=None
            if trajectories is None
            else trajectories.detach().reshape(-1).long(),
        )

    def coefficients(self, num_rows: int, like: Tensor) -> Tensor:
        """c [N] with loss = sum c_i · ratio_i · divergence_i; of a `flat` weighting.

            token        c_i = w_i·u / (sum of w·u)
            turn         c_i = w_i·u / (sum of w in the turn) / (sum of u over turns with weight)
            trajectory   the turn's c_i / (their sum in the trajectory) / (trajectories with weight)

        with w the token's weight and u that of its turn. `num_items` replaces the last divisor of a
        mean; a sum and `reduction="none"` have none. Divisions by 0 give 0. Without `turn_ids` a
        trajectory is one turn.

        Args:
            num_rows: N.
            like: tensor whose device the result is on; fp64 makes the result fp64, else it is fp32.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        if (
            (self.token_weights is None and self.turn_ids is None and self.trajectory_ids is None)
            and self.reduction == "mean"
            and self.num_items is None
        ):
            return torch.full((num_rows,), 1 / max(num_rows, 1), dtype=wide, device=like.device)
        if self.token_weights is None:
            weights = torch.ones(num_rows, dtype=torch.float64, device=like.device)
        else:
            weights = self.token_weights.to(torch.float64)
        for ids in (self.turn_ids, self.trajectory_ids):
            weights = weights if ids is None else weights * (ids >= 0)
        result = weights
        if self.turn_ids is not None:
            if self.turn_weights is not None:
                turns = self.turn_ids.clamp(min=0)
                result = result * self.turn_weights.to(torch.float64)[turns]
            if self.loss_aggregation != "token":
                result = _divide(result, _group_sum(weights, self.turn_ids))
        if self.loss_aggregation == "trajectory" and self.trajectory_ids is not None:
            result = _divide(result, _group_sum(result, self.trajectory_ids))
        if self.reduction == "mean":
            total = result.sum()
            if isinstance(self.num_items, Tensor):
                total = self.num_items.to(like.device, torch.float64).reshape(())
            elif self.num_items is not None:  # filled on the device: a copy would wait for it
                total = total.new_full((), float(self.num_items), dtype=torch.float64)
            result = _divide(result, total)
        return result.to(wide)

    def turn_means(self, values: Tensor, row_weights: Tensor) -> Tensor:
        """[K] weighted mean of values [N] over the tokens of each turn that count, 0 without any.

        Without `turn_weights` K has to be read from the ids: a synchronisation on CUDA.

        Args:
            values: of a token each.
            row_weights: [N] what `coefficients` returned.
        """
        assert self.turn_ids is not None
        num_turns = 0
        if self.turn_weights is not None:
            num_turns = len(self.turn_weights)
        elif self.turn_ids.numel():
            num_turns = int(self.turn_ids.max()) + 1
            if num_turns > MOST_TURNS:
                raise ValueError(
                    f"turn_ids go up to {num_turns - 1}, and the statistics have an entry for each "
                    f"number up to the largest, at most {MOST_TURNS}: number the turns from 0, or "
                    "leave return_stats False."
                )
        weights = torch.ones_like(values, dtype=torch.float64)
        if self.token_weights is not None:
            weights = self.token_weights.to(torch.float64)
        weights = weights * ((row_weights != 0) & (self.turn_ids >= 0))
        turns = self.turn_ids.clamp(min=0)

        def of_turns(summand: Tensor) -> Tensor:
            empty = summand.new_zeros(max(num_turns, 1))
            return empty.index_put((turns,), summand, accumulate=True)

        means = _divide(of_turns(values.double() * weights), of_turns(weights))
        return means[:num_turns].to(values.dtype)

    def output(
        self,
        loss: Tensor,
        stats: Tensor,
        row_weights: Tensor,
        shape: torch.Size,
        has_targets: bool,
        teacher_known: bool,
    ) -> DivergenceOutput:
        """The columns of `stats` [N, 8] by name, in the leading shape of the hidden states.

        Args:
            loss: in that shape, or [].
            stats: of the row kernels, 0 where `row_weights` are.
            row_weights: [N] what `coefficients` returned.
            shape: leading shape of the hidden states.
            has_targets: whether `target_ids` were given.
            teacher_known: whether the teacher's logits are known.
        """
        columns = stats.detach().unbind(1)
        per_turn = None
        if self.turn_ids is not None:
            per_turn = self.turn_means(columns[c.DIVERGENCE], row_weights)

        def column(index: int, wanted: bool = True) -> Tensor | None:
            return columns[index].reshape(shape) if wanted else None

        return DivergenceOutput(
            loss=loss,
            per_token=loss if self.reduction == "none" else columns[c.DIVERGENCE].reshape(shape),
            per_turn=per_turn,
            student_logprobs=column(c.LOGPROB_S, has_targets),
            teacher_logprobs=column(c.LOGPROB_T, has_targets and teacher_known),
            student_entropy=columns[c.ENTROPY_S].reshape(shape),
            teacher_entropy=column(c.ENTROPY_T, teacher_known),
            top1_agreement=column(c.TOP1, teacher_known),
        )


def token_coefficients(
    token_weights: Tensor,
    *,
    turn_ids: Tensor | None = None,
    turn_weights: Tensor | None = None,
    trajectory_ids: Tensor | None = None,
    loss_aggregation: str = "token",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """What each token is multiplied by in the aggregated loss of a whole batch.

    A loop that splits a batch into micro-batches computes these once for the batch and passes each
    part as `token_weights` with `reduction="sum"`: the parts then add up to the loss of the whole,
    also where a turn or a trajectory is cut.

    Args:
        token_weights: [...] weight of each token, 0 to mask it; bool or floating point.
        turn_ids: [...] turn of each token, negative for none.
        turn_weights: [K] weight of each turn; ids are then less than K.
        trajectory_ids: [...] trajectory of each token, negative for none.
        loss_aggregation: "token", "turn" or "trajectory", as for `fused_linear_divergence`.
        num_items: replaces the divisor of the mean.

    Returns:
        [...] fp32 (fp64 for fp64 weights). They sum to 1, or to 0 if no token has weight.

    Raises:
        ValueError: shapes that do not match, or ids that are missing for the aggregation.
    """
    weighting = Weighting(
        token_weights, turn_ids, turn_weights, trajectory_ids, loss_aggregation, "mean", num_items
    )
    checks.is_tensor("token_weights", token_weights, "[...]")
    weighting.check("token_weights", token_weights[..., None], validate=False)
    coefficients = weighting.flat().coefficients(token_weights.numel(), token_weights)
    return coefficients.reshape(token_weights.shape)


def _group_sum(values: Tensor, ids: Tensor) -> Tensor:
    """[N] the sum of `values` [N] over the rows of the same id, at each row.

    Ids may be any: they are ranked by sorting, which waits for no device, and rows of one id are
    added in the order in which they stand.
    """
    order = ids.argsort(stable=True)
    in_order = ids[order]
    first = torch.ones_like(in_order, dtype=torch.bool)
    first[1:] = in_order[1:] != in_order[:-1]
    group = torch.empty_like(ids).index_put((order,), first.cumsum(0) - 1)
    # By index_put, which sorts on CUDA; index_add would add atomically, in an order that varies.
    return torch.zeros_like(values).index_put((group,), values, accumulate=True)[group]


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator != 0, numerator / denominator, 0.0)
