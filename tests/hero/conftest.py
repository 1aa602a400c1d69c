"""Fixtures shared by the tests of `hero`."""

from __future__ import annotations

import copy
import string
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoint_helpers import Handler
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hero.algorithms import MODES, Experience
from hero.config import LossConfig, ModelConfig, ScratchConfig, TeacherConfig
from hero.envs.shop import ShopEnv
from hero.policy import Policy
from hero.prompts import make_prompts
from hero.renderer import Renderer
from hero.sampler import HFSampler, Sampling
from hero.scratch import build_model, build_tokenizer
from hero.teacher import TeacherContext
from hero.types import Diagnosis, Sample, Trajectory
from tests.hero import made
from tests.hero.made import turn
from tests.hero.short_runs import saved

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML, and one token a printable character: texts come back exactly, lengths are plain."""
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    words = special + sorted(set(string.printable) | {"…"})
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def renderer(tiny_tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return Renderer(tiny_tokenizer)


@pytest.fixture(scope="session")
def episode(renderer: Renderer) -> Callable[..., Trajectory]:
    """Makes an episode whose turns saw `prompts`, acted `act` and observed `obs 0`, `obs 1`, …"""

    def make(
        prompts: Sequence[str], *, task: str = "t", instruction: str = "buy a lamp"
    ) -> Trajectory:
        seen = [renderer.start([{"role": "user", "content": prompt}]) for prompt in prompts]
        ids = renderer.encode("act")
        turns = [turn("act", f"obs {k}", ids, prompt_ids=read) for k, read in enumerate(seen)]
        return made.episode(task, *turns, id=f"{task}/0", instruction=instruction)

    return make


@pytest.fixture(scope="session")
def policy(tiny_tokenizer: PreTrainedTokenizerFast) -> Policy:
    """A random two-layer Llama over the character tokenizer; tests that train it take a copy."""
    torch.manual_seed(0)
    model = build_model(ScratchConfig(width=32, layers=2, heads=4, init_std=0.15), tiny_tokenizer)
    return Policy(model, tiny_tokenizer, ModelConfig(device="cpu"))


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random one-layer model for the tiny shop."""
    tokenizer = build_tokenizer(ShopEnv(profile="tiny").vocabulary())
    shape = ScratchConfig(width=16, layers=1, heads=2)
    return saved(shape, tokenizer, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def wide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `model_path`, with layers wide enough for blocks of 4 and 8 bits."""
    tokenizer = build_tokenizer(ShopEnv(profile="tiny").vocabulary())
    shape = ScratchConfig(width=64, layers=2, heads=2)
    return saved(shape, tokenizer, tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with a random one-layer model over the character tokenizer."""
    shape = ScratchConfig(width=32, layers=1, heads=2, context=16000)
    return saved(shape, tiny_tokenizer, tmp_path_factory.mktemp("chat"))


@pytest.fixture
def fresh_policy(policy: Policy) -> Policy:
    """A copy that a test may change."""
    return Policy(copy.deepcopy(policy.model), policy.tokenizer, ModelConfig(device="cpu"))


@pytest.fixture(scope="session")
def played(policy: Policy) -> list[Trajectory]:
    """Four episodes of three turns each, sampled from `policy` with an environment of echoes."""
    sampler = HFSampler(policy)
    renderer = policy.renderer
    trajectories = []
    for number in range(4):
        prompt = renderer.start([{"role": "user", "content": f"task {number}"}])
        turns = []
        for k in range(3):
            [done] = sampler.generate([prompt], Sampling(max_tokens=6, seed=10 * number + k))
            read = {"prompt_ids": prompt, "sampled_logprobs": done.logprobs}
            turns.append(turn(renderer.decode(done.ids), f"seen {k}", done.ids, **read))
            prompt = prompt + done.ids + renderer.observe(done.ids, "user", f"seen {k}")
        trajectories.append(
            made.episode(
                f"task-{number // 2}", *turns, id=f"t{number}", group_id=f"g{number // 2}",
                instruction=f"task {number}", reward=float(number % 2), success=number % 2 == 1,
            )
        )  # fmt: skip
    return trajectories


@pytest.fixture(scope="session")
def context(renderer: Renderer) -> TeacherContext:
    return TeacherContext(TeacherConfig(), renderer, make_prompts("standard"))


@pytest.fixture
def hints(played: list[Trajectory]) -> list[list[Diagnosis]]:
    """A hint on the first and the last turn of every episode, none on the middle one."""
    return [
        [
            Diagnosis(turn=0, hint="look first"),
            Diagnosis(turn=1),
            Diagnosis(turn=2, hint="stop here"),
        ]
        for _ in played
    ]


@pytest.fixture
def experience(played: list[Trajectory], hints: list[list[Diagnosis]]) -> Experience:
    return Experience(trajectories=copy.deepcopy(played), diagnoses=hints, gold={})


@pytest.fixture
def samples(experience: Experience, context: TeacherContext) -> list[Sample]:
    return MODES["hero"](context, LossConfig(turns="hinted")).annotate(experience)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("hero.client.PAUSE", 0.01)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
