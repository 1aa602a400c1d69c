"""From token and turn weights to the coefficient of each row, and from rows back to the result.

Sums over turns and trajectories are taken in fp64, and in the same order from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hero_kernels import checks, rows
from hero_kernels.options import DivergenceOutput, LossAggregation, Reduction


class Weighting(NamedTuple):
    """How much each of N rows counts.

    A row whose turn or trajectory id is negative belongs to none and has weight 0.
    """

    token_weights: Tensor | None  # [N]
    turn_ids: Tensor | None  # [N] 0-based
    turn_weights: Tensor | None  # [K]
    trajectory_ids: Tensor | None  # [N] 0-based
    loss_aggregation: LossAggregation
    reduction: Reduction
    num_items: float | Tensor | None

    @classmethod
    def checked(
        cls,
        hidden: Tensor,
        token_weights: Tensor | None,
        turn_ids: Tensor | None,
        turn_weights: Tensor | None,
        trajectory_ids: Tensor | None,
        loss_aggregation: str,
        reduction: str,
        num_items: float | Tensor | None,
        validate: bool,
    ) -> Weighting:
        """Check and flatten the public functions' arguments of these names; `hidden` [..., H]."""
        aggregation = checks.choice("loss_aggregation", loss_aggregation, LossAggregation)
        checks.per_token("token_weights", token_weights, hidden)
        checks.per_token("turn_ids", turn_ids, hidden, integer=True)
        checks.per_token("trajectory_ids", trajectory_ids, hidden, integer=True)
        checks.grouping(turn_ids, turn_weights, trajectory_ids, aggregation)
        if isinstance(num_items, Tensor) and num_items.numel() != 1:
            raise ValueError(
                f"num_items is {list(num_items.shape)}; expected a number or a tensor of one "
                "element, the divisor of the mean: sum it first."
            )
        if checks.values_readable(hidden, validate):
            checks.finite("token_weights", token_weights)
            checks.finite("turn_weights", turn_weights)
            num_rows = hidden.shape[:-1].numel()
            num_turns = num_rows if turn_weights is None else len(turn_weights)
            checks.below("turn_ids", turn_ids, num_turns)
            checks.below("trajectory_ids", trajectory_ids, num_rows)
        return cls(
            _flat(token_weights),
            _flat_ids(turn_ids),
            turn_weights,
            _flat_ids(trajectory_ids),
            aggregation,
            checks.choice("reduction", reduction, Reduction),
            num_items,
        )

    def coefficients(self, num_rows: int, like: Tensor) -> Tensor:
        """c [N] with loss = sum c_i · ratio_i · divergence_i.

        "token":      c_i = w_i·u_k                            / sum of w_i·u_k
        "turn":       c_i = w_i·u_k / (sum of w in the turn)   / sum of u_k over turns that hold a
        weight
        "trajectory": the turn's c_i / (their sum in the trajectory) / number of trajectories that
        hold one

        with w the token's weight and u the turn's. `num_items` replaces the last divisor of a mean;
        a sum and `reduction="none"` have none. Divisions by 0 give 0. Without `turn_ids` a
        trajectory is one turn.

        Args:
            num_rows: N.
            like: tensor whose device the result is on; fp64 makes the result fp64, else it is fp32.
        """
        weights = self._weights_within_turns(num_rows, like)
        result = weights
        if self.turn_ids is not None:
            turns = self.turn_ids.clamp(min=0)
            if self.turn_weights is not None:
                result = result * self.turn_weights.to(torch.float64)[turns]
            if self.loss_aggregation != LossAggregation.TOKEN:
                num_turns = num_rows if self.turn_weights is None else len(self.turn_weights)
                result = _divide(result, _group_sum(weights, turns, num_turns)[turns])
        if self.loss_aggregation == LossAggregation.TRAJECTORY and self.trajectory_ids is not None:
            trajectories = self.trajectory_ids.clamp(min=0)
            result = result * (self.trajectory_ids >= 0)
            result = _divide(result, _group_sum(result, trajectories, num_rows)[trajectories])
        if self.reduction == Reduction.MEAN:
            total = result.sum()
            if isinstance(self.num_items, Tensor):
                total = self.num_items.to(like.device, torch.float64).reshape(())
            elif self.num_items is not None:  # filled on the device: a copy would wait for it
                total = total.new_full((), float(self.num_items), dtype=torch.float64)
            result = _divide(result, total)
        return result.to(torch.promote_types(like.dtype, torch.float32))

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
            loss: [N] or [].
            stats: of the row kernel, 0 where `row_weights` are.
            row_weights: [N] what `coefficients` returned.
            shape: leading shape of the hidden states.
            has_targets: whether `target_ids` were given.
            teacher_known: whether the teacher's logits are known.
        """

        def column(index: int, wanted: bool = True) -> Tensor | None:
            return stats[:, index].detach().reshape(shape) if wanted else None

        per_turn = None
        if self.turn_ids is not None:
            per_turn = self._turn_means(stats[:, rows.LOSS].detach(), row_weights, self.turn_ids)
        loss = loss.reshape(shape) if self.reduction == Reduction.NONE else loss
        per_token = loss if self.reduction == Reduction.NONE else column(rows.LOSS)
        student_entropy = column(rows.STUDENT_ENTROPY)
        assert per_token is not None and student_entropy is not None
        return DivergenceOutput(
            loss=loss,
            per_token=per_token,
            per_turn=per_turn,
            student_logprobs=column(rows.STUDENT_LOGPROB, has_targets),
            teacher_logprobs=column(rows.TEACHER_LOGPROB, has_targets and teacher_known),
            student_entropy=student_entropy,
            teacher_entropy=column(rows.TEACHER_ENTROPY, teacher_known),
            top1_agreement=column(rows.TOP1, teacher_known),
        )

    def _weights_within_turns(self, num_rows: int, like: Tensor) -> Tensor:
        weights = torch.ones(num_rows, dtype=torch.float64, device=like.device)
        if self.token_weights is not None:
            weights = self.token_weights.to(torch.float64)
        return weights if self.turn_ids is None else weights * (self.turn_ids >= 0)

    def _turn_means(self, values: Tensor, row_weights: Tensor, turn_ids: Tensor) -> Tensor:
        """[K] weighted mean of values [N] over the tokens of each turn that count, 0 without any.

        Without `turn_weights` K has to be read from the ids: a synchronisation on CUDA.
        """
        if self.turn_weights is not None:
            num_turns = len(self.turn_weights)
        else:
            num_turns = int(turn_ids.max()) + 1 if turn_ids.numel() else 0
        turns = turn_ids.clamp(min=0)
        weights = self._weights_within_turns(len(values), values) * (row_weights != 0)
        total = _group_sum(values.double() * weights, turns, max(num_turns, 1))
        means = _divide(total, _group_sum(weights, turns, max(num_turns, 1)))
        return means[:num_turns].to(values.dtype)


def _flat(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().reshape(-1)


def _flat_ids(ids: Tensor | None) -> Tensor | None:
    """In int64: as an index uint8 would be a mask, and torch takes no int16."""
    return None if ids is None else ids.detach().reshape(-1).long()


def _group_sum(values: Tensor, ids: Tensor, num_groups: int) -> Tensor:
    """[num_groups] sums of values [N] by id.

    By `index_put`, which sorts the ids on CUDA; `index_add` would add atomically there, in an order
    that differs from run to run.
    """
    return values.new_zeros(num_groups).index_put((ids,), values, accumulate=True)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    nonzero = denominator != 0
    return torch.where(nonzero, numerator / denominator.where(nonzero, 1.0), 0.0)


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
        token_weights: [N] weight of each token, 0 to mask it; bool or floating point.
        turn_ids: [N] 0-based turn of each token, negative for none.
        turn_weights: [K] weight of each turn.
        trajectory_ids: [N] 0-based trajectory of each token, negative for none.
        loss_aggregation: "token", "turn" or "trajectory", as for `fused_linear_divergence`.
        num_items: replaces the divisor of the mean.

    Returns:
        [N] fp32 (fp64 for fp64 weights). They sum to 1, or to 0 if no token has weight.

    Raises:
        ValueError: shapes that do not match, or ids that are missing for the aggregation.
    """
    rows = token_weights.reshape(-1, 1)
    weighting = Weighting.checked(
        rows, token_weights.reshape(-1), turn_ids, turn_weights, trajectory_ids, loss_aggregation,
        "mean", num_items, validate=False,
    )  # fmt: skip
    return weighting.coefficients(len(rows), token_weights)
