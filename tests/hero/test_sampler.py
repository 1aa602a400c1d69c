"""The sampler against log-probabilities recomputed by one plain forward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from hero.config import ModelConfig
from hero.policy import Policy
from hero.sampler import Completion, HFSampler, Sampling, draw_tokens


@pytest.fixture
def prompts(policy: Policy) -> list[list[int]]:
    texts = ["a", "find a lamp", "a much longer request than the others", "b b"]
    return [policy.renderer.start([{"role": "user", "content": text}]) for text in texts]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_models_own(
    policy: Policy, prompts: list[list[int]], temperature: float
) -> None:
    done = HFSampler(policy, batch_size=3).generate(
        prompts, Sampling(max_tokens=9, seed=1, temperature=temperature)
    )
    for prompt, completion in zip(prompts, done, strict=True):
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + completion.ids])).logits[0]
        logprobs = (logits.double() / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs, dtype=torch.float64), expected, atol=1e-4, rtol=0
        )


def test_gradient_checkpointing_leaves_the_sampler_alone(
    policy: Policy, prompts: list[list[int]]
) -> None:
    sampling = Sampling(max_tokens=9, seed=3)
    expected = HFSampler(policy).generate(prompts, sampling)
    config = ModelConfig(device="cpu", gradient_checkpointing=True)
    checkpointed = Policy(copy.deepcopy(policy.model), policy.tokenizer, config)
    ids = torch.tensor([prompts[1]])
    with checkpointed.learning():
        checkpointed.hidden(ids).sum().backward()
    assert all(p.grad is not None for n, p in checkpointed.trainable().items() if "layers" in n)
    done = HFSampler(checkpointed).generate(prompts, sampling)
    assert [c.ids for c in done] == [c.ids for c in expected]


def test_no_position_is_beyond_a_table_of_them(policy: Policy) -> None:
    """GPT-2's has 32 rows; the next turn of one sequence is read beside the first of another."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=len(policy.tokenizer), n_positions=32, n_embd=16, n_layer=1,
                       n_head=2)  # fmt: skip
    learned = Policy(GPT2LMHeadModel(shape), policy.tokenizer, ModelConfig(device="cpu"))
    sampling = Sampling(max_tokens=1, seed=0, temperature=0)
    stream = HFSampler(learned).stream(2, sampling, 32)
    ids = torch.randint(3, len(policy.tokenizer), (46,)).tolist()
    turn, other = ids[:31], ids[31:]
    stream.submit(0, turn[:20], 0)
    assert len(stream.step()) == 1
    stream.submit(0, turn, 0)
    stream.submit(1, other, 0)
    found = dict(stream.step())
    for row, prompt in enumerate((turn, other)):
        logits = learned.model(torch.tensor([prompt])).logits[0, -1]
        assert found[row].ids == [int(logits.argmax())]


def test_rows_stop_by_themselves(policy: Policy, prompts: list[list[int]]) -> None:
    done = HFSampler(policy).generate(prompts * 8, Sampling(max_tokens=40, seed=0))
    lengths = {len(completion.ids) for completion in done}
    assert max(lengths) <= 40 and len(lengths) > 3
    for completion in done:
        stops = [i for i, t in enumerate(completion.ids) if t in policy.renderer.stop_ids]
        assert stops == [len(completion.ids) - 1] or (not stops and len(completion.ids) == 40)


def test_greedy_does_not_depend_on_the_batch(policy: Policy, prompts: list[list[int]]) -> None:
    sampling = Sampling(max_tokens=12, seed=0, temperature=0)
    together = HFSampler(policy).generate(prompts, sampling)
    alone = [HFSampler(policy).generate([p], sampling)[0] for p in prompts]
    assert [c.ids for c in together] == [c.ids for c in alone]


def test_the_same_seed_samples_the_same_ids(policy: Policy, prompts: list[list[int]]) -> None:
    sampler = HFSampler(policy)
    first = sampler.generate(prompts, Sampling(max_tokens=12, seed=5))
    again = sampler.generate(prompts, Sampling(max_tokens=12, seed=5))
    other = sampler.generate(prompts, Sampling(max_tokens=12, seed=6))
    assert [c.ids for c in first] == [c.ids for c in again] != [c.ids for c in other]


def test_nucleus_keeps_the_token_that_passes_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    uniform = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw_tokens(logits, Sampling(max_tokens=1, seed=0, top_p=0.6), uniform)
    assert set(tokens.tolist()) == {0, 1}
    assert tokens.float().mean().item() == pytest.approx(0.3 / 0.8, abs=0.03)
    assert logprobs[tokens == 1][0].exp().item() == pytest.approx(0.3)  # of the whole distribution


def turns(policy: Policy, reuse: bool) -> list[Completion]:
    """Three episodes of four turns on one stream, or each turn on a stream of its own.

    The third prompt of an episode forgets the second; another episode follows on the same row.
    """
    renderer, sampling = policy.renderer, Sampling(max_tokens=7, seed=0)
    kept = HFSampler(policy).stream(3, sampling, 10**4)
    starts = [renderer.start([{"role": "user", "content": "x" * 30 * row}]) for row in range(3)]
    found: list[Completion] = []
    for episode in range(2):
        prompts = [[*start, *renderer.encode("y" * episode)] for start in starts]
        for turn in range(4):
            streams = [kept] * 3 if reuse else [
                HFSampler(policy).stream(3, sampling, 10**4) for _ in range(3)
            ]  # fmt: skip
            for row, (stream, prompt) in enumerate(zip(streams, prompts, strict=True)):
                stream.submit(row, prompt, seed=100 * episode + 10 * turn + row)
            done: dict[int, Completion] = {}
            while len(done) < 3:
                for stream in streams[: 1 if reuse else 3]:
                    done |= dict(stream.step())
            found += [done[row] for row in range(3)]
            for row in range(3):
                told = done[row].ids + renderer.observe(done[row].ids, "user", f"seen {turn}")
                prompts[row] = (starts[row] if turn == 1 else prompts[row]) + told
    return found


def test_kept_caches_change_nothing(policy: Policy) -> None:
    read_again, kept = turns(policy, reuse=False), turns(policy, reuse=True)
    assert [c.ids for c in kept] == [c.ids for c in read_again]
    assert max(
        abs(a - b)
        for one, other in zip(kept, read_again, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    ) < 1e-5  # fmt: skip


def test_only_what_is_new_is_read(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    trunk = policy.trunk

    def counted(ids: torch.Tensor, *wanted: torch.Tensor, **inputs: Any) -> Any:
        read.append(ids.numel())
        return trunk(ids, *wanted, **inputs)

    monkeypatch.setattr(policy, "trunk", counted)
    stream = HFSampler(policy).stream(1, Sampling(max_tokens=1, seed=0), 100)
    prompt = policy.renderer.start([{"role": "user", "content": "a" * 50}])
    for longer in range(3):
        stream.submit(0, prompt + [5] * 4 * longer, seed=1)
        stream.step()
    assert read == [len(prompt), 4, 4]


def test_what_prompts_share_is_read_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = policy.renderer.encode("r" * 60)
    prompts = [rules + policy.renderer.encode(text) for text in ("a", "bc", "", "d" * 20)]
    sampling, read, trunk = Sampling(max_tokens=5, seed=0), [0], policy.trunk
    alone = []
    for i, prompt in enumerate(prompts):
        stream = HFSampler(policy).stream(1, sampling, 100)
        stream.submit(0, prompt, seed=i)
        while not (done := stream.step()):
            pass
        alone += [done[0][1].ids]

    def counted(ids: torch.Tensor, *wanted: torch.Tensor, **inputs: Any) -> Any:
        read[0] += ids.numel()
        return trunk(ids, *wanted, **inputs)

    monkeypatch.setattr(policy, "trunk", counted)
    stream = HFSampler(policy).stream(4, sampling, 100)
    for i, prompt in enumerate(prompts):
        stream.submit(i, prompt, seed=i)
    found = dict(stream.step())
    assert read[0] < 60 + 4 * 22
    while len(found) < 4:
        found |= dict(stream.step())
    assert [found[i].ids for i in range(4)] == alone


def test_what_is_sampled_does_not_depend_on_the_batch(
    policy: Policy, prompts: list[list[int]]
) -> None:
    sampling = Sampling(max_tokens=12, seed=3)
    many = HFSampler(policy, batch_size=64).generate(prompts * 3, sampling)
    few = HFSampler(policy, batch_size=2).generate(prompts * 3, sampling)
    assert [c.ids for c in many] == [c.ids for c in few]
    assert len({tuple(c.ids) for c in many}) == len(many)  # each has a stream of its own


def test_layers_with_a_window_are_sampled_as_they_compute(policy: Policy) -> None:
    """Their cache drops what is out of sight, so nothing of it is kept."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=len(policy.tokenizer), **sizes, **heads, initializer_range=0.15)
    )
    windowed = Policy(model, policy.tokenizer, ModelConfig(device="cpu"))
    prompts = [policy.renderer.start([{"role": "user", "content": text}]) for text in "ab"]
    done = HFSampler(windowed).generate(prompts, Sampling(max_tokens=9, seed=1))
    for prompt, completion in zip(prompts, done, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + completion.ids])).logits[0].log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(completion.ids)[:, None])
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected.squeeze(1), atol=1e-4, rtol=0
        )


def test_an_empty_prompt_is_an_error(policy: Policy) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        HFSampler(policy).generate([[]], Sampling(max_tokens=1, seed=0))
