"""BFCL multi-turn; `BfclEnv` is all that others need."""

from hero.envs.bfcl.env import BfclEnv

__all__ = ["BfclEnv"]
