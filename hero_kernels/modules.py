"""nn.Module twins of the functions: settings once, tensors each call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from hero_kernels import checks
from hero_kernels.functional import fused_linear_divergence
from hero_kernels.logprobs import linear_logprobs
from hero_kernels.objective import DivergenceOutput, KernelOptions, ObjectiveKwargs


class _Settings(nn.Module):
    """Keyword arguments of a function, fixed; the module has no parameters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.settings.items() if v is not None)


class FusedLinearDivergence(_Settings):
    """`fused_linear_divergence` with its settings fixed; arguments mean what they mean there."""

    def __init__(
        self,
        *,
        reduction: str = "mean",
        loss_aggregation: str = "token",
        vocab_size: int | None = None,
        return_stats: bool = False,
        impl: str = "auto",
        options: KernelOptions | None = None,
        **objective: Unpack[ObjectiveKwargs],
    ) -> None:
        checks.objective("FusedLinearDivergence", objective)
        super().__init__(
            reduction=reduction,
            loss_aggregation=loss_aggregation,
            vocab_size=vocab_size,
            return_stats=return_stats,
            impl=impl,
            options=options,
            **objective,
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        **tensors: Any,
    ) -> Tensor | DivergenceOutput:
        """The tensors of one call; weights, ids, biases, `num_items` by their names there."""
        if repeated := sorted(tensors.keys() & self.settings.keys()):
            raise TypeError(
                f"{', '.join(repeated)}: fixed when the module was made, not by the call."
            )
        return fused_linear_divergence(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            **tensors,
            **self.settings,
        )


class LinearLogprobs(_Settings):
    """`linear_logprobs` with its settings fixed; the arguments mean what they mean there."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        vocab_size: int | None = None,
        return_entropy: bool = False,
        impl: str = "auto",
        options: KernelOptions | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            vocab_size=vocab_size,
            return_entropy=return_entropy,
            impl=impl,
            options=options,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        bias: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return linear_logprobs(
            hidden, weight, target_ids, bias=bias, token_mask=token_mask, **self.settings
        )
