"""tau-bench; `TauEnv` is all that others need."""

from hero.envs.tau.env import TauEnv

__all__ = ["TauEnv"]
