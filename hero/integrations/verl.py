"""HERO as a plug-in of verl (written for verl 0.9.1; not run on a cluster yet).

    export VERL_USE_EXTERNAL_MODULES=hero.integrations.verl     # verl imports it in every process
    python -m verl.trainer.main_ppo distillation.enabled=True ...  (docs/scaling.md)

Importing it registers the distillation loss `hero` and defines the agent loop manager whose workers
ask the teacher with hindsight, `hero.integrations.verl.HeroManager`.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import ray
    from verl.trainer.distillation.losses import (
        DistillationLossSettings,
        register_distillation_loss,
    )
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
    from verl.workers.utils.padding import no_padding_2_padding
except ImportError as error:
    raise ImportError(
        f"hero.integrations.verl is written for verl 0.9.1, and here {error}: pip install "
        "verl==0.9.1, or train with hero train or HeroTrainer."
    ) from error

from hero.integrations.verl_parts import HindsightTeacher, sampled_reverse_kl


@register_distillation_loss(DistillationLossSettings(names=["hero"], use_estimator=True))
def hero_loss(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Reverse KL from the teacher's and the student's log-probability of each sampled token.

    Returns:
        Losses [B, R] of the response tokens, 0 where nothing was seen in hindsight, and metrics.

    Raises:
        ValueError: a clamp that would cut gradients.
    """
    settings = distillation_config.distillation_loss
    if settings.loss_max_clamp is not None and not settings.use_policy_gradient:
        raise ValueError(
            f"distillation_loss.loss_max_clamp={settings.loss_max_clamp} cuts the gradient of "
            "loss_mode=hero, which is no bounded divergence: set it to null."
        )
    old = data.get("old_log_probs", None)
    if old is not None and old.is_nested:
        old = old.to_padded_tensor(0.0)
    return sampled_reverse_kl(
        no_padding_2_padding(model_output["log_probs"], data),
        no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1),
        old, policy_gradient=settings.use_policy_gradient,
    )  # fmt: skip


@ray.remote
class HeroWorker(HindsightTeacher, AgentLoopWorkerTQ.__ray_metadata__.modified_class):  # type: ignore[misc]
    """verl's worker, whose teacher sees what followed."""


class HeroManager(AgentLoopManagerTQ):  # type: ignore[misc]
    """For `actor_rollout_ref.rollout.agent.agent_loop_manager_class`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.agent_loop_workers_class = HeroWorker
