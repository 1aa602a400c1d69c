"""What engines refuse: answers that cannot be trained, other weights, too much drift."""

from __future__ import annotations

import copy
import json
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_helpers import config as loss_config
from loss_helpers import learner

from hero.algorithms import MODES, Experience
from hero.checks import check
from hero.cli import main
from hero.drift import Drift, DriftError
from hero.engines import make_engine
from hero.engines.server import ServerEngine, ServerError, read_completion
from hero.policy import Policy
from hero.report.tracking import read_jsonl
from hero.sampler import Sampling
from hero.teacher import TeacherContext
from tests.hero.engines.runs import SHORT, configured, prompts
from tests.hero.short_runs import settings, trainer
from tests.hero.vllm_stub import VllmStub, serving


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
        read_completion(json.dumps({"choices": [choice]}).encode(), [5], 40, max_tokens=4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"token_ids": [3, "a"]}, "an id 'a'.*another vocabulary"),
        ({"token_ids": [3, None]}, "an id None"),
        ({"token_ids": [3, True]}, "an id True"),
        ({"token_ids": [3, 10**400]}, "an id 1000.*another vocabulary"),
        ({"token_ids": 5}, "without token ids"),
        ({"token_ids": "ab"}, "without token ids"),
        ({"token_ids": {"3": 4, "5": 6}}, "without token ids"),
        ({"token_ids": [3] * 5, "logprobs": {"token_logprobs": [-1.0] * 5}}, "5 tokens.*at most 4"),
        ({"prompt_token_ids": 5}, "it read no other ids"),
        ({"logprobs": {"token_logprobs": 7}}, "no log-probability"),
        ({"logprobs": {"token_logprobs": [-1.0, -(10**400)]}}, "no log-probability"),
        ({"logprobs": {"token_logprobs": [True, -1.0]}}, "no log-probability"),
        ({"logprobs": []}, "no log-probability"),
        ({"logprobs": [1]}, "no completion"),
    ],
)  # fmt: skip
def test_lies_of_a_server_are_one_kind_of_error(changed: dict[str, Any], message: str) -> None:
    right = {"token_ids": [3, 4], "prompt_token_ids": [5], "logprobs": {"token_logprobs": [-1, 0]}}
    assert read_completion(json.dumps({"choices": [right]}).encode(), [5], 40, 4).ids == [3, 4]
    with pytest.raises(ValueError, match=message) as caught:
        read_completion(json.dumps({"choices": [right | changed]}).encode(), [5], 40, 4)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("length", ["long", [8], {}, float("inf"), float("nan")], ids=str)
def test_catalogues_whose_lengths_are_no_numbers(agent: Path, stub: VllmStub, length: Any) -> None:
    card = {"id": "student", "max_model_len": length or "none"}
    stub.changed = lambda path, reply: (200, {"data": [card]})
    config = configured(agent, stub.url)
    with pytest.raises(ServerError, match="no list of models"):
        make_engine(config, Policy.load(config.model))


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
    folder = Path(engine._root.name)
    assert [path.name for path in folder.iterdir()] == ["version-0"]
    engine.policy.version += 1
    engine.generate([[5, 6]], Sampling(max_tokens=2, seed=0))
    assert [path.name for path in folder.iterdir()] == ["version-1"]
    del engine
    assert not folder.exists()


def test_the_command_of_the_page(agent: Path, stub: VllmStub, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "integrations.md").read_text(encoding="utf-8")
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
