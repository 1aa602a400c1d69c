"""The sampler against log-probabilities recomputed by one plain forward pass."""

from __future__ import annotations

import copy

import pytest
import torch

from hero.config import ModelConfig
from hero.policy import Policy
from hero.sampler import HFSampler, Sampling, draw_tokens


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
    with checkpointed.recomputing():
        checkpointed.hidden(ids).sum().backward()
    assert all(p.grad is not None for n, p in checkpointed.trainable().items() if "layers" in n)
    done = HFSampler(checkpointed).generate(prompts, sampling)
    assert [c.ids for c in done] == [c.ids for c in expected]


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
    tokens, logprobs = draw_tokens(
        logits, Sampling(max_tokens=1, seed=0, top_p=0.6), torch.Generator().manual_seed(0)
    )
    assert set(tokens.tolist()) == {0, 1}
    assert tokens.float().mean().item() == pytest.approx(0.3 / 0.8, abs=0.03)
    assert logprobs[tokens == 1][0].exp().item() == pytest.approx(0.3)  # of the whole distribution


def test_an_empty_prompt_is_an_error(policy: Policy) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        HFSampler(policy).generate([[]], Sampling(max_tokens=1, seed=0))
