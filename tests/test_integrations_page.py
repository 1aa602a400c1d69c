"""The snippets of docs/integrations.md, before and after. Oracle of each `after`: its `before`."""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hero_kernels import Objective, reference

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
sys.path[:0] = [str(ROOT / "tests" / "hero_kernels"), str(ROOT / "examples")]


def snippets(title: str) -> tuple[str, str]:
    [section] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    before, after = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    for code in (before, after):
        assert len(code.splitlines()) <= 10
    return before, after


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    names = {"torch": torch, "math": math, **names}
    exec(compile(code, "integrations.md", "exec"), names)
    return names


def test_a_loop_of_your_own() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(12, 16), torch.randn(31, 16)
    teacher, mask = hidden + 0.2 * torch.randn(12, 16), torch.arange(12) % 3 != 0
    results = []
    for code in snippets("A loop of your own"):
        student = hidden.clone().requires_grad_()
        names = {"student": student, "head": head, "teacher": teacher, "mask": mask}
        results.append((run(code, names)["loss"].detach(), student.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_a_transformers_model() -> None:
    from trl_helpers import tiny_llama

    ids, results = torch.arange(3, 15)[None], []
    for code in snippets("A transformers model"):
        model = tiny_llama(0)
        names = run(code, {"model": model, "teacher_model": tiny_llama(1), "ids": ids})
        results.append((names["loss"].detach(), model.model.embed_tokens.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_liger() -> None:
    """Liger's kernel needs a GPU: here its class is made, and ours compared with the definition."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is missing: .ci/extras trl")
    before, after = snippets("Liger")
    assert run(before, {})["jsd"].__class__.__name__ == "LigerFusedLinearJSD"
    torch.manual_seed(0)
    student, head, teacher = torch.randn(6, 8), torch.randn(13, 8), torch.randn(6, 8)
    labels = torch.tensor([1, -100, 2, 3, -100, 4])
    got = run(after, {})["jsd"](student, head, teacher, head, labels)
    logps = [(x.double() @ head.double().T).log_softmax(-1) for x in (student, teacher)]
    expected = reference.divergence(*logps, Objective(divergence="jsd", beta=0.5))
    assert float(got) == pytest.approx(float(expected[labels != -100].mean()), rel=1e-5)


def test_trls_distillation_trainers(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is missing: .ci/extras trl")
    from trl_helpers import gkd_trainer, tiny_llama

    results = []
    for code in snippets("TRL's distillation trainers"):
        from trl.experimental.gkd import GKDTrainer

        made = gkd_trainer(GKDTrainer, tmp_path, max_steps=1)
        names = {"model": tiny_llama(0), "teacher_model": tiny_llama(1), "args": made.args,
                 "tokenizer": made.processing_class, "rows": given_rows()}  # fmt: skip
        trainer = run(code, names)["trainer"]
        results.append([p.detach().clone() for p in trainer.model.parameters()])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def given_rows() -> Any:
    from datasets import Dataset

    rows = [
        [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i + 1} w{i}"}]
        for i in range(8)
    ]
    return Dataset.from_dict({"messages": rows})


def test_trls_grpo_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl", reason="trl is missing: .ci/extras trl")
    import trl_hero as example
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hero.models import SHIPPED

    logged = []
    for code in snippets("TRL's GRPOTrainer"):
        tokenizer = AutoTokenizer.from_pretrained(SHIPPED["tiny-shop"])
        tokenizer.chat_template, tokenizer.response_template = example.TEMPLATE, example.CALLS
        model = AutoModelForCausalLM.from_pretrained(SHIPPED["tiny-shop"])
        model.config.max_position_embeddings = 4096  # room for a reflection by the defaults
        args = trl.GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2,
            max_completion_length=60, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
            gradient_checkpointing=False, logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        tasks = [
            {"prompt": [{"role": "user", "content": ""}], "task_id": f"train-{i}"} for i in range(4)
        ]
        trainer = run(code, {
            "model": model, "args": args, "tasks": Dataset.from_list(copy.deepcopy(tasks)),
            "score": example.score, "Shop": example.Shop, "tokenizer": tokenizer,
        })["trainer"]  # fmt: skip
        logged.append(trainer.state.log_history[0])
    grpo, hero = logged
    assert grpo["reward"] == hero["reward"]  # the same rollout, seed for seed
    assert "reflection/turns" in hero and "clip_ratio/low_mean" in grpo


def test_the_kernel_hub(tmp_path: Path) -> None:
    pytest.importorskip("kernels", reason="kernels is missing: .ci/extras hub")
    subprocess.run([sys.executable, ROOT / ".ci" / "hub_kernel.py", tmp_path / "hub"], check=True)
    before, after = snippets("The Kernel Hub")
    code = (
        f"{before}theirs = fused_linear_divergence\n{after}"
        "import torch\n"
        "given = torch.randn(5, 8), torch.randn(11, 8), torch.randn(5, 8)\n"
        "assert torch.equal(theirs(*given), fused_linear_divergence(*given))\n"
        "assert theirs is not fused_linear_divergence\n"
    )
    where = f"OWNER/hero-kernels={tmp_path / 'hub'}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": where},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
