"""What HeroTrainer refuses, notices and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is missing: .ci/extras trl")
from test_trl_hero import RULES, shopper  # noqa: E402

from hero.config import LossConfig, TeacherConfig  # noqa: E402
from hero.integrations.trl import MethodConfig  # noqa: E402
from hero.types import Diagnosis  # noqa: E402


def test_what_hero_has_not_is_refused(tmp_path: Path) -> None:
    method = MethodConfig(prompts="compact", reflection=RULES)
    with pytest.raises(ValueError, match=r"beta=0\.1 changes GRPO's loss"):
        shopper(tmp_path, method, beta=0.1)
    with pytest.raises(ValueError, match="mask_truncated_completions=True"):
        shopper(tmp_path, method, mask_truncated_completions=True)
    with pytest.raises(TypeError, match="must be a MethodConfig, got"):
        shopper(tmp_path, {"mode": "hero"})  # type: ignore[arg-type]
    for of_hero_train, message in (
        (MethodConfig(mode="grpo"), "mode must be 'hero', 'env_only'"),  # type: ignore[arg-type]
        (MethodConfig(loss=LossConfig(beta=2.0)), r"loss\.beta"),
        (MethodConfig(teacher=TeacherConfig(weights="frozen", refresh="gated")), "refresh=gated"),
    ):
        with pytest.raises(ValueError, match=message):
            shopper(tmp_path, of_hero_train)
    trainer = shopper(tmp_path, method)
    trainer.world = None
    with pytest.raises(ValueError, match=r"reflector=rules .* need world="):
        trainer._check()


def test_a_teacher_of_16_bits_follows_its_student(tmp_path: Path) -> None:
    """By steps that bfloat16 cannot say. Oracle: the formula."""
    method = MethodConfig(
        prompts="compact", reflection=RULES, teacher=TeacherConfig(weights="ema", update_rate=1e-3)
    )
    trainer = shopper(tmp_path, method, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    teacher, weight = trainer.teacher, trainer.policy.trainable()[name]
    start = weight.detach().double()
    with torch.no_grad():
        weight.mul_(1.25)
    for _ in range(200):
        teacher.update()
    expected = start + (1 - 0.999**200) * (weight.detach().double() - start)
    torch.testing.assert_close(teacher.state_dict()[name].double(), expected, rtol=1e-3, atol=1e-5)
    with teacher.applied():
        own = trainer.policy.trainable()[name]
        assert own.dtype == torch.bfloat16 and torch.equal(
            own, teacher.state_dict()[name].bfloat16()
        )
    assert teacher.own_head()["teacher_weight"].dtype == torch.bfloat16


def test_another_loss_of_trl_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As older versions take theirs with use_liger_kernel; and rows one by one are said."""
    trainer = shopper(tmp_path, MethodConfig(prompts="compact", reflection=RULES), max_steps=1)
    trainer.model.set_attn_implementation("eager")

    def other(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> torch.Tensor:
        return model.get_output_embeddings().weight.sum()

    monkeypatch.setattr(trl.GRPOTrainer, "compute_loss", other)
    with pytest.raises(ValueError, match=r"trl 1\.16\.0 has trained with a loss of its own"):
        trainer.train()
    assert "Rows are computed one by one, several times as long: attention 'eager'" in caplog.text


def silent(env: Any) -> Any:
    """The example's world, whose rules find no fault."""
    env.diagnose = lambda trajectory: [Diagnosis(turn=k) for k in range(len(trajectory.turns))]
    return env


@pytest.mark.parametrize(("most", "steps"), [(2, 2), (0, 4)])
def test_training_with_nothing_to_learn_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, most: int, steps: int
) -> None:
    method = MethodConfig(
        prompts="compact", reflection=RULES, loss=LossConfig(turns="hinted"), max_idle_updates=most
    )
    more = {"max_steps": 4, "gradient_accumulation_steps": 1, "save_steps": 1}
    trainer = shopper(tmp_path, method, save_strategy="steps", **more)
    trainer.world = silent(trainer.world)
    trainer.train()
    assert trainer.state.global_step == steps
    again = shopper(tmp_path, method, **more)
    again.world = silent(again.world)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == steps  # what was idle before counts
    assert ("in 2 updates in a row nothing was trained" in caplog.text) == (most == 2)
