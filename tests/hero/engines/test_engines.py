"""Engines that sample outside of the trainer. Oracles: the trainer's own sampler, a plain forward
pass, and, where vllm is installed (.ci/extras vllm), the real server beside its stand-in."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from hero.engines import make_engine
from hero.engines.paged import PagedError
from hero.policy import Policy
from hero.report.tracking import read_jsonl
from hero.sampler import HFSampler, Sampling
from tests.hero import vllm_reference
from tests.hero.engines.runs import SHORT, configured, prompts
from tests.hero.short_runs import settings, trainer, weights
from tests.hero.vllm_stub import VllmStub


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])  # LoRA needs the base as it was
def test_every_engine_is_greedy_as_the_trainer_is_after_each_change(
    agent: Path, engine: dict[str, str], rank: int
) -> None:
    config = settings(agent, engine=engine, model={"lora_rank": rank})
    torch.manual_seed(0)
    policy = Policy.load(config.model)
    sampler = make_engine(config, policy)
    seen = set()
    for _ in range(3):
        sampling = Sampling(max_tokens=8, seed=1, temperature=0.0)
        found = sampler.generate(prompts(policy), sampling)
        own = HFSampler(policy).generate(prompts(policy), sampling)
        assert [c.ids for c in found] == [c.ids for c in own]
        for one, other in zip(found, own, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        seen.add(str([c.ids for c in own]))
        assert sampler.version == policy.version
        sampler.rest()
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        policy.version += 1
    assert len(seen) == 3  # the weights that came over made a difference


def test_a_run_with_every_engine(agent: Path, engine: dict[str, str], tmp_path: Path) -> None:
    shorter = SHORT | {"eval": {"every": 2, "dev_tasks": 1, "test_tasks": 0}}
    trainer(settings(agent, engine=engine, **shorter), tmp_path).run()
    for number, line in enumerate(read_jsonl(tmp_path / "metrics.jsonl")[1:]):
        assert line["drift/max"] < 1e-3 and line["rollout/policy_version"] == number
        assert line["optim/steps"] == 1


def test_a_run_on_a_server_ends_with_the_weights_of_a_run_without(
    agent: Path, stub: VllmStub, tmp_path: Path
) -> None:
    """The stand-in draws as the trainer's sampler does, so the same episodes are played."""
    for name, config in (
        ("server", configured(agent, stub.url, **SHORT)),
        ("hero", settings(agent, **SHORT)),
    ):
        trainer(config, tmp_path / name).run()
    theirs, ours = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("server", "hero"))
    for one, other in zip(theirs, ours, strict=True):
        for name in ("rewards/mean", "generated_tokens", "dev/success", "rollout/policy_version"):
            assert one.get(name) == other.get(name)
    assert [line["rollout/policy_version"] for line in theirs[1:]] == [0, 1]
    assert all(0 < line["drift/max"] < 1e-4 and line["drift/kl"] < 1e-8 for line in theirs[1:])
    for name, value in weights(tmp_path / "hero").items():
        torch.testing.assert_close(weights(tmp_path / "server")[name], value, atol=2e-4, rtol=0)
    # At the start, after each update, and the selected ones at the end.
    assert stub.asked.count("/collective_rpc") == stub.asked.count("/reset_prefix_cache") == 4


def test_a_teacher_that_reflects_stays_in_the_trainer(
    agent: Path, stub: VllmStub, tmp_path: Path
) -> None:
    """Its weights are never behind the server, so the same reflections are read."""
    changes = SHORT | {"reflection": {"reflector": "teacher", "max_tokens": 8}, "updates": 1}
    told = []
    for name, config in (
        ("server", configured(agent, stub.url, **changes)), ("hero", settings(agent, **changes))
    ):  # fmt: skip
        trainer(config, tmp_path / name).run()
        told.append(read_jsonl(tmp_path / name / "metrics.jsonl")[-1]["reflection_tokens"])
    assert told[0] == told[1] > 0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_of_pages_are_the_trainers(agent: Path, temperature: float) -> None:
    config = settings(agent, engine={"kind": "transformers"})
    policy = Policy.load(config.model)
    sampling = Sampling(max_tokens=8, seed=3, temperature=temperature)
    found = make_engine(config, policy).generate(prompts(policy), sampling)
    for prompt, done in zip(prompts(policy), found, strict=True):
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + done.ids])).logits[0].double()
        expected = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = expected.gather(1, torch.tensor(done.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(
            torch.tensor(done.logprobs, dtype=torch.float64), expected, atol=1e-4, rtol=0
        )


def test_pages_that_fail_are_an_error(agent: Path) -> None:
    """Each needs more of them than the whole cache has."""
    config = settings(agent, engine={"kind": "transformers"})
    policy = Policy.load(config.model)
    pages = make_engine(config, policy).stream(1, Sampling(max_tokens=2, seed=0), 8)
    pages.submit(0, [5] * 900, 0)
    with pytest.raises(PagedError, match=r"--rollout\.batch-size"):
        for _ in range(500):
            pages.step()


def test_the_reference_has_the_signatures_of_vllm() -> None:
    vllm = pytest.importorskip("vllm", reason="vllm is missing: .ci/extras vllm")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

    def named(function: Any) -> set[str]:
        return set(inspect.signature(function).parameters) - {"self"}

    known = named(vllm.LLM.__init__) | named(EngineArgs)
    assert named(vllm_reference.LLM.__init__) <= known
    for ours, theirs in (
        (vllm_reference.LLMEngine, LLMEngine), (vllm_reference.LLM, vllm.LLM)
    ):  # fmt: skip
        for name in ("add_request", "step", "collective_rpc", "sleep", "wake_up"):
            if hasattr(ours, name):
                assert named(getattr(ours, name)) <= named(getattr(theirs, name)), name
    assert named(vllm_reference.LoRARequest.__init__) <= set(LoRARequest.__struct_fields__)
    assert named(vllm_reference.SamplingParams.__init__) <= named(vllm.SamplingParams)
