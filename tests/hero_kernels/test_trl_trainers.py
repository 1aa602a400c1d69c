"""TRL's trainers with our divergence. Oracle: the same trainers of the installed trl, untouched."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl_helpers import QUIET, gkd_trainer, installed, tiny_llama, tiny_tokenizer

from hero_kernels.integrations.trl_trainers import ParityError, fused

pytestmark = pytest.mark.slow
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def trl() -> Any:
    return installed("trl", "1.16.0", "trl")


def prompts() -> Any:
    from datasets import Dataset

    texts = [[{"role": "user", "content": f"w{i} w{i + 5}"}] for i in range(8)]
    return Dataset.from_dict({"prompt": texts, "privileged_context": [f"w{i}" for i in range(8)]})


def distillation(kind: Any, folder: Path, **options: Any) -> Any:
    from trl import DistillationConfig

    settings = {
        **QUIET, "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.3,
        "gradient_accumulation_steps": 2, "max_completion_length": 6, "beta": 0.5, **options,
    }  # fmt: skip
    return kind(
        model=tiny_llama(0), teacher_model=tiny_llama(1),
        args=DistillationConfig(output_dir=str(folder), **settings),
        processing_class=tiny_tokenizer(), train_dataset=prompts(),
    )  # fmt: skip


def saved_llama(folder: Path) -> Any:
    """In a folder, from which TRL loads the teacher."""
    model = tiny_llama(0)
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


def sdft(kind: Any, folder: Path, **options: Any) -> Any:
    from trl.experimental.sdft import SDFTConfig

    settings = {
        **QUIET, "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.3,
        "gradient_accumulation_steps": 2, "max_completion_length": 6, "num_generations": 2,
        "teacher_model_kind": "live", **options,
    }  # fmt: skip
    return kind(
        model=saved_llama(folder), args=SDFTConfig(output_dir=str(folder), **settings),
        processing_class=tiny_tokenizer(), train_dataset=prompts(),
    )  # fmt: skip


def sdpo(kind: Any, folder: Path, **options: Any) -> Any:
    from trl.experimental.sdpo import SDPOConfig

    settings = {
        **QUIET, "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.3,
        "gradient_accumulation_steps": 2, "max_completion_length": 6, "num_generations": 2,
        "include_environment_feedback": True, "teacher_model_kind": "live", **options,
    }  # fmt: skip

    def length(completion_ids: Any, **_: Any) -> list[float]:
        return [float(len(ids) > 3) for ids in completion_ids]

    return kind(
        model=saved_llama(folder), reward_funcs=length,
        args=SDPOConfig(output_dir=str(folder), **settings), processing_class=tiny_tokenizer(),
        train_dataset=prompts(),
    )  # fmt: skip


def classes() -> dict[str, tuple[Any, Callable[..., Any]]]:
    from trl import DistillationTrainer
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.sdft import SDFTTrainer
    from trl.experimental.sdpo import SDPOTrainer

    return {
        "gkd": (GKDTrainer, gkd_trainer),
        "distillation": (DistillationTrainer, distillation),
        "sdft": (SDFTTrainer, sdft),
        "sdpo": (SDPOTrainer, sdpo),
    }


def trained(trainer: Any) -> tuple[Weights, list[float], dict[str, Any]]:
    """Weights after training, losses of the micro-batches, and the last log."""
    random.seed(5)
    torch.manual_seed(5)
    losses: list[float] = []
    step = trainer.training_step

    def recorded(*arguments: Any, **named: Any) -> torch.Tensor:
        losses.append(float(step(*arguments, **named)))
        return torch.tensor(losses[-1])

    trainer.training_step = recorded
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return weights, losses, trainer.state.log_history[0]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("gkd", {}),
    ("gkd", {"beta": 0.0}),
    ("gkd", {"beta": 1.0, "lmbda": 1.0}),
    ("distillation", {}),
    ("distillation", {"beta": 0.0, "temperature": 1.5}),
    ("distillation", {"beta": 1.0}),
    ("sdft", {"distillation_mode": "full_logits", "distillation_alpha": 0.5}),
    (
        "sdft",
        {
            "distillation_mode": "topk_logits", "distillation_topk": 5, "teacher_model_kind": "ema",
            "distillation_add_tail": True,
        },
    ),
    ("sdft", {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}),
    ("sdpo", {"distillation_mode": "full_logits", "distillation_alpha": 0.3}),
    ("sdpo", {"distillation_mode": "topk_logits", "distillation_topk": 5, "temperature": 1.4}),
    (
        "sdpo",
        {
            "distillation_mode": "full_logits", "distillation_weight": 0.4, "num_iterations": 2,
            "distillation_is_clip": 1.5,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: str(v))
def test_training_is_that_of_trl(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Two optimiser steps with accumulation by SGD: losses, weights and the entropy or divergence
    that TRL logs."""
    kind, make = classes()[name]
    theirs = make(kind, tmp_path, **options, logging_steps=2)
    ours = make(fused(kind), tmp_path, **options, logging_steps=2)
    before = {n: p.detach().clone() for n, p in theirs.model.named_parameters()}
    weights, losses, log = trained(theirs)
    got_weights, got_losses, got_log = trained(ours)
    assert not ours.parity_check and max(losses) > 1e-3
    torch.testing.assert_close(got_losses, losses, rtol=1e-4, atol=1e-6)
    moved = max(float((weights[n] - before[n]).abs().max()) for n in weights)
    assert moved > 1e-3
    for parameter, expected in weights.items():
        torch.testing.assert_close(got_weights[parameter], expected, rtol=1e-4, atol=1e-5)
    assert log.keys() == got_log.keys()
    for key in ("entropy", "self_distillation/distillation_loss"):
        if key in log:
            assert got_log[key] == pytest.approx(log[key], rel=1e-3)


def test_dropout_is_the_same_in_the_comparison(tmp_path: Path) -> None:
    kind, make = classes()["gkd"]
    trainer = make(fused(kind), tmp_path, disable_dropout=False)
    for layer in trainer.model.model.layers:
        layer.mlp.register_forward_hook(lambda m, i, out: torch.nn.functional.dropout(out, 0.5))
    trainer.train()
    assert not trainer.parity_check


@pytest.mark.parametrize("name", ["gkd", "distillation", "sdft"])
def test_another_objective_stops_with_both_values(name: str, tmp_path: Path) -> None:
    """As if the installed TRL had come to mean something else by its loss."""
    kind, make = classes()[name]
    method = {
        "gkd": "compute_loss", "distillation": "_compute_loss",
        "sdft": "_compute_self_distillation_loss",
    }[name]  # fmt: skip

    def changed(self: Any, *arguments: Any, **named: Any) -> Any:
        result = getattr(kind, method)(self, *arguments, **named)
        return (1.1 * result[0], *result[1:]) if isinstance(result, tuple) else 1.1 * result

    other = type("GKDTrainer" if name == "gkd" else kind.__name__, (kind,), {method: changed})
    other.__module__ = "trl.of_next_year"
    with pytest.raises(ParityError, match=r"is [\d.]+ by hero_kernels and [\d.]+ by"):
        options = {"distillation_mode": "full_logits"} if name == "sdft" else {}
        make(fused(other), tmp_path, **options).train()


def test_what_is_not_served_is_named(tmp_path: Path) -> None:
    from trl import SFTTrainer

    kind, make = classes()["gkd"]
    with pytest.raises(ValueError, match="SFTTrainer is none of TRL's trainers"):
        fused(SFTTrainer)

    class Mine(kind):  # type: ignore[misc, valid-type]
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            return 2 * super().compute_loss(*arguments, **named)

    with pytest.raises(ValueError, match=r"Mine has a compute_loss of its own.*derive it from"):
        fused(Mine)
    trainer = make(fused(kind), tmp_path)
    trainer.teacher_model.config.final_logit_softcapping = 5.0
    trainer.parity_check = False
    with pytest.raises(ValueError, match=r"must be the same for both models|something else"):
        trainer.train()


def test_evaluation_has_the_logits(tmp_path: Path) -> None:
    kind, make = classes()["gkd"]
    torch.manual_seed(0)
    trainer = make(fused(kind), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits.shape[-1] == 32
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), loss)
