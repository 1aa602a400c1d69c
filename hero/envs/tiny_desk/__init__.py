"""The embedded desk; `TinyDeskEnv` is all that others need."""

from hero.envs.tiny_desk.env import TinyDeskEnv

__all__ = ["TinyDeskEnv"]
