"""Models that can play a user: another transformers model, or an endpoint."""

from __future__ import annotations

from functools import cache

from hero.envs.tau.users import Chat
from hero.types import Message

MAX_TOKENS = 512
"""Of one message of a user."""


@cache
def local_chat(path: str, temperature: float) -> Chat:
    """A transformers model by folder or hub id, loaded once for all instances."""
    from hero.config import ModelConfig
    from hero.policy import Policy
    from hero.sampler import HFSampler, Sampling

    policy = Policy.load(ModelConfig(path=path))
    policy.model.requires_grad_(False)
    sampler = HFSampler(policy, 1)

    def chat(messages: list[Message], seed: int) -> str:
        sampling = Sampling(max_tokens=MAX_TOKENS, seed=seed, temperature=temperature)
        (answer,) = sampler.generate([policy.renderer.start(messages)], sampling)
        return policy.renderer.decode(answer.ids)

    return chat


def endpoint_chat(base_url: str, model: str, api_key_env: str, temperature: float) -> Chat:
    """A model behind an OpenAI-compatible endpoint.

    Raises:
        ValueError: no address, no model, or no key for an endpoint elsewhere.
    """
    from hero.config import ReflectionConfig
    from hero.reflection.endpoint import Endpoint

    class UserEndpoint(Endpoint):
        who, asked_by = "The simulated user", "env.options.user=openai"
        base_url, model = "user_base_url", "user_model"
        remedy = "env.options.user to scripted"

    endpoint = UserEndpoint(
        ReflectionConfig(
            base_url=base_url, model=model, api_key_env=api_key_env, temperature=temperature,
            max_tokens=MAX_TOKENS,
        ), None,
    )  # fmt: skip
    return lambda messages, seed: endpoint.chat(messages, seed)[0]
