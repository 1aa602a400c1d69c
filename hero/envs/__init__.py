"""Environments: text worlds of many turns. `docs/environments.md` is the guide."""

from hero.envs.registry import register

__all__ = ["register"]
