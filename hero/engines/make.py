"""From settings to an engine."""

from __future__ import annotations

from hero.config import TrainConfig
from hero.engines.base import Engine
from hero.engines.server import ServerEngine
from hero.policy import Policy
from hero.sampler import HFSampler


def make_engine(config: TrainConfig, policy: Policy) -> Engine:
    """The engine that `config` asks for.

    Raises:
        ServerError: there is no server that could be sampled from.
    """
    if config.engine.kind == "server":
        return ServerEngine(policy, config)
    return HFSampler(policy, config.rollout.batch_size)
