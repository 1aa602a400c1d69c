"""What makes a run fit one GPU. Oracle: the same without the switch, or float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_helpers import config, gradients, learner, packed
from torch import Tensor, nn

from hero.checks import check, check_ranks, from_dict
from hero.config import LossConfig, ModelConfig, TeacherConfig
from hero.learner import Learned, Learner
from hero.policy import Policy
from hero.teacher import TeacherWeights
from hero.types import Sample
from tests.hero.short_runs import assert_same, settings, trainer, weights

BF16: dict[str, Any] = {"dtype": "bfloat16"}
MASTERS: dict[str, Any] = {**BF16, "master_weights": True}


def variant(policy: Policy, **model: Any) -> Policy:
    """The same weights under other settings."""
    return Policy(copy.deepcopy(policy.model), policy.tokenizer, ModelConfig(device="cpu", **model))


def test_recomputed_gradients_are_equal(policy: Policy, samples: list[Sample]) -> None:
    plain, recomputed = variant(policy), variant(policy, gradient_checkpointing=True)
    passes = []
    for own in (plain, recomputed):
        count: list[int] = []
        own._layers()[0].self_attn.register_forward_pre_hook(lambda *_, c=count: c.append(1))
        passes.append(count)
    expected, found = (gradients(own, config(), samples) for own in (plain, recomputed))
    assert_same(expected, found)
    assert len(passes[1]) > len(passes[0])


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
def test_compiled_layers_have_the_same_gradients(
    policy: Policy, samples: list[Sample], recomputes: bool
) -> None:
    from torch._dynamo.utils import counters

    def of_pass(own: Policy, samples: list[Sample]) -> dict[str, Tensor]:
        with own.learning():
            packed(samples).student.states(own).pow(3).mean().backward()
        return {n: p.grad for n, p in own.trainable().items() if p.grad is not None}

    expected = of_pass(variant(policy), samples)
    torch.compiler.reset()
    counters.clear()
    compiled = variant(policy, compile=True, gradient_checkpointing=recomputes)
    found = of_pass(compiled, samples)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4 * scale)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 4  # norm, MLP, attention before and after its spans
    of_pass(compiled, samples[:5])  # other lengths, and another number of rows
    with torch.no_grad():
        compiled.hidden(torch.tensor([samples[0].prompt_ids]))  # as the sampler reads
        compiled.trunk(torch.tensor([samples[0].prompt_ids]), use_cache=True)
    assert counters["stats"]["unique_graphs"] == graphs


# ---- the teacher in main memory ----------------------------------------------------------------


@pytest.mark.parametrize("model", [{}, MASTERS], ids=["float32", "masters"])
@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_a_teacher_in_main_memory_teaches_the_same(
    policy: Policy, samples: list[Sample], model: dict[str, Any], kind: str
) -> None:
    learnt = []
    for offload in (False, True):
        own, of_run = variant(policy, **model), config(micro_batch_tokens=64)
        of_run.teacher = TeacherConfig(weights=kind, offload=offload)  # type: ignore[arg-type]
        of_run.loss, of_run.engine.max_drift = LossConfig(kl_to_start=0.1), 10.0
        learn = Learner(own, TeacherWeights(own, of_run.teacher), of_run)
        for seed in (0, 1):
            learn.learn(samples, seed)
        learnt.append((own.trainable(), learn.teacher.state_dict()))
    for plain, offloaded in zip(*learnt, strict=True):
        assert_same(plain, offloaded)


def test_the_teacher_of_an_adapter_is_an_adapter(policy: Policy) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    teacher = TeacherWeights(variant(policy, lora_rank=2), TeacherConfig())
    assert teacher.state_dict() and all("lora_" in name for name in teacher.state_dict())


# ---- bfloat16 with float32 masters -------------------------------------------------------------


def test_small_updates_are_not_lost(policy: Policy, samples: list[Sample]) -> None:
    """Against AdamW in float32, and in bfloat16, on the same gradients."""
    own = variant(policy, **MASTERS)
    start = {name: p.detach().clone() for name, p in own.trainable().items()}
    learn = learner(own, config(learning_rate=1e-5, max_grad_norm=1e9))
    wide = {name: nn.Parameter(p.clone()) for name, p in start.items()}
    narrow = {name: nn.Parameter(p.bfloat16()) for name, p in start.items()}
    steps = [torch.optim.AdamW(p.values(), lr=1e-5, weight_decay=0.0) for p in (wide, narrow)]
    for _ in range(10):
        learn._accumulate(samples)
        for name, p in own.trainable().items():
            assert p.grad is not None
            wide[name].grad, narrow[name].grad = p.grad.clone(), p.grad.bfloat16()
        learn._step(Learned())
        for step in steps:
            step.step()
    moved = {"masters": 0, "bfloat16": 0}
    weights = dict(own.model.named_parameters())
    for name, master in own.trainable().items():
        assert master.dtype == torch.float32
        torch.testing.assert_close(master, wide[name], rtol=0, atol=1e-8)
        assert torch.equal(weights[name], master.bfloat16())
        moved["masters"] += int((weights[name] != start[name].bfloat16()).sum())
        moved["bfloat16"] += int((narrow[name] != start[name].bfloat16()).sum())
    assert moved["masters"] > 3 * moved["bfloat16"]


def test_gradients_of_masters_are_as_right_as_autocasts(
    policy: Policy, samples: list[Sample]
) -> None:
    expected = gradients(variant(policy), config(), samples)

    def error(found: dict[str, Tensor]) -> float:
        assert found.keys() == expected.keys()
        off = sum(float((found[n] - g).square().sum()) for n, g in expected.items())
        return (off / sum(float(g.square().sum()) for g in expected.values())) ** 0.5

    cast, masters = (
        error(gradients(variant(policy, **kind), config(), samples)) for kind in (BF16, MASTERS)
    )
    assert masters <= 2 * cast + 1e-3 and masters < 0.2


def test_gradients_of_passes_are_summed_in_float32(policy: Policy) -> None:
    own = variant(policy, **MASTERS)
    ids, found = torch.arange(9)[None], []
    for _ in range(3):
        own.hidden(ids).float().square().sum().backward()
        found.append({n: p.grad.clone() for n, p in own.trainable().items() if p.grad is not None})
    assert len(found[0]) > 3 and all(p.grad is None for p in own.model.parameters())
    for name, one in found[0].items():
        assert torch.equal(found[2][name], 3 * one)  # 3 times 8 bits do not fit 8 bits


def test_a_teacher_of_masters_takes_the_models_place_and_leaves_it(policy: Policy) -> None:
    own = variant(policy, **MASTERS)
    teacher, ids = TeacherWeights(own, TeacherConfig(weights="frozen")), torch.arange(9)[None]

    def logits() -> Tensor:
        with torch.no_grad():
            return own.logits(own.hidden(ids))

    before, head = logits(), own.head_weight.detach().clone()
    with own.shards.resharded(), torch.no_grad():
        for p in own.trainable().values():
            p.mul_(1.5)
    after = logits()
    assert not torch.equal(before, after)
    with teacher.applied():
        assert torch.equal(logits(), before)
    assert torch.equal(logits(), after)
    assert torch.equal(teacher.own_head()["teacher_weight"], head)


def test_masters_are_what_is_saved(policy: Policy, tmp_path: Path) -> None:
    own = variant(policy, **MASTERS)
    with own.shards.whole_weights() as weights:
        own.save(tmp_path, weights)
    kept = {name: p.detach().clone() for name, p in own.trainable().items()}
    with own.shards.resharded(), torch.no_grad():
        for p in own.trainable().values():
            p.zero_()
    own.restore(tmp_path)
    assert_same(dict(own.trainable()), kept)


# ---- whole runs, and what does not go together --------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"model": MASTERS},
        {"model": {**MASTERS, "lora_rank": 4}},
        {"teacher": {"offload": True}, "eval": {"select": "averaged"}},
        {"optim": {"kind": "adamw_8bit"}},
        {"model": {"lora_rank": 64, "quantize": "4bit"}, "optim": {"kind": "adamw_8bit"}},
    ],
    ids=["masters", "masters-lora", "offload", "8bit", "qlora"],
)  # fmt: skip
def test_a_run_that_goes_on_ends_as_one_without_a_break(
    changes: dict[str, Any], wide_path: Path, tmp_path: Path
) -> None:
    if "lora_rank" in changes.get("model", ()):
        pytest.importorskip("peft")
    if "bit" in str(changes.values()):
        pytest.importorskip("bitsandbytes")
    trainer(settings(wide_path, updates=2, **changes), tmp_path / "one").run()
    trainer(settings(wide_path, updates=1, **changes), tmp_path / "two").run()
    start = weights(tmp_path / "two")
    resumed = settings(wide_path, updates=2, resume=str(tmp_path / "two"), **changes)
    trainer(resumed, tmp_path / "two").run()
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert any(not torch.equal(start[name], w) for name, w in weights(tmp_path / "two").items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"offload": True, "weights": "live"}}, "--teacher.weights ema or frozen"),
        ({"teacher": {"offload": True, "path": "x"}}, "without --teacher.path"),
        ({"model": {"quantize": "4bit", "lora_rank": 4}, "engine": {"kind": "transformers"}},
         "set --engine.kind hero"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(from_dict(changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"quantize": "4bit"}}, {"model": {"compile": True}},
        {"model": {"master_weights": True}}, {"optim": {"kind": "adamw_8bit"}},
        {"teacher": {"offload": True}},
    ],
    ids=str,
)  # fmt: skip
def test_several_processes_are_told_what_to_leave_out(changes: dict[str, Any]) -> None:
    check_ranks(from_dict(changes), 1)
    with pytest.raises(ValueError, match="is for one process, got 2: leave it out"):
        check_ranks(from_dict(changes), 2)


def test_types_that_do_not_go_together(policy: Policy, model_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set --model.dtype bfloat16"):
        variant(policy, master_weights=True)
    with pytest.raises(ValueError, match=r"expected a pretrained --model.path"):
        variant(policy, quantize="4bit", lora_rank=4)
    with pytest.raises(ValueError, match=r"set --model.lora-rank 16"):
        Policy.load(ModelConfig(path=str(model_path), device="cpu", quantize="4bit"))
