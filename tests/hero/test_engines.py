"""Engines that sample outside of the trainer. Oracles: the trainer's own sampler, a plain forward
pass, and, where vllm is installed (.ci/extras vllm), the real server beside its stand-in."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_helpers import config as loss_config
from loss_helpers import learner
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hero.algorithms import MODES, Experience
from hero.checks import check
from hero.cli import main
from hero.config import TrainConfig
from hero.drift import Drift, DriftError
from hero.engines import make_engine
from hero.engines.paged import PagedError
from hero.engines.server import ServerEngine, ServerError, read_completion
from hero.models import SHIPPED
from hero.policy import Policy
from hero.report.tracking import read_jsonl
from hero.sampler import HFSampler, Sampling
from hero.teacher import TeacherContext
from tests.hero import vllm_reference
from tests.hero.runs import settings, trainer, weights
from tests.hero.vllm_stub import VllmStub, serving

SHORT: dict[str, Any] = {
    "updates": 2, "rollout": {"tasks_per_update": 2, "max_turns": 2, "max_turn_tokens": 6},
    "eval": {"every": 2, "dev_tasks": 2, "test_tasks": 2},
}  # fmt: skip
TEXTS = ("find a red lamp", "buy blue", "back to search the catalogue please")


@pytest.fixture(scope="session")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped agent, its head a matrix of its own: vLLM on a CPU cannot reload a tied one."""
    folder = tmp_path_factory.mktemp("agent")
    tied = AutoModelForCausalLM.from_pretrained(SHIPPED["tiny-shop"])
    model = LlamaForCausalLM(
        type(tied.config)(**tied.config.to_dict() | {"tie_word_embeddings": False})
    )
    model.load_state_dict(tied.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED["tiny-shop"]).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("hero.client.PAUSE", 0.01)


@pytest.fixture
def stub(agent: Path) -> Iterator[VllmStub]:
    with serving(VllmStub(agent)) as server:
        yield server


@pytest.fixture(scope="session")
def vllm(agent: Path) -> Iterator[str]:
    """The address of a real server."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is missing: .ci/extras vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(agent),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "1024", "--max-num-seqs", "16", "--enable-lora", "--max-lora-rank", "8",
    ]  # fmt: skip
    flags = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
             "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
             "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    server = subprocess.Popen(command, env=os.environ | flags, stdout=subprocess.DEVNULL)
    try:
        end, answered = time.monotonic() + 900, 1
        while answered != 0:
            assert server.poll() is None and time.monotonic() < end, "no server, or it has ended"
            time.sleep(1)
            with socket.socket() as tried:
                answered = tried.connect_ex(("127.0.0.1", port))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(params=["stub", "vllm", "transformers", "reference", "colocated"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings of each engine that can run here, or of what stands in for it."""
    kind, installed = request.param, importlib.util.find_spec("vllm") is not None
    if kind == "transformers":
        return {"kind": kind}
    if kind in ("stub", "vllm"):
        found = request.getfixturevalue(kind)
        return {"kind": "server", "base_url": getattr(found, "url", found)}
    if installed != (kind == "colocated"):
        pytest.skip("vllm is missing: .ci/extras vllm" if not installed else "the real one runs")
    if not installed:
        vllm_reference.install(monkeypatch)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    return {"kind": "vllm"}


def configured(agent: Path, url: str, **changes: Any) -> TrainConfig:
    engine = {"kind": "server", "base_url": url, **changes.pop("engine", {})}
    return settings(agent, engine=engine, **changes)


def prompts(policy: Policy) -> list[list[int]]:
    return [policy.renderer.start([{"role": "user", "content": text}]) for text in TEXTS]


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


# ---- what is refused --------------------------------------------------------------------------


def without(*names: str) -> Callable[[str, Any], Any]:
    """The server leaves these fields of a completion out."""

    def changed(path: str, reply: Any) -> Any:
        if path == "/v1/completions":
            for name in names:
                reply[1]["choices"][0][name] = None
        return reply

    return changed


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["token_ids", "prompt_token_ids"], "without token ids.*return_token_ids"),
        (["logprobs"], "no log-probability of each of its"),
    ],
    ids=["text_only", "no_logprobs"],
)
def test_answers_that_cannot_be_trained(
    agent: Path, stub: VllmStub, names: list[str], message: str
) -> None:
    config = configured(agent, stub.url)
    engine = make_engine(config, Policy.load(config.model))
    stub.changed = without(*names)
    with pytest.raises(ServerError, match=message):
        engine.generate([[5, 6]], Sampling(max_tokens=4, seed=0))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"token_ids": [3], "prompt_token_ids": [9], "logprobs": {"token_logprobs": [-1.0]}},
         "read 1 other ids"),
        ({"token_ids": [40], "prompt_token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}},
         "another vocabulary"),
        ({"token_ids": [3, 4], "prompt_token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}},
         "no log-probability of each of its 2 tokens"),
        ({"token_ids": [3], "prompt_token_ids": [5], "logprobs": {"token_logprobs": [1e999]}},
         "no log-probability"),
        ("text", "no completion"),
    ],
    ids=["prompt", "vocabulary", "too_few", "infinite", "no_choice"],
)  # fmt: skip
def test_completions_that_are_none(choice: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_completion(json.dumps({"choices": [choice]}).encode(), [5], vocabulary=40)


def test_another_model_behind_the_server(agent: Path, stub: VllmStub) -> None:
    """One that does not take the weights over: the first comparison ends it."""
    config = configured(agent, stub.url)
    policy = Policy.load(config.model)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.mul_(1.5)
    other = stub.model
    stub.changed = lambda path, reply: (setattr(stub, "model", other), reply)[1]
    engine = make_engine(config, policy)
    for _ in range(2):  # the second try is not taken for handed over
        with pytest.raises(DriftError, match=r"differ by .* nats.*another model"):
            engine.generate([[5, 6]], Sampling(max_tokens=4, seed=0))


def test_log_probabilities_of_another_temperature(agent: Path, stub: VllmStub) -> None:
    config = configured(agent, stub.url, rollout={"temperature": 0.3})
    engine = make_engine(config, Policy.load(config.model))
    with pytest.raises(DriftError, match="--logprobs-mode processed_logprobs"):
        engine.generate([[5, 6]], Sampling(max_tokens=4, seed=0))


def test_servers_that_cannot_take_weights(agent: Path) -> None:
    with serving(VllmStub(agent, dev=False)) as stub:
        config = configured(agent, stub.url)
        engine = make_engine(config, Policy.load(config.model))
        with pytest.raises(ServerError, match="VLLM_SERVER_DEV_MODE=1"):
            engine.generate([[5, 6]], Sampling(max_tokens=4, seed=0))
        stub.changed = lambda path, reply: (
            (404, {"detail": "Not Found"}) if "lora" in path else reply
        )
        lora = configured(agent, stub.url, model={"lora_rank": 2})
        with pytest.raises(ServerError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            make_engine(lora, Policy.load(lora.model)).generate(
                [[5, 6]], Sampling(max_tokens=4, seed=0)
            )


def test_a_server_that_is_not_there_or_serves_another_name(
    agent: Path, stub: VllmStub, tmp_path: Path
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with pytest.raises(ServerError, match=r"refused.*vllm serve.*--engine\.kind hero"):
        trainer(configured(agent, nobody), tmp_path)
    with pytest.raises(ServerError, match=r"serves 'student'; expected 'other'.*--engine\.model"):
        trainer(configured(agent, stub.url, engine={"model": "other"}), tmp_path)
    stub.max_model_len = 100
    run = trainer(configured(agent, stub.url), tmp_path)
    with pytest.raises(ServerError, match=r"up to 100 tokens.*--max-model-len 1024"):
        run.run()


def test_a_request_that_fails_ends_the_batch(agent: Path, stub: VllmStub) -> None:
    config = configured(agent, stub.url)
    policy = Policy.load(config.model)
    engine = make_engine(config, policy)
    engine.generate(prompts(policy)[:1], Sampling(max_tokens=2, seed=0))
    stub.changed = lambda path, reply: (400, "no: out of memory")
    with pytest.raises(ServerError, match="out of memory"):
        engine.generate(prompts(policy) * 3, Sampling(max_tokens=2, seed=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"kind": "server"}}, r"needs --engine\.base-url"),
        ({"engine": {"kind": "server", "base_url": "http://a:***@b/v1"}}, "without its secret"),
        ({"engine": {"kind": "server", "base_url": "http://127.0.0.1:1/v1"},
          "rollout": {"temperature": 0.7, "top_p": 0.9}}, "of the nucleus"),
        ({"engine": {"kind": "transformers"}, "rollout": {"top_p": 0.9}}, r"--rollout\.top-p 1"),
        ({"engine": {"api_key_env": "sk-abc/def"}}, r"engine\.api_key_env must be the name"),
    ],
    ids=["address", "secret", "nucleus", "nucleus_alone", "key"],
)  # fmt: skip
def test_settings_that_do_not_fit(agent: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(settings(agent, **changes))


# ---- drift ------------------------------------------------------------------------------------


def test_vllm_that_is_missing_is_said(agent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = settings(agent, engine={"kind": "vllm"})
    with pytest.raises(ValueError, match=r"pip install 'hero-kernels\[vllm\]'"):
        make_engine(config, Policy.load(config.model))


def test_drift_by_hand() -> None:
    nan = float("nan")
    drift = Drift.of(torch.tensor([0.1, nan, -0.3]))
    assert drift is not None and drift.tokens == 2
    assert (drift.mean, drift.max) == (pytest.approx(0.2), pytest.approx(0.3))
    # exp(0.1) - 1 - 0.1 = 0.00517092, exp(-0.3) - 1 + 0.3 = 0.04081822
    assert drift.kl == pytest.approx((0.00517092 + 0.04081822) / 2, abs=1e-7)
    assert Drift.of(torch.tensor([nan])) is None


def test_drift_is_seen_where_a_policy_gradient_is_learnt(
    fresh_policy: Policy, experience: Experience, context: TeacherContext
) -> None:
    learn, samples = (
        learner(fresh_policy, loss_config("grpo")), MODES["grpo"](context).annotate(experience)
    )  # fmt: skip
    seen = learn.learn(samples, seed=0).drift
    assert seen is not None and seen.max < 1e-4  # they were sampled from this policy
    other = learner(copy.deepcopy(fresh_policy), loss_config("grpo"))
    for sample in samples:
        sample.sampled_logprobs = [value - 0.5 for value in sample.sampled_logprobs]
    with pytest.raises(DriftError, match=r"differ by 0\.\d+ nats"):
        other.learn(samples, seed=0)


def test_drift_stops_a_run_before_it_learns(agent: Path, stub: VllmStub, tmp_path: Path) -> None:
    """From the second update on the server tells log-probabilities that are too low by 0.5."""
    run = trainer(configured(agent, stub.url, **SHORT), tmp_path)

    def changed(path: str, reply: Any) -> Any:
        if path == "/v1/completions" and run.state.update == 1 and run.stages.sampler.version == 1:
            shown = reply[1]["choices"][0]["logprobs"]
            shown["token_logprobs"] = [value - 0.5 for value in shown["token_logprobs"]]
        return reply

    stub.changed = changed
    with pytest.raises(DriftError, match=r"differ by 0\.5 nats.*max-drift allows 0\.1"):
        run.run()
    assert run.state.update == 1 and run.learner.steps_taken == 1
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]


def test_only_the_newest_weights_are_kept(agent: Path, stub: VllmStub) -> None:
    config = configured(agent, stub.url)
    engine = ServerEngine(Policy.load(config.model), config)
    engine.generate([[5, 6]], Sampling(max_tokens=2, seed=0))
    folder = Path(engine.weights._root.name)
    assert [path.name for path in folder.iterdir()] == ["version-0"]
    engine.policy.version += 1
    engine.generate([[5, 6]], Sampling(max_tokens=2, seed=0))
    assert [path.name for path in folder.iterdir()] == ["version-1"]
    del engine
    assert not folder.exists()


def test_the_command_of_the_page(agent: Path, stub: VllmStub, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    [command] = re.findall(r"```bash\n(hero train [^`]*)```", page)
    for placed, own in (
        ("\\\n", ""),
        ("MODEL", str(agent)),
        ("http://127.0.0.1:8000/v1", stub.url),
    ):
        assert placed in command
        command = command.replace(placed, own)
    small = (
        "--updates 1 --rollout.tasks-per-update 2 --rollout.max-turns 1 --eval.dev-tasks 1 "
        "--eval.test-tasks 0 --eval.min-teacher-lift None --model.device cpu --output-dir"
    )
    assert main([*command.split()[1:], *small.split(), str(tmp_path / "run")]) == 0
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["drift/max"] < 1e-3
    assert "/v1/load_lora_adapter" in stub.asked
