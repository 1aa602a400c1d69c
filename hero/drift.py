"""Sampler and trainer compute the same probabilities by different programs: how far are they apart?

The importance ratio of the loss (`loss.is_clip`) corrects small differences. Large ones mean that
the sampler holds other weights, another model or another temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hero.types import Fault

CAUSES = {
    "hero": "rounding: set --model.dtype float32",
    "transformers": "rounding: set --model.dtype float32, or take --engine.kind hero",
    "vllm": "a model that vLLM computes otherwise, or whose new weights it did not take: set "
    "--engine.kind transformers",
    "server": "other weights behind the server (another run hands over to it), another model, or "
    "log-probabilities of another kind: start vllm serve with the run's model, and with "
    "--logprobs-mode processed_logprobs where --rollout.temperature is not 1",
}
"""What it may be, by `engine.kind`."""


class DriftError(Fault):
    """Sampler and trainer are too far apart to learn from what was sampled."""


@dataclass(kw_only=True, frozen=True)
class Drift:
    """Of the log-probabilities of sampled tokens, in nats, trainer against sampler."""

    mean: float
    """Of the absolute differences."""
    max: float
    kl: float
    """Estimate of KL(sampler, trainer): mean of exp(d) - 1 - d, d = log trainer - log sampler
    (Schulman's k3)."""
    tokens: int

    @classmethod
    def of(cls, differences: Tensor) -> Drift | None:
        """From log trainer - log sampler [N], NaN where nobody sampled; None if nobody did."""
        found = differences.double()
        found = found[~found.isnan()]
        if not len(found):
            return None
        return cls(
            mean=float(found.abs().mean()), max=float(found.abs().max()),
            kl=float((found.expm1() - found).mean()), tokens=len(found),
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Sequence[Drift | None]) -> Drift | None:
        """Of all tokens, from those of parts of them."""
        found = [part for part in parts if part is not None]
        tokens = sum(part.tokens for part in found)
        if not tokens:
            return None
        return cls(
            mean=sum(part.mean * part.tokens for part in found) / tokens,
            max=max(part.max for part in found),
            kl=sum(part.kl * part.tokens for part in found) / tokens, tokens=tokens,
        )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        return {"drift/mean": self.mean, "drift/max": self.max, "drift/kl": self.kl}

    def demand(self, most: float, kind: str) -> None:
        """Refuse a mean above `most`.

        Raises:
            DriftError: with the causes there can be for this kind of engine.
        """
        if self.mean <= most:
            return
        raise DriftError(
            f"The log-probabilities of sampler and trainer differ by {self.mean:.3g} nats on "
            f"average over {self.tokens} tokens, {self.max:.3g} at most; --engine.max-drift allows "
            f"{most:g}. Nothing was learnt from them. With --engine.kind {kind} the cause can be "
            f"{CAUSES[kind]}. A model of experts in bfloat16 may need a higher --engine.max-drift."
        )
