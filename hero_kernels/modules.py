"""nn.Module twins of the functions: settings once, tensors each call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hero_kernels.functional import fused_linear_divergence
from hero_kernels.logprobs import linear_logprobs
from hero_kernels.options import DivergenceOutput, KernelOptions


class FusedLinearDivergence(nn.Module):
    """`fused_linear_divergence` with its settings fixed; the arguments mean what they mean there.

    The head stays where it is, in the model: the module has no parameters.
    """

    def __init__(
        self,
        divergence: str = "jsd",
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        is_clip: float | None = None,
        pointwise_clip: float | None = None,
        support: str = "full",
        top_k: int | None = None,
        top_k_source: str = "student",
        top_k_tail: bool = True,
        reduction: str = "mean",
        loss_aggregation: str = "token",
        vocab_size: int | None = None,
        return_stats: bool = False,
        impl: str = "auto",
        options: KernelOptions | None = None,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "divergence": divergence,
            "beta": beta,
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "is_clip": is_clip,
            "pointwise_clip": pointwise_clip,
            "support": support,
            "top_k": top_k,
            "top_k_source": top_k_source,
            "top_k_tail": top_k_tail,
            "reduction": reduction,
            "loss_aggregation": loss_aggregation,
            "vocab_size": vocab_size,
            "return_stats": return_stats,
            "impl": impl,
            "options": options,
        }

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        **tensors: Any,
    ) -> Tensor | DivergenceOutput:
        """The tensors of one call; weights, ids, biases, `num_items` by their names there."""
        if repeated := sorted(set(tensors) & set(self.settings)):
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

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value!r}" for name, value in self.settings.items() if value is not None
        )


class LinearLogprobs(nn.Module):
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
        super().__init__()
        self.settings: dict[str, Any] = {
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "vocab_size": vocab_size,
            "return_entropy": return_entropy,
            "impl": impl,
            "options": options,
        }

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

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value!r}" for name, value in self.settings.items() if value is not None
        )
