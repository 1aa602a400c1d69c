"""Engines that sample from the student while it trains, behind one protocol."""

from __future__ import annotations

from collections.abc import Callable

from hero.config import TrainConfig
from hero.engines.base import Engine, check_same_model
from hero.engines.colocated import ColocatedEngine
from hero.engines.paged import PagedEngine
from hero.engines.server import ServerEngine
from hero.policy import Policy
from hero.sampler import HFSampler

__all__ = ["Engine", "check_same_model", "make_engine"]


def make_engine(config: TrainConfig, policy: Policy) -> Engine:
    """The engine that `engine.kind` asks for.

    Raises:
        ServerError: there is no server that could be sampled from.
        ValueError: vllm is not installed.
    """
    kind = config.engine.kind
    if kind == "hero":
        return HFSampler(policy, config.rollout.batch_size)
    makers: dict[str, Callable[[Policy, TrainConfig], Engine]] = {
        "transformers": PagedEngine, "vllm": ColocatedEngine, "server": ServerEngine
    }  # fmt: skip
    return makers[kind](policy, config)
